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
  /new             begin a new conversation about the same images
  /quit            end (also: end of input)

`--from` is a run of train.py (also gs://), a model directory, a checkpoint or a hub id. Exit code 0: every question has
its answer; 1: one has not; 2: the model, a file or an option cannot be used.
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
import sys
from typing import Any

from mllm_jax.console import complain
from mllm_jax.escape import terminal

BUCKETS = ("from",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("question", nargs="?", help="without it, questions are read from standard input")
    parser.add_argument("--from", dest="source", required=True, help="run, model directory or checkpoint")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="may be given again")
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="may be given again")
    parser.add_argument("--system", help="system text in place of the template's own")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="at most so many (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this share"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--stage", help="of a run: the model after this stage (default: the last one)")
    parser.add_argument("--template", help="conversation template, if the model does not record it")
    parser.add_argument("--dtype", help="of the parameters, if not a checkpoint's own")
    parser.add_argument("--json", action="store_true", help="print one JSON object per answer")


@dataclasses.dataclass
class Conversation:
    """What a model is asked about, and what was said so far.

    Attributes:
      images, videos: files, which belong to the first question.
      history: questions with their answers, as far as the model is shown them.
    """

    images: list[str]
    videos: list[str]
    history: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def check_files(self) -> None:
        """Raises FileNotFoundError for an image that is no file, or a video that is no file or folder of frames."""
        for kind, files in (("image", self.images), ("video", self.videos)):
            for name in files:
                path = pathlib.Path(name).expanduser()
                if not (path.is_file() or (kind == "video" and path.is_dir())):
                    raise FileNotFoundError(f"--{kind}: there is no file {name}")


def run(args: argparse.Namespace) -> int:
    """Asks; see the module's text for the exit code."""
    conversation = Conversation(args.image, args.video)
    try:
        conversation.check_files()
        asker = Asker(args)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        complain(f"mllm-jax ask: {error}")
        return 2
    try:
        if args.question is not None:
            return 0 if asker.ask(conversation, args.question) else 1
        return _converse(asker, conversation)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


class Asker:
    """A loaded model with the options of the command line.

    Raises:
      OSError, ValueError: the model cannot be used, or has no place for a system text.
    """

    def __init__(self, args: argparse.Namespace):
        from mllm_jax import compilation_cache
        from mllm_jax.data.chat_template import resolve_template
        from mllm_jax.inference.load import load
        from mllm_jax.inference.sampling import Sampling

        Sampling(args.temperature, args.top_p, args.seed)  # refuses what cannot be, before the model is read
        if args.max_new_tokens < 1:
            raise ValueError("--max-new-tokens must be at least 1")
        if problem := compilation_cache.use(compilation_cache.DEFAULT):
            complain(problem)
        self._args = args
        self._model = load(args.source, template=args.template, stage=args.stage, dtype=args.dtype)
        template = resolve_template(self._model.template, self._model.tokenizer)
        self.remembers = not template.captions
        if args.system is not None and template.system is None:
            raise ValueError(
                f"--system: template {self._model.template!r} has no place for a system text; leave it out or put the "
                "text into the question"
            )

    def ask(self, about: Conversation, question: str) -> bool:
        """Prints the answer and remembers it; says why and returns False where there is none."""
        args = self._args
        try:
            answer = self._model.generate(
                about.images or None,
                question,
                video=about.videos or None,
                history=about.history,
                system=args.system,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                top_p=args.top_p,
                seed=args.seed,
            )
        except (OSError, ValueError, ModuleNotFoundError) as error:
            hint = "; /new begins a new conversation" if about.history else ""
            complain(f"mllm-jax ask: {error}{hint}")
            return False
        if args.json:
            print(json.dumps(self._record(about, question, answer)), flush=True)
        else:
            print(terminal(answer), flush=True)
        if self.remembers:
            about.history.append((question, answer))
        return True

    def _record(self, about: Conversation, question: str, answer: str) -> dict[str, Any]:
        return {
            "model": self._args.source,
            "images": about.images,
            "videos": about.videos,
            "turn": len(about.history) + 1,
            "question": question,
            "answer": answer,
        }


def _converse(asker: Asker, conversation: Conversation) -> int:
    """Questions and commands from standard input until it ends."""
    shown = sys.stdin.isatty() and sys.stdout.isatty()
    if shown:
        print("Ask a question; /image FILE, /video FILE and /new begin a new conversation, /quit ends.")
        if not asker.remembers:
            print("The model was trained on captions: each question stands alone.")
    answered = True
    while True:
        try:
            line = input("> " if shown else "").strip()
        except EOFError:
            return 0 if answered else 1
        if line == "/quit":
            return 0 if answered else 1
        if line.startswith("/"):
            try:
                conversation = _command(line, conversation)
            except (OSError, ValueError) as error:
                complain(f"mllm-jax ask: {error}")
                answered = shown and answered  # a person sees it and types it again
        elif line:
            answered = asker.ask(conversation, line) and answered


def _command(line: str, before: Conversation) -> Conversation:
    """The conversation that a command begins.

    Raises:
      FileNotFoundError: a file that is not there.
      ValueError: no such command, or a quotation mark that is not closed.
    """
    name, *files = shlex.split(line)
    match name:
        case "/image":
            begun = Conversation(files, [])
        case "/video":
            begun = Conversation([], files)
        case "/new" if not files:
            begun = Conversation(before.images, before.videos)
        case _:
            raise ValueError(f"no command {line!r}; there are /image FILE..., /video FILE, /new and /quit")
    begun.check_files()
    return begun
