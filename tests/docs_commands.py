"""The commands that the pages print: where they stand, and their words."""

import dataclasses
import pathlib
import re
import shlex
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
FENCED = re.compile(r"(?:<!-- run(?P<run>:[^\n]*)? -->\n)?^```bash\n(?P<text>.*?)^```", re.S | re.M)
INDENTED = re.compile(r"(?<=\n\n)(?:    (?:python|mllm-jax|pip|pytest) .*\n(?:    .*\n)*)")
INLINE = re.compile(r"(?<!`)`((?:python [\w./]+\.py|mllm-jax [a-z-]+|pytest)(?: [^`]*)?)`(?!`)")
LOOP = re.compile(r"^for (\w+) in ([^;\n]+); do\n(.*?)^done$", re.S | re.M)


@dataclasses.dataclass
class Command:
    """One command line.

    Attributes:
      page: where it stands.
      words: program and arguments, environment and redirections apart.
      reads, writes: files of `<` and `>`.
      whole: that it can be given as it is; otherwise arguments are left out ("...", or a command named in a sentence).
    """

    page: str
    words: list[str]
    reads: list[str]
    writes: list[str]
    whole: bool

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def blocks(page: str) -> list[tuple[str, str | None]]:
    """Blocks of shell commands, each with what stands behind the mark `<!-- run: ... -->` before it; None without."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = [
        (m["text"], (m["run"] or ":")[1:].strip() if m[0].startswith("<!--") else None)
        for m in FENCED.finditer(text)
    ]
    return fenced + [(re.sub(r"^    ", "", m[0], flags=re.M), None) for m in INDENTED.finditer(text)]


def commands(page: str) -> Iterator[Command]:
    """Commands of a page in their order: blocks first, then what sentences name."""
    for text, _ in blocks(page):
        text = LOOP.sub(_unrolled, re.sub(r"\\\n\s*", " ", text))
        for line in text.splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&|<>;")
            lexer.whitespace_split, lexer.commenters = True, "#"
            yield from _split(page, list(lexer), "..." not in line)
    for found in INLINE.findall((ROOT / page).read_text(encoding="utf-8").replace("\n", " ")):
        yield from _split(page, shlex.split(found), False)


def _unrolled(loop: re.Match) -> str:
    return "".join(loop[3].replace(f"${loop[1]}", value) for value in loop[2].split())


def _split(page: str, words: list[str], whole: bool) -> Iterator[Command]:
    command = Command(page, [], [], [], whole)
    words = iter(words)
    for word in words:
        if word in ("&&", "|", ";", "&", "||"):
            yield command
            command = Command(page, [], [], [], whole)
        elif word in ("<", ">", ">>"):
            (command.reads if word == "<" else command.writes).append(next(words))
        elif command.words or not re.fullmatch(r"[A-Z_]+=.*", word):
            command.words.append(word)
    if command.words:
        yield command
