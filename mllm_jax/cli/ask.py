"""Asks a model about images or a video and prints the answer.

    mllm-jax ask --from runs/quickstart --image cat.jpg "What is this?"
    mllm-jax ask --from runs/quickstart --image cat.jpg --image dog.jpg "What is in <image> that is not in <image>?"
    mllm-jax ask --from models/llava --template vicuna_v1 --video clip.mp4 "What happens?"
    mllm-jax ask --from runs/quickstart --image cat.jpg          # a conversation on the terminal
    mllm-jax ask --from runs/quickstart --image cat.jpg --json < questions.txt

Without a question, each line of standard input is one: a conversation, in which the model sees its earlier answers
where its template has room for them. Lines that begin with a slash are commands:

  /image FILE...   begin a new conversation about these images; without a file, about none
  /video FILE      begin a new conversation about this video
  /clear or /new   begin a new conversation about the same images
  /help, /quit     list these commands; end (also: end of input)

`--from` is a run of train.py (also gs://), a model directory, a checkpoint or a hub id. Exit code 0: every question has
its answer; 1: one has not; 2: the model, a file or an option cannot be used.
"""

import argparse
import json
import sys

from mllm_jax.cli.conversation import Asker, Conversation, add_model_arguments, converse
from mllm_jax.console import complain
from mllm_jax.escape import terminal

BUCKETS = ("from",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("question", nargs="?", help="without it, questions are read from standard input")
    parser.add_argument("--from", dest="source", required=True, help="run, model directory or checkpoint")
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per answer")


def run(args: argparse.Namespace) -> int:
    """Asks; see the module's text for the exit code."""
    conversation = Conversation(args.image, args.video)
    try:
        conversation.check_files()
        asker = Asker(args, args.source)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        complain(f"mllm-jax ask: {error}")
        return 2

    def ask(about: Conversation, question: str) -> bool:
        return _ask(args, asker, about, question)

    try:
        if args.question is not None:
            return 0 if ask(conversation, args.question) else 1
        return converse("ask", asker, conversation, ask)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _ask(args: argparse.Namespace, asker: Asker, about: Conversation, question: str) -> bool:
    """Prints the answer and remembers it; says why and returns False where there is none."""
    try:
        answer = asker.model.generate(**asker.about(about, question))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        hint = "; /new begins a new conversation" if about.history else ""
        complain(f"mllm-jax ask: {error}{hint}")
        return False
    if args.json:
        record = {
            "model": args.source,
            "images": about.images,
            "videos": about.videos,
            "turn": len(about.history) + 1,
            "question": question,
            "answer": answer,
        }
        print(json.dumps(record), flush=True)
    else:
        print(terminal(answer), flush=True)
    if asker.remembers:
        about.history.append((question, answer))
    return True
