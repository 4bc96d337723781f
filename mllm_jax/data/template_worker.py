"""Writes conversations with a tokenizer's chat template, in a process of its own with limits on time and memory.

Chat templates are programs from whoever made the tokenizer. transformers runs them in a sandbox that keeps them from
files and from Python, but not from looping or from filling the memory. `chat_template` starts this file by its path;
the process reads one JSON object on its standard input and answers with one on its standard output.
"""

import datetime
import json
import resource
import sys
from typing import Any

from transformers.utils import chat_template_utils


def main() -> None:
    """Reads {template, variables, chats, date, seconds, bytes}, writes {texts, dated}."""
    asked = json.load(sys.stdin)
    dated: list[str] = []

    class Pinned(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Pinned":
            dated.append("now")
            return cls.fromisoformat(asked["date"])

    chat_template_utils.datetime = Pinned  # what `strftime_now` reads the clock with
    _bound(asked["seconds"], asked["bytes"])
    texts: list[str | dict[str, str]] = []
    for messages, answer_next in asked["chats"]:
        try:
            (text,), _ = chat_template_utils.render_jinja_template(
                conversations=[messages],
                chat_template=asked["template"],
                add_generation_prompt=answer_next,
                **asked["variables"],
            )
            texts.append(text)
        except MemoryError:
            raise
        except Exception as error:  # whatever a template raises
            texts.append({"error": f"{type(error).__name__}: {error}"[:500]})
    json.dump({"texts": texts, "dated": bool(dated)}, sys.stdout)


def _bound(seconds: int, size: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        return
    resource.setrlimit(resource.RLIMIT_AS, (now + size, now + size))


if __name__ == "__main__":
    main()
