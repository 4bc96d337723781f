"""The commands that the pages print: where they stand, and their words.

    python tests/docs_commands.py docs/getting_started.md docs/tutorials/evaluator.md

copies the library into a new folder, runs there the blocks of these pages that are marked `<!-- run -->`, one page
after the other, and says how long each took. With --short, `train`, `sweep` and `prepare` take in addition the options
of the mark (`<!-- run: --config... -->`), by which they end in seconds.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
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
        text = re.sub(r"<<'END'\n.*?\nEND\n", "\n", text, flags=re.S)
        text = LOOP.sub(_unrolled, re.sub(r"\\\n\s*", " ", text))
        begun = ""
        for line in text.splitlines():
            begun += line
            lexer = shlex.shlex(begun, posix=True, punctuation_chars="&|<>;")
            lexer.whitespace_split, lexer.commenters = True, "#"
            try:
                words = list(lexer)
            except ValueError:  # a quotation goes on in the next line
                begun += "\n"
                continue
            yield from _split(page, words, "..." not in begun)
            begun = ""
    for found in INLINE.findall((ROOT / page).read_text(encoding="utf-8").replace("\n", " ")):
        yield from _split(page, shlex.split(found), False)


def _unrolled(loop: re.Match) -> str:
    return "".join(loop[3].replace(f"${loop[1]}", value) for value in loop[2].split())


def _split(page: str, words: list[str], whole: bool) -> Iterator[Command]:
    command = Command(page, [], [], [], whole)
    words = iter(words[2:] if words[:1] == ["timeout"] else words)
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


SHIM = """#!/bin/sh
case "$1" in train|sweep|prepare) exec {python} -m mllm_jax.cli.main "$@" $SHORTER;; esac
exec {python} -m mllm_jax.cli.main "$@"
"""


def copy_library(folder: pathlib.Path) -> None:
    """A checkout with the connector of docs/connectors.md in it, and `bin/` with what its commands call."""
    for each in ("mllm_jax", "configs", "tests"):
        shutil.copytree(ROOT / each, folder / each, ignore=shutil.ignore_patterns("__pycache__"))
    for each in ("train.py", "eval.py", "pyproject.toml"):
        shutil.copy(ROOT / each, folder)
    written = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/connectors.md").read_text(encoding="utf-8"), re.S
    )
    (folder / "mllm_jax/connectors/max_pool.py").write_text(written[0])
    (folder / "tests/connectors/test_connector_max_pool.py").write_text(written[-1])
    table = folder / "mllm_jax/connectors/__init__.py"
    row, text = "CONNECTORS: dict[str, tuple[type[Connector], dict[str, Any]]] = {\n", table.read_text()
    assert row in text
    imported = "from mllm_jax.connectors.max_pool import MaxPool\n\n"
    table.write_text(text.replace(row, f'{imported}{row}    "max_pool": (MaxPool, {{}}),\n'))
    (folder / "bin").mkdir()
    python = shlex.quote(sys.executable)
    for name, text in {
        "mllm-jax": SHIM.format(python=python),
        "python": f'#!/bin/sh\nexec {python} "$@"\n',
        "pytest": f'#!/bin/sh\nexec {python} -m pytest -p no:cacheprovider "$@"\n',
    }.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)


def run_page(page: str, folder: pathlib.Path, environment: dict[str, str], short: bool = True) -> list[str]:
    """Runs the marked blocks of a page in a folder that `copy_library` made; gives what each printed.

    Raises:
      RuntimeError: one failed; with what it printed.
    """
    said = []
    paths = {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder)}
    for text, options in blocks(page):
        if options is None:
            continue
        begin = time.monotonic()
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=folder,
            env=environment | paths | {"SHORTER": options if short else ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        said.append(done.stdout)
        print(f"{time.monotonic() - begin:6.1f} s  {text.splitlines()[0]}", flush=True)
        if done.returncode:
            raise RuntimeError(f"{page}: exit code {done.returncode} of\n{text}\n{done.stdout}")
    return said


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="+")
    parser.add_argument("--short", action="store_true", help="take the options of the marks")
    parser.add_argument("--folder", type=pathlib.Path, help="instead of a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = arguments.folder or pathlib.Path(temporary)
        copy_library(place)
        for each in arguments.pages:
            print(each)
            print("\n".join(run_page(each, place, dict(os.environ), arguments.short)))
