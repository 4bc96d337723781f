"""METEOR and the original PTB tokenizer: two Java programs that the PyPI package pycocoevalcap carries.

METEOR 1.5 (Denkowski and Lavie 2014) needs its paraphrase table and exists in Java only. Both programs
are used when the extra `captions` is installed and `java` is on the path; otherwise `missing()` says
what is lacking.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mllm_jax.evaluation.ptb_tokenizer import PUNCTUATION

_TOKENIZER = "tokenizer/stanford-corenlp-3.4.1.jar"
_METEOR = "meteor/meteor-1.5.jar"
_TIMEOUT = 600  # seconds; 40,000 captions take about one minute


def _jar(name: str) -> Path | None:
    spec = importlib.util.find_spec("pycocoevalcap")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / name
        if path.is_file():
            return path
    return None


def missing() -> str:
    """What is lacking for METEOR, and what to do; empty if nothing is."""
    if _jar(_METEOR) is None:
        return "pycocoevalcap is not installed (pip install 'mllm-jax[captions]')"
    if shutil.which("java") is None:
        return "no `java` on the path (any Java runtime from version 8 on)"
    return ""


def _run(command: Sequence[str], text: str, cwd: Path) -> str:
    done = subprocess.run(
        command, input=text.encode(), capture_output=True, cwd=cwd, timeout=_TIMEOUT, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{Path(command[2]).name} failed: {done.stderr.decode(errors='replace')[-300:]}")
    return done.stdout.decode()


def tokenize(captions: Sequence[str]) -> list[str]:
    """The official tokens of each caption, without punctuation, joined by blanks.

    Raises:
        RuntimeError: Java fails, or returns another number of lines.
    """
    jar = _jar(_TOKENIZER)
    if jar is None or shutil.which("java") is None:
        raise RuntimeError(missing())
    program = "edu.stanford.nlp.process.PTBTokenizer"
    command = ["java", "-cp", str(jar), program, "-preserveLines", "-lowerCase"]
    lines = _run(command, "\n".join(c.replace("\n", " ") for c in captions), jar.parent).split("\n")
    if len(lines) < len(captions) or any(line.strip() for line in lines[len(captions) :]):
        raise RuntimeError(f"PTBTokenizer returned {len(lines)} lines for {len(captions)} captions")
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATION)
        for line in lines[: len(captions)]
    ]


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """Corpus METEOR and one score per image, of tokenized captions.

    Raises:
        RuntimeError: METEOR cannot run here (see `missing`), or fails.
    """
    jar = _jar(_METEOR)
    if jar is None or missing():
        raise RuntimeError(missing())
    command = ["java", "-jar", "-Xmx2G", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    with subprocess.Popen(
        command, cwd=jar.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        send, receive = process.stdin, process.stdout
        assert send is not None
        assert receive is not None

        def ask(line: str) -> str:
            send.write(f"{line}\n".encode())
            send.flush()
            return receive.readline().decode().strip()

        statistics = []
        for prediction, refs in zip(predictions, references, strict=True):
            said = prediction.replace("|||", "").replace("  ", " ")
            statistics.append(ask(" ||| ".join(("SCORE", *refs, said))))
        answers = [ask(" ||| ".join(("EVAL", *statistics)))]
        answers += [receive.readline().decode().strip() for _ in predictions]
        send.close()
        process.kill()
    try:
        values = [float(answer) for answer in answers]
    except ValueError as error:
        raise RuntimeError(f"METEOR stopped early: {error}") from error
    return values[-1], values[:-1]
