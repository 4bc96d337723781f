"""Seconds from a command to its help text, and to the end of the first step of the quickstart.

    python benchmarks/startup.py
    python benchmarks/startup.py --write     # puts the table into docs/performance.md

* cold: an empty work directory and no compiled program on disk.
* compiled before: an empty work directory; the programs are in the compilation cache.
* data too: as when a run is started again, or with a `data.dir` that has been used before.

Files of the packages are in the system's cache in each case: every command runs once before it is measured.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import page

ROOT = pathlib.Path(__file__).parents[1]
HELP = {
    "train.py --help": ("train.py", "--help"),
    "eval.py --help": ("eval.py", "--help"),
    "mllm-jax --help": ("-m", "mllm_jax", "--help"),
    "mllm-jax config --help": ("-m", "mllm_jax", "config", "--help"),
    "mllm-jax score --help": ("-m", "mllm_jax", "score", "--help"),
}
SET_ELSEWHERE = ("JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE")  # a user's start has neither
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if key not in SET_ELSEWHERE},
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
}


def help_seconds(arguments: tuple[str, ...]) -> float:
    """Until the help text is there and the process has ended."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def first_step_seconds(workdir: pathlib.Path, cache: pathlib.Path, data: pathlib.Path) -> float:
    """Until the quickstart has logged its first step; then it is killed."""
    command = [sys.executable, "train.py", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    command += [f"--compilation_cache={cache}", f"--config.data.dir={data}"]
    command += ["--config.stages.pretrain.log_every=1"]
    log = workdir / "metrics.jsonl"
    begin = time.perf_counter()
    with open(workdir.with_suffix(".log"), "w") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=said, stderr=said, start_new_session=True
        )
        try:
            while not (log.exists() and log.stat().st_size):
                if process.poll() is not None:
                    raise SystemExit(workdir.with_suffix(".log").read_text())
                time.sleep(0.01)
            return time.perf_counter() - begin
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    found: dict[str, list[float]] = {}
    for name, arguments in HELP.items():
        help_seconds(arguments)
        found[name] = [help_seconds(arguments) for _ in range(args.rounds)]
    first = {"cold": [], "compiled before": [], "compiled before, data too": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            root = pathlib.Path(folder, str(number))
            root.mkdir()
            cache, data = root / "cache", root / "data"
            first["cold"].append(first_step_seconds(root / "a", cache, root / "a_data"))
            first["compiled before"].append(first_step_seconds(root / "b", cache, data))
            first["compiled before, data too"].append(first_step_seconds(root / "c", cache, data))
    found |= {f"first step of the quickstart, {name}": times for name, times in first.items()}
    rows = [(name, page.spread(times, 1)) for name, times in found.items()]
    text = "## Start-up\n\nFrom the command to the help text, and to the end of the first step of the quickstart "
    text += "(`python benchmarks/startup.py --write`, which says what each line means).\n\n"
    text += (
        page.table(("command", "seconds"), rows)
        + f"\n\n{page.machine('jax')}; {args.rounds} round{'s' * (args.rounds > 1)}."
    )
    print(text)
    if args.write:
        page.write_section("startup", text)


if __name__ == "__main__":
    main()
