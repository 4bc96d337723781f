"""Images per second and memory of `mllm-jax prepare`, and how soon training on what it wrote takes its first step.

    python benchmarks/prepare.py --samples 20000 --workers=2
    python benchmarks/prepare.py --write             # puts the table into docs/performance.md

15 of 16 samples have an image of their own, 336 x 252 pixels. Everything that the verb does is counted: conversations
and images are checked, samples written and measured for packing. Memory is that of all processes together, pages that
they share counted once.
"""

import argparse
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import page
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
WORDS = "the a small red blue round thing stands left of near two three dogs cats table".split()


def draw(folder: pathlib.Path, samples: int) -> None:
    """Images, and conversations of one to three turns about them."""
    rng, records = np.random.default_rng(0), []
    (folder / "images").mkdir()
    for number in range(samples):
        turns = []
        for turn in range(1 + number % 3):
            mark = "<image>\n" if turn == 0 and number % 16 else ""
            asked, told = (" ".join(rng.choice(WORDS, count)) for count in (8, 6 + number % 17))
            turns += [{"from": "human", "value": f"{mark}{asked}?"}, {"from": "gpt", "value": f"{told}."}]
        record = {"id": f"{number}", "conversations": turns}
        if number % 16:
            record["image"] = f"{number}.jpg"
            pixels = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            pixels.resize((336, 252), Image.Resampling.BICUBIC).save(folder / "images" / record["image"])
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records))
    question = {"question_id": "q", "image": "1.jpg", "question": "what?", "answer": "red"}
    (folder / "test.json").write_text(json.dumps([question]))


def memory(group: int) -> int:
    """Bytes of all processes of a group."""
    total = 0
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except OSError:  # it has ended
            continue
    return total


def run(command: list[str], done: pathlib.Path | None = None) -> tuple[float, float, int]:
    """Runs a command to its end, or until `done` has contents; (seconds, processor seconds, most bytes)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    before, begin, most = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        while process.poll() is None and not (done and done.exists() and done.stat().st_size):
            most = max(most, memory(process.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - begin
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        elif process.returncode:
            said.seek(0)
            raise SystemExit(said.read())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, most


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[2000, 12000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rows = []
    for samples in args.samples:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            draw(folder, samples)
            source = "--config.stages.finetune.sources.main"
            recipe = ["--config=configs/own_data.py:finetune", f"--config.data.dir={folder}/data"]
            recipe += [f"{source}.json={folder}/train.json", f"{source}.images={folder}/images"]
            recipe += [f"--config.eval.benchmarks.main.{key}={folder}/{file}" for key, file in
                       (("path", "test.json"), ("images", "images"))]  # fmt: skip
            recipe += ["--config.stages.finetune.samples_per_row=8", "--config.data.image_slots=2"]
            prepare = [sys.executable, "-m", "mllm_jax", "prepare", *recipe, f"--workers={args.workers}"]
            seconds, processor, most = run(prepare)
            train = [sys.executable, "train.py", *recipe, "--config.data.prepared", f"--workdir={folder}/run"]
            first, of_first, _ = run(
                [*train, "--config.stages.finetune.log_every=1"], folder / "run" / "metrics.jsonl"
            )
            images = samples - (samples + 15) // 16
            rows.append(
                (
                    f"{samples:,} samples, {images:,} images",
                    f"{images / seconds:.0f}",
                    f"{images / processor:.0f}",
                    f"{most / 1e6:,.0f} MB",
                    f"{first:.1f} ({of_first:.0f} of processor time)",
                )
            )
    head = (
        "",
        "images/s",
        "images per second of processor time",
        "memory at most",
        "seconds to the first step",
    )
    text = "## Preparing data\n\n`mllm-jax prepare`, and training on what it wrote until its first step has ended "
    text += "(`python benchmarks/prepare.py`, which says what is counted).\n\n"
    text += f"{page.table(head, rows)}\n\n{args.workers} workers; {page.machine('jax', 'pillow')}."
    print(text)
    if args.write:
        page.write_section("prepare", text)


if __name__ == "__main__":
    main()
