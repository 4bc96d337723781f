"""Files in the formats that benchmarks' servers and official scripts take, made from stored answers.

`write_submission` reads `predictions.jsonl` and writes into `submission/` beside it. A new format is one function and
one row of `SUBMISSIONS`.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_jax import files
from mllm_jax.escape import spreadsheet
from mllm_jax.evaluation.benchmarks import gqa
from mllm_jax.evaluation.runners import Published, Runner
from mllm_jax.evaluation.runners.base import BenchmarkError
from mllm_jax.evaluation.runners.tables import read_rows
from mllm_jax.evaluation.runners.yes_no import write_task_files
from mllm_jax.evaluation.store import AnswerFile
from mllm_jax.evaluation.table_files import is_absent
from mllm_jax.evaluation.vqa_normalize import m4c_normalize

Row = Mapping[str, Any]
_CELL = 32_767  # characters of a cell of a spreadsheet
_PREDICTION_COLUMN = 6  # where LLaVA's conversion puts it, counted from 0


@dataclasses.dataclass(frozen=True)
class Submission:
    """One format.

    Attributes:
      name: of the file (or folder); `{kind}` is the benchmark's.
      write: (benchmark, stored rows, path) -> writes it.
      to: who takes it.
    """

    name: str
    write: Callable[[Published, Sequence[Row], Path], None]
    to: str


def write_submission(benchmark: Runner, directory: Path) -> list[str]:
    """Writes a benchmark's upload into `DIRECTORY/submission/`, over an earlier one.

    Returns:
      What was written, or why not, in lines for people; nothing for a benchmark without a format.
    """
    submission = SUBMISSIONS.get(benchmark.kind)
    if submission is None or not isinstance(benchmark, Published):
        return []
    found = AnswerFile(directory / "predictions.jsonl", writable=False).rows
    missing = [question.key for question in benchmark.questions if question.key not in found]
    if missing:
        return [f"no submission: {len(missing)} questions are not answered, the first is {missing[0][0]}"]
    rows = [found[question.key] for question in benchmark.questions]
    target = directory / "submission" / submission.name.format(kind=benchmark.kind)
    target.parent.mkdir(exist_ok=True)
    try:
        submission.write(benchmark, rows, target)
    except BenchmarkError as error:
        return [f"no submission: {error}"]
    return [f"submission for {submission.to}: {target}"]


def _dump(value: Any, path: Path) -> None:
    files.write_text(path, json.dumps(value, ensure_ascii=False))


def _dump_lines(values: Iterable[Any], path: Path) -> None:
    lines = (json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    files.write_text(path, "".join(lines))


def _mmbench(benchmark: Published, rows: Sequence[Row], path: Path) -> None:
    """The TSV's columns without picture, hint and categories, and `prediction` as the seventh column."""
    try:
        from openpyxl import Workbook
    except ImportError as error:
        raise BenchmarkError(
            "the XLSX file needs openpyxl: `pip install openpyxl`, then run the same command"
        ) from error

    ordered = sorted(rows, key=lambda row: row["position"])
    header = list(ordered[0]["columns"])
    header.insert(_PREDICTION_COLUMN, "prediction")
    book = Workbook(write_only=False)
    sheet = book.active
    for column, name in enumerate(header, 1):
        _text_cell(sheet, 1, column, name)
    for number, row in enumerate(ordered, 2):
        cells = {**row["columns"], "prediction": row["text"]}
        for column, name in enumerate(header, 1):
            value = cells[name]
            if is_absent(value) and name != "prediction":
                continue  # an empty cell, as in a table that pandas wrote
            if name == "index":
                sheet.cell(number, column, int(value))
                continue
            value = str(value)
            if len(value) > _CELL:
                raise BenchmarkError(
                    f"{name!r} of index {row['columns']['index']} has {len(value)} characters; a cell "
                    f"holds {_CELL}"
                )
            _text_cell(sheet, number, column, value)
    with files.replacing(path) as file:
        book.save(file)


def _text_cell(sheet: Any, row: int, column: int, text: str) -> None:
    cell = sheet.cell(row, column, spreadsheet(text))
    cell.data_type = "s"  # text that begins with "=" is no formula


def _vqav2(benchmark: Published, rows: Sequence[Row], path: Path) -> None:
    """Every question of test2015 (of the asked split where it is val), the empty answer where none was made."""
    said = {str(row["question_id"]): m4c_normalize(row["text"]) for row in rows}
    ids: list[Any] = [row["question_id"] for row in rows]
    if benchmark.values["split"] != "val2014":
        everything = benchmark.paths("upload_ids")
        if not everything:
            raise BenchmarkError(
                f"{benchmark.folder / benchmark.files['upload_ids'].names[0]} is missing: an upload needs every id of "
                f"test2015; download it from {benchmark.files['upload_ids'].where}, then run the same command"
            )
        ids = [row["question_id"] for row in read_rows(everything[0], benchmark.pictures, "questions")]
        if unknown := said.keys() - {str(i) for i in ids}:
            raise BenchmarkError(f"{everything[0]} does not hold question {sorted(unknown)[0]}")
    _dump([{"question_id": number, "answer": said.get(str(number), "")} for number in ids], path)


def _ok_vqa(benchmark: Published, rows: Sequence[Row], path: Path) -> None:
    _dump([{"question_id": row["question_id"], "answer": m4c_normalize(row["text"])} for row in rows], path)


def _vizwiz(benchmark: Published, rows: Sequence[Row], path: Path) -> None:
    _dump([{"image": row["image"], "answer": m4c_normalize(row["text"])} for row in rows], path)


def _gqa(benchmark: Published, rows: Sequence[Row], path: Path) -> None:
    _dump(
        [{"questionId": row["question_id"], "prediction": gqa.normalize(row["text"])} for row in rows], path
    )


def _seed_bench(benchmark: Published, rows: Sequence[Row], path: Path) -> None:
    _dump_lines(({"question_id": row["question_id"], "prediction": row["text"]} for row in rows), path)


def _mm_vet(benchmark: Published, rows: Sequence[Row], path: Path) -> None:
    _dump({f"v1_{row['question_id']}": row["text"] for row in rows}, path)


def _mathvista(benchmark: Published, rows: Sequence[Row], path: Path) -> None:
    """The official output file: problem id -> the problem with `query` and `response`."""
    _dump(
        {row["pid"]: {**row["truth"], "query": row["query"], "response": row["text"]} for row in rows}, path
    )


def _mme(benchmark: Published, rows: Sequence[Row], path: Path) -> None:
    write_task_files(path, [(dict(row), row["text"]) for row in rows])


def _captions(benchmark: Published, rows: Sequence[Row], path: Path) -> None:
    _dump([{"image_id": row["image_id"], "caption": row["text"]} for row in rows], path)


def _q_bench(benchmark: Published, rows: Sequence[Row], path: Path) -> None:
    _dump_lines(({**row["truth"], "response": row["text"]} for row in rows), path)


def _blink(benchmark: Published, rows: Sequence[Row], path: Path) -> None:
    _dump({row["id"]: row["prediction"] for row in rows}, path)


def _mmmu(benchmark: Published, rows: Sequence[Row], path: Path) -> None:
    """What `main_parse_and_eval.py` reads."""
    out = []
    for row in rows:
        letters = [chr(ord("A") + i) for i in range(len(row["options"]))]
        item = {"id": row["id"], "question_type": row["truth"]["question_type"], "answer": row["gold"]}
        item |= {"all_choices": letters, "index2ans": dict(zip(letters, row["options"], strict=True))}
        out.append(item | {"response": row["text"]})
    _dump(out, path)


def _mmmu_pro(benchmark: Published, rows: Sequence[Row], path: Path) -> None:
    _dump_lines(({**row["truth"], "response": row["text"]} for row in rows), path)


def _llava(benchmark: Published, rows: Sequence[Row], path: Path) -> None:
    """LLaVA's answer file."""
    keys = ("question_id", "prompt", "text")
    _dump_lines(({**{k: row[k] for k in keys}, "metadata": {}} for row in rows), path)


SUBMISSIONS: dict[str, Submission] = {
    "blink": Submission("{kind}.json", _blink, "BLINK's eval/evaluate.py"),
    "captions": Submission("captions_results.json", _captions, "the COCO caption tools"),
    "gqa": Submission("testdev_balanced_predictions.json", _gqa, "GQA's eval.py"),
    "llava_bench": Submission("answers.jsonl", _llava, "LLaVA's eval_gpt_review_bench.py"),
    "mathvista": Submission("output.json", _mathvista, "MathVista's extract_answer.py"),
    "mm_vet": Submission("mm_vet.json", _mm_vet, "MM-Vet's evaluator"),
    "mmbench": Submission("{kind}.xlsx", _mmbench, "https://mmbench.opencompass.org.cn/mmbench-submission"),
    "mmbench_cn": Submission(
        "{kind}.xlsx", _mmbench, "https://mmbench.opencompass.org.cn/mmbench-submission"
    ),
    "mme": Submission("mme", _mme, "MME's eval_tool (calculation.py)"),
    "mmmu": Submission("output.json", _mmmu, "MMMU's main_parse_and_eval.py"),
    "mmmu_pro": Submission("output.jsonl", _mmmu_pro, "MMMU-Pro's evaluate.py"),
    "mmmu_pro_vision": Submission("output.jsonl", _mmmu_pro, "MMMU-Pro's evaluate.py"),
    "ok_vqa": Submission("answers.json", _ok_vqa, "VQA's evaluation tools"),
    "q_bench": Submission("answers.jsonl", _q_bench, "Q-Bench's leaderboard"),
    "q_bench_zh": Submission("answers.jsonl", _q_bench, "Q-Bench's leaderboard"),
    "seed_bench": Submission("{kind}.jsonl", _seed_bench, "SEED-Bench's leaderboard"),
    "vizwiz": Submission("{kind}.json", _vizwiz, "https://eval.ai/web/challenges/challenge-page/1911"),
    "vqav2": Submission("{kind}.json", _vqav2, "https://eval.ai/web/challenges/challenge-page/830"),
}
