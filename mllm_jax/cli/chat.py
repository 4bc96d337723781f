"""A conversation with a model about images or a video, whose answers appear as they are made.

    mllm-jax chat --from runs/quickstart --image cat.jpg
    mllm-jax chat --from models/llava --template vicuna_v1 --video clip.mp4
    mllm-jax chat --from runs/mlp2x_gelu --from runs/average_pool --web       # http://127.0.0.1:8000

Each line is a question. Ctrl-C stops an answer, of which the model sees as much as was shown. Lines that begin with a
slash are commands:

  /image FILE...   begin a new conversation about these images; without a file, about none
  /video FILE      begin a new conversation about this video
  /clear or /new   begin a new conversation about the same images
  /help, /quit     list these commands; end (also: end of input)

`--web` shows a page in the browser instead, on which images and videos are dropped, and where two models (`--from`
given twice) answer the same questions side by side. It is the page of `mllm-jax serve`, which has more options: for
other machines, keys and limits.

`--from` is a run of train.py (also gs://), a model directory, a checkpoint or a hub id. Exit code 0: every question has
its answer; 1: one has not; 2: the model, a file or an option cannot be used.
"""

import argparse
from collections.abc import Sequence

from mllm_jax.cli import serve
from mllm_jax.cli.conversation import Asker, Conversation, add_model_arguments, converse
from mllm_jax.console import complain
from mllm_jax.escape import terminal

BUCKETS = ("from",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "--from", dest="sources", action="append", required=True, metavar="[NAME=]MODEL",
        help="run, model directory or checkpoint; with --web it may be given again",
    )  # fmt: skip
    parser.add_argument("--web", action="store_true", help="a page in the browser")
    parser.add_argument("--port", type=int, help="of the page (default 8000; 0 = any that is free)")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Chats; see the module's text for the exit code."""
    if args.web:
        return _show_page(args)
    conversation = Conversation(args.image, args.video)
    try:
        if len(args.sources) > 1 or args.port is not None:
            raise ValueError("several models (--from given again) and --port are for the page; add --web")
        conversation.check_files()
        asker = Asker(args, serve.named_source(args.sources[0])[1])
    except (OSError, ValueError, ModuleNotFoundError) as error:
        complain(f"mllm-jax chat: {error}")
        return 2

    def ask(about: Conversation, question: str) -> bool:
        return _ask(asker, about, question)

    try:
        return converse("chat", asker, conversation, ask)
    except KeyboardInterrupt:
        print()
        return 130


def _show_page(args: argparse.Namespace) -> int:
    """Serves the page with its defaults; for one person a few slots are enough."""
    on_page = {"image": [], "video": [], "system": None, "top_p": 1.0, "seed": 0}
    if given := [name for name, default in on_page.items() if getattr(args, name) != default]:
        complain(
            f"mllm-jax chat: --{given[0].replace('_', '-')} is chosen on the page; leave it out with --web"
        )
        return 2
    parser = argparse.ArgumentParser(prog="mllm-jax chat")
    serve.add_arguments(parser)
    options: dict[str, Sequence[str]] = {"model": args.sources, "slots": ["4"]}
    for name in ("stage", "template", "dtype", "max_new_tokens", "temperature", "port"):
        if getattr(args, name) is not None:
            options[name.replace("_", "-")] = [str(getattr(args, name))]
    return serve.run(
        parser.parse_args([f"--{name}={value}" for name, own in options.items() for value in own])
    )


def _ask(asker: Asker, about: Conversation, question: str) -> bool:
    """Prints the answer piece by piece and remembers it; says why and returns False where there is none."""
    pieces: list[str] = []
    try:
        for piece in asker.model.stream(**asker.about(about, question)):
            pieces.append(piece)
            print(terminal(piece), end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print(" ...", flush=True)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        hint = "; /clear begins a new conversation" if about.history else ""
        complain(f"mllm-jax chat: {error}{hint}")
        return False
    if asker.remembers and (answer := "".join(pieces)):
        about.history.append((question, answer))
    return True
