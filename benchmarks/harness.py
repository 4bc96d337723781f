"""Whether lmms-eval gets the same answers from a model as eval.py.

    python benchmarks/harness.py --run=runs/quickstart --out=runs/harness

Draws questions of the mini world (multiple choice and open ones; videos, where PyAV is installed), answers them with
eval.py, writes tasks of lmms-eval about the same files, runs the installed harness on them, once as a chat model and
once as a simple one, and compares every answer and likelihood. Exit code 1: one differs. Needs
`pip install 'mllm-jax[lmms-eval]'`; nothing is fetched.
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
TASKS = ("generate", "choice", "likelihood", "rounds", "pair")

UTILS = """
import os, pathlib, sys
from PIL import Image

def visuals(doc, kwargs=None):
    return [Image.open(name).convert("RGB") for name in doc["images"]] + list(doc["videos"])

def text(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return doc["prompt"]
    if round_idx == len(doc["later"]) + 1:
        return None, None, True, previous_output, None
    return visuals(doc), doc["later"][round_idx - 1], False, previous_output, None

def target(doc):
    return doc["answer"]

def index(doc):
    return doc["options"].index(doc["answer"])

def options(doc):
    return doc["options"]

def generated(doc, results):
    return {"right": float(results[0].strip() == doc["answer"])}

def rounds(doc, results):
    return {"right": float(results[0][-1].strip() == doc["answer"])}

def likelihood(doc, results):
    (value, greedy), = results
    return {"perplexity": value, "right": float(greedy)}
"""

COMMON = """
task: mllm_jax_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
doc_to_visual: !function utils.visuals
doc_to_text: !function utils.text
"""
RIGHT = """
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
GENERATION = f"generation_kwargs:\n  max_new_tokens: 8\n{RIGHT}"
KINDS = {
    "generate": f"output_type: generate_until\ndoc_to_target: !function utils.target\n"
    f"process_results: !function utils.generated\n{GENERATION}",
    "rounds": f"output_type: generate_until_multi_round\ndoc_to_target: !function utils.target\n"
    f"process_results: !function utils.rounds\n{GENERATION}",
    "choice": "output_type: multiple_choice\ndoc_to_target: !function utils.index\n"
    "doc_to_choice: !function utils.options\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n",
    "likelihood": "output_type: loglikelihood\ndoc_to_target: !function utils.target\n"
    f"process_results: !function utils.likelihood\n{RIGHT}  - metric: perplexity\n    aggregation: perplexity\n"
    "    higher_is_better: false\n",
}
KINDS["pair"] = KINDS["video"] = KINDS["generate"]


def main() -> int:
    """Compares; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="work directory of a run of train.py")
    parser.add_argument(
        "--out", required=True, help="folder for questions, answers and what the harness writes"
    )
    parser.add_argument("--count", type=int, default=4, help="questions per ability (default 4)")
    parser.add_argument("--batch-size", type=int, default=16, help="of the harness (default 16)")
    args = parser.parse_args()
    out = pathlib.Path(args.out).absolute()
    documents = {name: rows for name, rows in expected(args.run, out, args.count).items() if rows}
    write_tasks(out / "tasks", documents)
    different = 0
    print("| task | class | answers | same as eval.py | largest difference of log-likelihoods | score |")
    print("|---|---|---|---|---|---|")
    for chat in (True, False):
        asked = [name for name in documents if not chat or name not in ("choice", "likelihood")]
        folder = out / ("chat" if chat else "simple")
        run_harness(args.run, asked, out / "tasks", folder, args.batch_size, chat)
        for name in asked:
            count, same, furthest, score = compare(documents[name], folder, name)
            different += count - same
            apart = "" if furthest is None else f"{furthest:.1e}"
            print(f"| {name} | {folder.name} | {count} | {same} | {apart} | {score} |")
    return 1 if different else 0


def expected(run: str, out: pathlib.Path, count: int) -> dict[str, list[dict[str, Any]]]:
    """The documents of each task, with what eval.py (or, of several images, the Python API) answers as `expected`."""
    from mllm_jax.mini.world import dataset, videos

    file = dataset.write_benchmark(out / "mini", count, 0, progress=False)
    answered = evaluate(run, "mini", file, out / "eval_mini")
    images = file.parent / "images"

    def document(row: dict[str, Any], **fields: Any) -> dict[str, Any]:
        named = {
            "name": f"{row['question_id']}/{row['rotation']}",
            "prompt": row["prompt"],
            "answer": row["answer"],
        }
        shown = (
            {"images": [str(images / row["image"])], "videos": []} if "image" in row else fields.pop("shown")
        )
        return {**named, **shown, "options": row["options"], "later": [], "expected": row["text"], **fields}

    choices, opened = (
        answered["predictions"],
        {row["question_id"]: row for row in answered["predictions_open"]},
    )
    first = [row for row in choices if row["rotation"] == 0]
    likely = {(row["question_id"], row["rotation"]): row["log_likelihoods"] for row in answered["likelihood"]}
    scored = [(row, likely[row["question_id"], row["rotation"]]) for row in first]
    found = {
        "generate": [document(row) for row in (*choices, *opened.values())],
        "choice": [document(row, expected=values) for row, values in scored],
        "likelihood": [
            document(row, expected=[values[row["options"].index(row["answer"])]]) for row, values in scored
        ],
        "rounds": [
            document(row, later=[last["prompt"]], expected=[row["text"], last["text"]])
            for row in first
            for last in [opened[row["question_id"]]]
        ],
        "pair": pairs(run, [document(row) for row in opened.values()]),
        "video": [],
    }
    if importlib.util.find_spec("av"):
        file = videos.write_benchmark(out / "video", 2 * count, 0, progress=False)
        answered = evaluate(run, "mini_video", file, out / "eval_video")
        for row in answered["predictions"]:
            shown = {"images": [], "videos": [str(file.parent / "videos" / row["video"])]}
            found["video"].append(document(row, shown=shown))
    return found


def evaluate(run: str, kind: str, file: pathlib.Path, out: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """eval.py's answers, by the name of their file."""
    command = [
        sys.executable,
        str(ROOT / "eval.py"),
        f"--workdir={run}",
        f"--benchmark={kind}",
        f"--path={file}",
    ]
    if kind == "mini":
        command.append(f"--images={file.parent / 'images'}")
    command += [f"--out={out}", "--noblind", "--likelihood", "--max_new_tokens=8"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    files = (out / "eval" / kind).glob("*.jsonl")
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in files}


def pairs(run: str, documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring documents as questions about two images, answered through the Python API."""
    import mllm_jax

    model = mllm_jax.load(run)
    found = [
        {**a, "images": [*b["images"], *a["images"]], "prompt": f"<image>\n<image>\n{a['prompt']}"}
        for a, b in zip(documents[::2], documents[1::2], strict=False)
    ]
    answers = model.generate(
        [each["images"] for each in found], [each["prompt"] for each in found], max_new_tokens=8
    )
    return [{**each, "expected": answer} for each, answer in zip(found, answers, strict=True)]


def write_tasks(folder: pathlib.Path, documents: dict[str, list[dict[str, Any]]]) -> None:
    """One YAML file and one JSON file per task, and the functions that they name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "utils.py").write_text(UTILS)
    for name, rows in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
        (folder / f"{name}.yaml").write_text(
            COMMON.format(name=name, file=folder / f"{name}.json") + KINDS[name]
        )


def run_harness(
    run: str, names: list[str], tasks: pathlib.Path, out: pathlib.Path, size: int, chat: bool
) -> None:
    """Runs lmms-eval as a user does."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "mllm_jax", "--model_args", f"path={run}"]
    command += ["--tasks", ",".join(f"mllm_jax_{name}" for name in names), "--include_path", str(tasks)]
    command += ["--batch_size", str(size), "--output_path", str(out), "--log_samples"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "cache")}
    subprocess.run(command + ["--force_simple"] * (not chat), check=True, stdout=sys.stderr, env=environment)


def compare(
    documents: list[dict[str, Any]], folder: pathlib.Path, name: str
) -> tuple[int, int, float | None, str]:
    """Answers, how many are the expected ones, how far likelihoods are apart at most, and the harness's scores."""
    files = sorted(folder.rglob(f"*_samples_mllm_jax_{name}.jsonl"))
    if not files:  # its exit code is 0 all the same
        sys.exit(f"lmms-eval wrote no answers of {name} below {folder}; its messages are above")
    file = files[-1]
    answers = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, file.read_text().splitlines())}
    (results,) = sorted(folder.rglob("*_results.json"))[-1:]
    scores = json.loads(results.read_text())["results"][f"mllm_jax_{name}"]
    said = ", ".join(
        f"{key.split(',')[0]} {value:.4f}"
        for key, value in scores.items()
        if isinstance(value, float) and "stderr" not in key
    )
    same, furthest = 0, None
    for number, document in enumerate(documents):
        found, wanted = answers[number], document["expected"]
        if name in ("choice", "likelihood"):  # written as strings, and a list of one as its item
            sign, pairs = (-1, found) if name == "choice" else (1, [found])
            apart = max(abs(sign * float(got) - want) for (got, _), want in zip(pairs, wanted, strict=True))
            furthest = max(furthest or 0.0, apart)
            same += math.isclose(apart, 0, abs_tol=1e-3)
        else:
            same += found == wanted
    return len(documents), same, furthest, said


if __name__ == "__main__":
    sys.exit(main())
