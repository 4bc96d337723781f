"""Writes mini-world data sets: training data in LLaVA's format and the `mini` benchmark.

A data set consists of `root/NAME.json`, images under `root/images/` and, written last,
`root/NAME.manifest.json` with the parameters it was made from. Whoever asks for the same parameters again
gets the finished files.
"""

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_jax import files
from mllm_jax.data.reading import DataError, read_json
from mllm_jax.data.threads import map_in_order
from mllm_jax.data.worker_processes import worker_processes
from mllm_jax.mini.world.captions import long_caption
from mllm_jax.mini.world.questions import ABILITIES, Question, make_questions
from mllm_jax.mini.world.render import LOOK_VERSION, render
from mllm_jax.mini.world.sampler import sample_scene
from mllm_jax.mini.world.scene import SPLITS
from mllm_jax.mini.world.text import ask, caption_sample, pick_questions, text_sample

STAGES = ("caption", "instruct")
BENCHMARK = "mini"
QUESTIONS_PER_IMAGE = 6
TEXT_ONLY = 0.1  # share of samples without an image in the stage "instruct"
_PROGRESS_EVERY = 500
IN_PROCESSES = 500  # images from which on several processes draw them: each takes a second to start
_MOST_PROCESSES = 8
_CHUNK = 50  # samples that a process draws at once


class DatasetMismatchError(ValueError):
    """A data set made from other parameters lies where one is to be written."""


def _fingerprint(split: str) -> str:
    """A digest of a few scenes and their texts: it changes when the generator does."""
    digest = hashlib.sha256()
    for index in range(8):
        scene = sample_scene(0, index, split)
        texts = [long_caption(scene), *(q.text for q in make_questions(scene, np.random.default_rng(index)))]
        digest.update(json.dumps([scene.to_json(), texts], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _is_complete(root: Path, name: str, parameters: dict[str, Any]) -> bool:
    """Whether the data set lies there already.

    Raises:
        DatasetMismatchError: if it was made from other parameters, or is of unknown origin.
    """
    manifest, data = root / f"{name}.manifest.json", root / f"{name}.json"
    if not manifest.exists():
        if data.exists():
            raise DatasetMismatchError(
                f"{data} exists without {manifest.name}, so it is not known what made it; "
                "move it away or choose another folder"
            )
        return False
    try:
        found = read_json(manifest)
    except DataError as error:
        raise DatasetMismatchError(f"{error}; delete {root} and start again") from error
    found = found if isinstance(found, dict) else {}
    different = [key for key in sorted({*found, *parameters}) if found.get(key) != parameters.get(key)]
    if different:
        listed = ", ".join(f"{k} is {found.get(k)!r}, asked for {parameters.get(k)!r}" for k in different)
        raise DatasetMismatchError(
            f"{data} was made from other parameters ({listed}); delete {root} or choose another folder"
        )
    if not data.exists():
        raise DatasetMismatchError(
            f"{manifest} exists but {data.name} is gone; delete {root} and start again"
        )
    return True


def write_dataset(
    root: str | os.PathLike[str],
    name: str,
    parameters: dict[str, Any],
    records: Callable[[Path, bool], Iterable[dict[str, Any]]],
    total: int,
    progress: bool,
    media: str = "images",
) -> Path:
    """Writes images (or videos), then the list of records, then the manifest; returns the list's path.

    Args:
        media: the folder of the images.
        records: writes the images into a folder and gives their records in order. It is told whether to keep those
            that are there: a call with the same parameters was stopped.
    """
    root = Path(root)
    path, begun = root / f"{name}.json", root / f".{name}.begun"
    if _is_complete(root, name, parameters):
        return path
    (root / media).mkdir(parents=True, exist_ok=True)
    text = json.dumps(parameters, indent=1)
    keep = begun.is_file() and begun.read_text(encoding="utf-8") == text
    if not keep:
        files.write_text(begun, text)
    rows = []
    for record in records(root / media, keep):
        rows.append(record)
        if progress and len(rows) % _PROGRESS_EVERY == 0:
            print(f"mini world: {name} {len(rows)}/{total}", flush=True)
    files.write_text(path, json.dumps(rows, indent=1))
    files.write_text(root / f"{name}.manifest.json", text)
    begun.unlink(missing_ok=True)  # another call may have finished the same
    return path


def _saved(
    folder: Path, record: dict[str, Any], draw: Callable[[], Image.Image] | None, keep: bool
) -> dict[str, Any]:
    """The record, its image drawn and written, unless it is there and kept."""
    if draw is not None and not (keep and (folder / record["image"]).is_file()):
        with files.replacing(folder / record["image"], sync=False) as file:
            draw().save(file, "PNG", compress_level=1)
    return record


def _turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        turn
        for human, gpt in pairs
        for turn in ({"from": "human", "value": human}, {"from": "gpt", "value": gpt})
    ]


def _framed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image somewhere on a plain canvas that is up to 2.2 times as wide or as high."""
    long = round(image.width * rng.uniform(1, 2.2))
    wide, place = rng.random() < 0.5, int(rng.integers(long - image.width + 1))
    color = tuple(int(value) for value in rng.integers(0, 256, 3))
    canvas = Image.new("RGB", (long, image.height) if wide else (image.width, long), color)
    canvas.paste(image, (place, 0) if wide else (0, place))
    return canvas


def _training_record(
    split: str, stage: str, framed: bool, seed: int, index: int
) -> tuple[dict[str, Any], Callable[[], Image.Image] | None]:
    """One training sample in LLaVA's format and what draws its image, or None for a text-only one."""
    name = f"{split}_{stage}_{index:06d}"
    rng = np.random.default_rng(np.random.SeedSequence([0xDA7A, SPLITS.index(split), seed, index]))
    if stage == "instruct" and rng.random() < TEXT_ONLY:
        return {"id": name, "conversations": _turns(text_sample(seed, index, split))}, None
    scene = sample_scene(seed, index, split)
    if stage == "caption":
        pairs = [caption_sample(scene, rng)]
    else:
        pairs = [ask(q, rng) for q in pick_questions(scene, rng, QUESTIONS_PER_IMAGE)]
    pairs[0] = ("<image>\n" + pairs[0][0], pairs[0][1])

    def draw() -> Image.Image:
        return _framed(render(scene), rng) if framed else render(scene)

    return {"id": name, "image": f"{name}.png", "conversations": _turns(pairs)}, draw


def draw_samples(
    folder: Path, keep: bool, split: str, stage: str, framed: bool, seed: int, numbers: Iterable[int]
) -> list[dict[str, Any]]:
    """The records of some training samples, whose images are written into a folder; `keep` those that are there."""
    return [_saved(folder, *_training_record(split, stage, framed, seed, index), keep) for index in numbers]


def write_split(
    root: str | os.PathLike[str],
    split: str,
    n: int,
    stage: str,
    seed: int,
    progress: bool = True,
    framed: bool = False,
    workers: int | None = None,
) -> Path:
    """Writes a training data set in LLaVA's format, unless it is there already; a call that was stopped is continued.

    Args:
        root: folder; gets `SPLIT.json` and `images/*.png` (112 pixels a side).
        split: one of `SPLITS` but the benchmark's own "mini".
        n: number of samples.
        stage: "caption" (one caption turn per image) or "instruct" (about six questions per image, open
            and multiple choice, and one text-only sample in ten).
        seed: which world.
        progress: print a line now and then.
        framed: images are of many aspect ratios: each scene stands somewhere on a plain canvas.
        workers: processes that draw; None for one per core. The result is the same for any number.

    Returns:
        Path of the JSON list; its image names are relative to `root/images`.

    Raises:
        ValueError: for an unknown or reserved split, an unknown stage or n < 1.
        DatasetMismatchError: if `root` holds this split made from other parameters.
    """
    if split not in SPLITS or split == BENCHMARK:
        usable = ", ".join(s for s in SPLITS if s != BENCHMARK)
        raise ValueError(f"cannot write training data of split {split!r}; one of {usable}")
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; one of {', '.join(STAGES)}")
    if n < 1:
        raise ValueError(f"n is {n}; a data set needs at least one sample")
    parameters = {
        "split": split, "n": n, "stage": stage, "seed": seed,
        "generator": _fingerprint(split), "look": LOOK_VERSION, **({"framed": True} if framed else {}),
    }  # fmt: skip
    if workers is None:
        workers = min(_MOST_PROCESSES, os.cpu_count() or 1)
    workers = workers if n >= IN_PROCESSES else 1

    def records(folder: Path, keep: bool) -> Iterator[dict[str, Any]]:
        chunks = (range(first, min(first + _CHUNK, n)) for first in range(0, n, _CHUNK))
        what = (folder, keep, split, stage, framed, seed)
        if workers == 1:
            for chunk in chunks:
                yield from draw_samples(*what, chunk)
            return
        with worker_processes(f"{__name__}:draw_samples", workers, *what) as draw:
            for _, drawn in map_in_order(draw, chunks, workers, ahead=2):
                yield from drawn

    return write_dataset(root, split, parameters, records, n, progress)


def benchmark_questions(n_per_ability: int, seed: int) -> list[tuple[int, Question]]:
    """The benchmark's (scene index, question) pairs, `n_per_ability` for each ability.

    Candidates come from as many scenes as it takes. The forms of an ability get shares that grow with the
    square root of their number of answers, and each form gives its rarest answer next, so that answers are as
    even as they can be. An ability asks at most one question about a scene.

    Raises:
        ValueError: if n_per_ability < 1.
    """
    if n_per_ability < 1:
        raise ValueError(f"n_per_ability is {n_per_ability}; a benchmark needs at least one question")
    pools: dict[str, list[tuple[int, Question]]] = {ability: [] for ability in ABILITIES}
    index = 0
    while any(len(pool) < 10 * n_per_ability for pool in pools.values()):
        rng = np.random.default_rng(np.random.SeedSequence([0xBE2C, seed, index]))
        for question in make_questions(sample_scene(seed, index, BENCHMARK), rng):
            if len(pools[question.ability]) < 40 * n_per_ability:
                pools[question.ability].append((index, question))
        index += 1
    return [pair for pool in pools.values() for pair in _balanced(pool, n_per_ability)]


def _balanced(pool: list[tuple[int, Question]], n: int) -> list[tuple[int, Question]]:
    """`n` of the candidates, as `benchmark_questions` describes."""
    left: dict[str, dict[str, list[tuple[int, Question]]]] = {}
    for pair in pool:
        left.setdefault(pair[1].form, {}).setdefault(pair[1].answer, []).append(pair)
    share = {form: len(answers) ** 0.5 for form, answers in left.items()}
    of_form: Counter[str] = Counter()
    of_answer: Counter[str] = Counter()
    of_both: Counter[tuple[str, str]] = Counter()
    seen: set[int] = set()
    chosen: list[tuple[int, Question]] = []
    while len(chosen) < n:
        forms = sorted(form for form, answers in left.items() if any(answers.values()))
        if not forms:
            raise ValueError(f"only {len(chosen)} of {n} questions could be found in {len(pool)} candidates")
        _, form = min((of_form[f] / share[f], f) for f in forms)
        answers = [a for a, queue in left[form].items() if queue]
        _, _, answer = min((of_both[form, a], of_answer[a], a) for a in answers)
        index, question = left[form][answer].pop(0)
        if index in seen:
            continue
        seen.add(index)
        of_form[form] += 1
        of_answer[answer] += 1
        of_both[form, answer] += 1
        chosen.append((index, question))
    return chosen


def _scene_image(seed: int, index: int, framed: bool) -> Image.Image:
    image = render(sample_scene(seed, index, BENCHMARK))
    if not framed:
        return image
    return _framed(image, np.random.default_rng(np.random.SeedSequence([0xF3A3, seed, index])))


def write_benchmark(
    root: str | os.PathLike[str],
    n_per_ability: int,
    seed: int,
    progress: bool = True,
    framed: bool = False,
) -> Path:
    """Writes the held-out `mini` benchmark, unless it is there already.

    Args:
        root: folder; gets `mini.json` and `images/*.png`.
        n_per_ability: questions for each of the twelve abilities.
        seed: which world.
        progress: print a line now and then.
        framed: as in `write_split`; the questions are the same.

    Returns:
        Path of `mini.json`: a list of {question_id, image, ability, group, question, options, answer}, one
        row per question; the rotations of circular evaluation are made when evaluating.

    Raises:
        DatasetMismatchError: if `root` holds a benchmark made from other parameters.
    """

    def records(folder: Path, keep: bool) -> Iterator[dict[str, Any]]:
        drawn: set[int] = set()
        for number, (index, question) in enumerate(benchmark_questions(n_per_ability, seed)):
            yield _saved(
                folder,
                {
                    "question_id": f"{question.ability}_{number:05d}",
                    "image": f"{BENCHMARK}_{index:06d}.png",
                    "ability": question.ability,
                    "group": ABILITIES[question.ability].group,
                    "question": question.text,
                    "options": list(question.options),
                    "answer": question.answer,
                },
                None if index in drawn else functools.partial(_scene_image, seed, index, framed),
                keep,
            )
            drawn.add(index)

    parameters = {
        "n_per_ability": n_per_ability, "seed": seed,
        "generator": _fingerprint(BENCHMARK), "look": LOOK_VERSION, **({"framed": True} if framed else {}),
    }  # fmt: skip
    return write_dataset(root, BENCHMARK, parameters, records, n_per_ability * len(ABILITIES), progress)
