"""Serves models to OpenAI's clients (/v1/chat/completions, /v1/models, /health, /metrics) and to people: a chat page.

    mllm-jax serve --model runs/quickstart
    mllm-jax serve --model mlp=runs/a --model average=runs/b --port 9000
    MLLM_JAX_API_KEY=secret mllm-jax serve --model models/llava --template vicuna_v1 --host 0.0.0.0

Requests that arrive together are decoded together; the answers are those of `mllm-jax ask` and eval.py, whatever the
load. `--model` is a run of train.py (also gs://), a model directory, a checkpoint or a hub id; clients ask for it by
NAME, or by the last part of its path. SIGTERM lets requests finish. docs/serve.md says more.

Exit code 0: stopped by a signal; 2: a model or an option cannot be used.
"""

import argparse
import os
import pathlib
import sys
from typing import TYPE_CHECKING

from mllm_jax.console import complain

if TYPE_CHECKING:
    from mllm_jax.inference.model import Model
    from mllm_jax.serve.settings import Settings

BUCKETS = ("model",)
INSTALL = "the server needs packages that are not installed: pip install 'mllm-jax[serve]'"
KEY = "MLLM_JAX_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "--model", action="append", required=True, metavar="[NAME=]PATH", help="may be given again"
    )
    parser.add_argument("--stage", help="of runs: the model after this stage (default: the last one)")
    parser.add_argument("--template", help="conversation template of models that do not record it")
    parser.add_argument("--dtype", help="of the parameters, if not a checkpoint's own")
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    where.add_argument("--port", type=int, default=8000, help="0 = any that is free (default 8000)")
    where.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="by which clients may address the server; default: the local names with a local --host, else any",
    )  # fmt: skip
    where.add_argument("--access-log", action="store_true", help="print a line for every request")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--slots", type=int, default=16, help="answers made at once, per model (default 16)")
    limits.add_argument("--queue", type=int, default=64, help="requests that wait; more get 429 (default 64)")
    limits.add_argument(
        "--max-context", type=int, metavar="N",
        help="tokens of a prompt with its answer; less takes less memory (default: the LLM's context)",
    )  # fmt: skip
    limits.add_argument("--max-prompt-tokens", type=int, metavar="N", help="visual tokens included")
    limits.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N",
        help="tokens of an answer where the request does not say (default 512)",
    )  # fmt: skip
    limits.add_argument(
        "--temperature", type=float, default=0.0,
        help="where the request does not say; 0 (default): the likeliest tokens",
    )  # fmt: skip
    limits.add_argument("--max-body-mb", type=float, default=20, help="of a request (default 20)")
    limits.add_argument(
        "--max-image-pixels", type=int, default=25_000_000, help="of an image (default 25 million)"
    )
    limits.add_argument("--max-images", type=int, default=16, help="of a request, videos too (default 16)")
    limits.add_argument(
        "--request-seconds", type=float, default=600, help="in which an answer must be complete (default 600)"
    )
    limits.add_argument(
        "--drain-seconds", type=int, default=60, help="for requests to finish after SIGTERM (default 60)"
    )
    media = parser.add_argument_group("images from elsewhere than the request itself")
    media.add_argument(
        "--media-folder", type=pathlib.Path, metavar="DIR", help="whose files requests may name as file:NAME"
    )
    media.add_argument(
        "--fetch-from", action="append", default=[], metavar="HOST",
        help="a host whose http(s):// addresses requests may name; without it nothing is ever fetched",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Serves; see the module's text for the exit code."""
    try:
        from mllm_jax.serve import page
        from mllm_jax.serve.app import create_app
        from mllm_jax.serve.listen import listen, make_server
        from mllm_jax.serve.served import Served
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in (
            "fastapi",
            "starlette",
            "uvicorn",
            "pydantic",
            "prometheus_client",
        ):
            raise
        complain(f"mllm-jax serve: {INSTALL} ({error.name})")
        return 2
    try:
        chosen = settings(args)
        served = Served(load_models(args), chosen)
        served.warm()
    except (OSError, ValueError) as error:
        complain(f"mllm-jax serve: {error}")
        return 2
    if args.host not in LOCAL and chosen.api_key is None:
        complain(
            f"mllm-jax serve: listening on {args.host} without a key: whoever reaches it may ask (set {KEY})"
        )
    print(f"serving {', '.join(served.models)}", flush=True)
    try:
        server = make_server(
            create_app(served, extend=[page.mount]),
            connections=2 * served.capacity + 64,
            drain_seconds=args.drain_seconds,
            access_log=args.access_log,
        )
        listen(server, args.host, args.port)
    except OSError as error:
        complain(f"mllm-jax serve: {args.host}:{args.port}: {error.strerror or error}")
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
    return 0


def settings(args: argparse.Namespace) -> "Settings":
    """The limits that the options set.

    Raises:
      ValueError: one that cannot be, or a folder that is not there.
    """
    from mllm_jax.serve.media import Media
    from mllm_jax.serve.settings import Settings

    if args.media_folder is not None and not args.media_folder.is_dir():
        raise ValueError(f"--media-folder: there is no folder {args.media_folder}")
    body = int(args.max_body_mb * 1e6)
    hosts = tuple(name.lower() for name in args.allow_host) or (LOCAL if args.host in LOCAL else ())
    return Settings(
        slots=args.slots,
        queue=args.queue,
        most_tokens=args.max_context,
        most_prompt_tokens=args.max_prompt_tokens,
        answer_tokens=args.max_new_tokens,
        temperature=args.temperature,
        most_body_bytes=body,
        most_image_pixels=args.max_image_pixels,
        most_images=args.max_images,
        request_seconds=args.request_seconds,
        api_key=os.environ.get(KEY) or None,
        hosts=hosts,
        media=Media(args.media_folder, tuple(name.lower() for name in args.fetch_from), body),
    )


def named_source(given: str) -> tuple[str, str]:
    """Name and path of a model that is given as `[NAME=]PATH`; without a name, the last part of its path."""
    name, found, path = given.partition("=")
    if not found or "/" in name or ":" in name:
        return pathlib.PurePosixPath(given.rstrip("/")).name, given
    return name, path


def load_models(args: argparse.Namespace) -> "dict[str, Model]":
    """The models that `--model` names, by their names.

    Raises:
      OSError, ValueError: one that cannot be used, or two of one name.
    """
    from mllm_jax import compilation_cache
    from mllm_jax.inference.load import load

    named: dict[str, str] = {}
    for given in args.model:
        name, path = named_source(given)
        if not name or name in named:
            raise ValueError(f"--model {given}: give it a name of its own, --model NAME={path}")
        named[name] = path
    if problem := compilation_cache.use(compilation_cache.DEFAULT):
        complain(problem)
    return {
        name: load(path, template=args.template, stage=args.stage, dtype=args.dtype)
        for name, path in named.items()
    }
