"""The application: OpenAI's routes over `Served`, behind the gate."""

import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mllm_jax.serve.answers import StreamedAnswer, whole_answer
from mllm_jax.serve.errors import ApiError
from mllm_jax.serve.gate import Gate
from mllm_jax.serve.schema import ChatRequest, parse_request
from mllm_jax.serve.served import Served

Extend = Callable[[FastAPI, Served], None]


def create_app(served: Served, extend: Sequence[Extend] = ()) -> FastAPI:
    """The server as an ASGI application.

    Args:
      served: which the application starts and closes.
      extend: functions that add routes, such as the page's.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await served.start()
        try:
            yield
        finally:
            await served.close()

    # The interactive documentation loads scripts of other sites: left out.
    app = FastAPI(title="mllm-jax", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.served = served
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _server_error)

    body = {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": ChatRequest.model_json_schema()}},
        }
    }

    @app.post("/v1/chat/completions", openapi_extra=body)
    async def chat_completions(request: Request) -> Response:
        asked = await served.in_thread(parse_request, await request.body())
        model = served.model(asked.model)
        prompt = await served.prompt(model, asked.messages)
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        job = served.job(model, prompt, asked, seed)
        if asked.stream:
            told = bool(asked.stream_options and asked.stream_options.include_usage)
            return StreamedAnswer(served, model, job, told)
        return JSONResponse(await whole_answer(served, model, job, request.receive))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(served, name) for name in served.models]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return _described(served, served.model(name).name)

    @app.get("/health")
    async def health() -> Response:
        alive = served.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(served.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for add in extend:
        add(app, served)
    paths = frozenset(route.path for route in app.routes if "{" not in route.path)
    app.add_middleware(Gate, served=served, paths=paths)
    return app


def _described(served: Served, name: str) -> dict[str, Any]:
    model = served.models[name]
    config = model.model.config
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "mllm-jax",
        "connector": config.connector,
        "template": model.model.template,
        "context": model.engine.most_tokens,
    }


async def _api_error(_: Request, error: Exception) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in the same form as all errors."""
    what = f"{request.method} {request.url.path}"
    found = ApiError(error.status_code, f"{what}: {error.detail}", headers=dict(error.headers or {}))
    return await _api_error(request, found)


async def _server_error(request: Request, error: Exception) -> Response:
    return await _api_error(request, ApiError(500, f"the server failed: {type(error).__name__}"))
