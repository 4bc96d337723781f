"""A conversation with a model about images or a video, whose answers appear as they are made.

    mllm-jax chat --from runs/quickstart --image cat.jpg
    mllm-jax chat --from models/llava --template vicuna_v1 --video clip.mp4

Each line is a question. Ctrl-C stops an answer, of which the model sees as much as was shown. Lines that begin with a
slash are commands:

  /image FILE...   begin a new conversation about these images; without a file, about none
  /video FILE      begin a new conversation about this video
  /clear or /new   begin a new conversation about the same images
  /help, /quit     list these commands; end (also: end of input)

`--from` is a run of train.py (also gs://), a model directory, a checkpoint or a hub id. Exit code 0: every question has
its answer; 1: one has not; 2: the model, a file or an option cannot be used.
"""

import argparse

from mllm_jax.cli.conversation import Asker, Conversation, add_model_arguments, converse
from mllm_jax.console import complain
from mllm_jax.escape import terminal

BUCKETS = ("from",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("--from", dest="source", required=True, help="run, model directory or checkpoint")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Chats; see the module's text for the exit code."""
    conversation = Conversation(args.image, args.video)
    try:
        conversation.check_files()
        asker = Asker(args, args.source)
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
