"""Feeds changed files to every reader and looks at what happens besides the reading.

    python tests/security/fuzz.py --inputs=5000 --seed=0

No input may run anything, touch or read a file outside of its folder, take more memory than `MEMORY` or time than
`SECONDS`, print a terminal command or a secret of another folder, or end in a traceback. The readers run in a process
of their own, in a folder with modules and links that an attacker planted. A reader of checkpoints must refuse a share
of what it is given (`readers.Reader.refuses`). Prints a row per reader; exit code 1 if anything was wrong.
"""

import argparse
import collections
import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEMORY = 256 << 20  # bytes that reading one input may add
SECONDS = 30
MOST_SHOWN = 40


class Slow(BaseException):
    """An input took too long."""


def _memory() -> tuple[int, int]:
    """Bytes resident now and at the highest since `_forget_peak`."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[key].split()[0]) << 10 for key in ("VmRSS", "VmHWM"))


def _forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _plant(work: Path) -> Path:
    """Modules that would be imported from the current folder, were a reader to import what a file names."""
    folder = work / "inside"
    folder.mkdir()
    for name in ("planted_module", "features", "tokenization_mini", "modeling_x", "custom_generate"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\n")
    return folder


def child(inputs: int, seed: int, only: str) -> None:
    """Runs all inputs and prints a JSON line per reader."""
    work = Path(tempfile.mkdtemp(prefix="mllm_jax_fuzz_", dir=os.environ["FUZZ_FOLDER"]))
    inside = _plant(work)
    os.chdir(inside)
    for name in ("TMPDIR", "MPLCONFIGDIR", "HF_HOME", "XDG_CACHE_HOME", "HOME"):
        os.environ[name] = str(inside / "caches")
    (inside / "caches").mkdir()
    sys.path[:0] = ["", str(HERE), *(str(HERE.parent / name) for name in ("", "evaluation", "interop"))]
    import readers
    from guard import SECRET, Guard, Outside
    from mutation import mutated_bytes, mutated_json

    outside = Outside(work / "outside", readers.tiny.png(9, (7, 7)))
    guard = Guard(inside)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(Slow()))
    chosen = {name: one for name, one in readers.READERS.items() if only in name}
    shares = sum(one.share for one in chosen.values())
    for name, reader in chosen.items():
        folder, out = inside / "in", inside / "out"
        folder.mkdir()
        reader.make(folder)
        sound = {
            path: (path.read_bytes(), kind)
            for pattern, kind in reader.files.items()
            for path in sorted(folder.glob(pattern))
            if path.is_file()
        }
        assert sound, name
        count = max(1, round(inputs * reader.share / shares))
        outcomes: collections.Counter[str] = collections.Counter()
        faults: list[str] = []
        peak, started = 0, time.perf_counter()
        for number in range(
            -1, count
        ):  # the first is the sound one: it must be read, and imports what is needed
            rng = random.Random(f"{seed} {name} {number}")
            path = rng.choice(list(sound))
            data, kind = sound[path]
            if number >= 0:
                changed = (
                    mutated_bytes(data, rng)
                    if kind == readers.BYTES
                    else mutated_json(data.decode(), rng, outside.folder)
                )
                path.write_bytes(changed)
            out.mkdir()
            said, wrong, raised = io.StringIO(), [], False
            print(json.dumps({"at": [name, number]}), flush=True)
            readers.CODES.clear()
            _forget_peak()
            before, _ = _memory()
            guard.watching = number >= 0
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    reader.read(folder, out, rng)
                outcome = "refused" if any(readers.CODES) else "read"
            except reader.errors as error:
                outcome, raised = "refused", True
                said.write(str(error))
                if not str(error):
                    wrong.append(f"refused by {type(error).__name__} without a word")
                if number < 0:
                    wrong.append(f"the sound files are refused: {error}")
            except (Exception, Slow):
                outcome = "traceback"
                wrong.append(traceback.format_exc(limit=-4))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                guard.watching = False
            grown = _memory()[1] - before
            wrong += [*guard.found, outside.changed()]
            guard.found = []
            text = said.getvalue()
            if number < 0 and any(readers.CODES):
                wrong.append(f"a verb refuses the sound files: {text}")
            if number >= 0:
                peak = max(peak, grown)
                outcomes[outcome] += 1
                if grown > MEMORY:
                    wrong.append(f"took {grown >> 20} MB")
            if (inside / "executed").exists():
                wrong.append("planted code ran")
            if SECRET in text or any(
                SECRET.encode() in one.read_bytes() for one in out.rglob("*") if one.is_file()
            ):
                wrong.append("a secret of another folder is in what it says or wrote")
            if "\x1b" in text and not raised:
                wrong.append("terminal commands in what it says")
            for one in filter(None, wrong):
                faults.append(f"{name} #{number} ({path.relative_to(folder)}): {one}")
            path.write_bytes(data)
            shutil.rmtree(out)
        shutil.rmtree(folder)
        if outcomes["refused"] < reader.refuses * count:
            faults.append(
                f"{name}: refuses {outcomes['refused']} of {count}, fewer than {reader.refuses:.0%}"
            )
        took = time.perf_counter() - started
        row = {"reader": name, "inputs": count, "peak_mb": peak >> 20, "seconds": round(took, 1)}
        print(json.dumps(row | {"outcomes": outcomes, "faults": faults}), flush=True)
    shutil.rmtree(work)


def main() -> int:
    """Runs the child and prints a table; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", default="", help="only readers with this in their name")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        faulthandler.enable()
        # Beyond what any input may take, so that a bomb ends in a MemoryError instead of the machine's.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        child(args.inputs, args.seed, args.reader)
        return 0
    with tempfile.TemporaryDirectory(prefix="mllm_jax_fuzz_") as folder:
        environment = os.environ | {
            "FUZZ_FOLDER": folder, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "0", "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        command = [
            sys.executable,
            __file__,
            "--child",
            f"--inputs={args.inputs}",
            f"--seed={args.seed}",
            f"--reader={args.reader}",
        ]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        rows, at = [], None
        for line in process.stdout:
            message = json.loads(line)
            at = message.get("at", at)
            if "reader" in message:
                rows.append(message)
        code = process.wait()
    faults = [fault for row in rows for fault in row["faults"]]
    if code:
        faults.append(f"the process ended with {code} at {at}")
    print(f"{'reader':24} {'inputs':>6} {'refused':>8} {'peak MB':>8} {'seconds':>8} {'faults':>7}")
    for row in rows:
        refused = row["outcomes"].get("refused", 0)
        numbers = (
            f"{row['inputs']:6} {refused:8} {row['peak_mb']:8} {row['seconds']:8} {len(row['faults']):7}"
        )
        print(f"{row['reader']:24} {numbers}")
    total, peak = sum(row["inputs"] for row in rows), max((row["peak_mb"] for row in rows), default=0)
    print(f"{'all':24} {total:6} {'':8} {peak:8} {sum(row['seconds'] for row in rows):8.1f} {len(faults):7}")
    for fault in faults[:MOST_SHOWN]:
        print(f"\n{fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
