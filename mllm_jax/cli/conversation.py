"""What the verbs that hold conversations with a model have in common: options, images and videos, commands."""

import argparse
import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Callable
from typing import Any

from mllm_jax.console import complain

HELP = """\
/image FILE...   begin a new conversation about these images; without a file, about none
/video FILE      begin a new conversation about this video
/clear or /new   begin a new conversation about the same images
/help            show this
/quit            end (also: end of input)
Anything else is a question."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of what is asked, and how."""
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


class Asker:
    """A loaded model with the options of the command line.

    Attributes:
      model: the model.
      remembers: whether it can be shown earlier questions and answers.

    Raises:
      OSError, ValueError: the model cannot be used, or has no place for a system text.
    """

    def __init__(self, args: argparse.Namespace, source: str):
        from mllm_jax import compilation_cache
        from mllm_jax.data.chat_template import resolve_template
        from mllm_jax.inference.load import load
        from mllm_jax.inference.sampling import Sampling

        Sampling(args.temperature, args.top_p, args.seed)  # refuses what cannot be, before the model is read
        if args.max_new_tokens < 1:
            raise ValueError("--max-new-tokens must be at least 1")
        if problem := compilation_cache.use(compilation_cache.DEFAULT):
            complain(problem)
        self.model = load(source, template=args.template, stage=args.stage, dtype=args.dtype)
        template = resolve_template(self.model.template, self.model.tokenizer)
        self.remembers = not template.captions
        if args.system is not None and template.system is None:
            raise ValueError(
                f"--system: template {self.model.template!r} has no place for a system text; leave it out or put the "
                "text into the question"
            )
        self._args = args

    def about(self, conversation: Conversation, question: str) -> dict[str, Any]:
        """A question of a conversation as arguments of `Model.generate` and `Model.stream`."""
        args = self._args
        return {
            "images": conversation.images or None,
            "prompt": question,
            "video": conversation.videos or None,
            "history": conversation.history,
            "system": args.system,
            "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "seed": args.seed,
        }


def converse(
    verb: str, asker: Asker, conversation: Conversation, ask: Callable[[Conversation, str], bool]
) -> int:
    """Questions and commands from standard input until it ends.

    Args:
      verb: for messages.
      asker: the model.
      conversation: the first one.
      ask: prints the answer to a question; says why and returns False where there is none.

    Returns:
      0; or 1 where a question has no answer, or a file that was given to a program is missing.
    """
    shown = sys.stdin.isatty() and sys.stdout.isatty()
    if shown:
        import readline  # noqa: F401 (lines can be edited and called back)

        print(
            "Ask a question; /image FILE or /video FILE begin a new conversation, /help lists all commands."
        )
        if not asker.remembers:
            print("The model was trained on captions: each question stands alone.")
    answered = True
    while True:
        try:
            line = input("> " if shown else "").strip()
        except EOFError:
            return 0 if answered else 1
        except KeyboardInterrupt:
            if not shown:
                raise
            print("\n/quit ends.")
            continue
        if line == "/quit":
            return 0 if answered else 1
        if line == "/help":
            print(HELP)
        elif line.startswith("/"):
            try:
                conversation = _begun(line, conversation)
            except (OSError, ValueError) as error:
                complain(f"mllm-jax {verb}: {error}")
                answered = shown and answered  # a person sees it and types it again
        elif line:
            answered = ask(conversation, line) and answered


def _begun(line: str, before: Conversation) -> Conversation:
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
        case "/clear" | "/new" if not files:
            begun = Conversation(before.images, before.videos)
        case _:
            raise ValueError(f"no command {line!r}; /help lists them")
    begun.check_files()
    return begun
