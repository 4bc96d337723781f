"""The chat page of the server: static files that load nothing from elsewhere, and `POST /v1/attention` that they ask.

It takes `{"model", "messages", "layer"}`, the last message being the assistant's, and says which visual tokens this
answer attended to (`inference.attention_maps`): in LLM block `layer`, or the mean over all where it is null.
"""

import base64
import io
import pathlib
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from mllm_jax.inference.attention_maps import AttentionMaps, View, attention_maps
from mllm_jax.serve.errors import ApiError
from mllm_jax.serve.schema import Message, Messages, parse
from mllm_jax.serve.served import Served, ServedModel

_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Only what this server sends is loaded and run. Images that a person chooses are blobs, the model's views are data.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class AttentionRequest(BaseModel):
    """The body of a request for attention."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: Messages
    layer: Annotated[int, Field(ge=0)] | None = None


def mount(app: FastAPI, served: Served) -> None:
    """Adds the page at `/`, its files below `/page/`, and `/v1/attention`."""
    folder = pathlib.Path(__file__).parent
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in _KINDS}

    def file(name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"the page has no file {name!r}")
        kind = _KINDS[pathlib.PurePosixPath(name).suffix]
        return Response(files[name], media_type=f"{kind}; charset=utf-8", headers=_HEADERS)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return file("index.html")

    @app.get("/page/{name:path}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        return file(name)

    @app.post("/v1/attention")
    async def attention(request: Request) -> Response:
        asked = await served.in_thread(parse, AttentionRequest, await request.body())
        model = served.model(asked.model)
        layers = model.model.config.llm.depth
        if asked.layer is not None and asked.layer >= layers:
            raise ApiError(400, f"layer {asked.layer}: the LLM has blocks 0 to {layers - 1}", param="layer")
        maps = await _maps(served, model, asked.messages)
        # Written there, too: millions of numbers would hold up the event loop.
        return await served.in_thread(lambda: JSONResponse(described(maps, asked.layer)))


async def _maps(served: Served, model: ServedModel, messages: list[Message]) -> AttentionMaps:
    prompt = await served.prompt(model, messages, answered=True)
    length, most = len(prompt.request.prompt), model.engine.most_tokens
    if length > most:
        raise ApiError(
            400,
            f"prompt and answer have {length} tokens, visual tokens included; at most {most} are allowed",
            param="messages",
            code="context_length_exceeded",
        )

    def attended() -> AttentionMaps:
        with prompt.model.on_mesh():
            return attention_maps(prompt.model, prompt.request, prompt.load_image)

    try:
        return await served.on_worker(attended)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from error


def described(maps: AttentionMaps, layer: int | None) -> dict[str, Any]:
    """Attention as the page draws it.

    Returns:
      `pieces` of the answer's text, `layers` of the LLM, `place` (as in `AttentionMaps`), `visual` [A][n], the weight
      of every visual token, and `views`: each with `image`, `kind`, `number`, `url` of its pixels, `columns`, and
      `weights` [A][cells] row by row.
    """
    weights = maps.weights.mean(axis=0) if layer is None else maps.weights[layer]
    cells = maps.on_views(weights) or [np.zeros((len(maps.tokens), 1, 1), np.float32)] * len(maps.views)
    return {
        "pieces": maps.pieces,
        "layers": len(maps.weights),
        "place": maps.place,
        "visual": _rounded(weights),
        "views": [
            {
                "image": view.image,
                "kind": view.kind,
                "number": view.number,
                "url": _url(view),
                "columns": grid.shape[-1],
                "weights": _rounded(grid.reshape(len(maps.tokens), -1)),
            }
            for view, grid in zip(maps.views, cells, strict=True)
        ],
    }


def _rounded(weights: np.ndarray) -> list[list[float]]:
    """To millionths: what is less cannot be seen."""
    return np.round(weights.astype(np.float64), 6).tolist()


def _url(view: View) -> str:
    file = io.BytesIO()
    Image.fromarray(view.pixels).save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
