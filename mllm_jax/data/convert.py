"""Known data sets to LLaVA-format JSON, an image folder and evaluation files.

Every converter writes a new folder::

    OUT/train.json      LLaVA-format training data (see `llava_json`)
    OUT/test.json       a list of questions with their answers (or captions)
    OUT/images/...      all image paths are relative to this folder

To use data of your own, write these two files with a few lines of Python; no class and no registration is
needed. Training data::

    question = "<image>\\nWhat is shown?\\nAnswer the question using a single word or phrase."
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Bus"}]
    samples = [{"id": "a-1", "image": "a.jpg", "conversations": turns}]
    json.dump(samples, open("train.json", "w"))

with one `<image>` per image in the human turns, and several questions about one image as further turns of
one conversation (cheaper: the image is encoded once). Run `mllm-jax validate --json train.json --images
DIR` before training. Evaluation questions for the benchmark `vqa`::

    {"question_id": "q1", "image": "b.jpg", "question": "What is shown?", "answer": "bus", "ability": "nouns"}

without the closing instruction line, which the evaluation adds; `ability` is optional and gives a score of
its own. For another data set write a function like the ones below and add a row to `CONVERTERS`.
"""

import collections
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mllm_jax import files, limits
from mllm_jax.data.images import ImageError, decode_image
from mllm_jax.data.llava_json import load_entries, read_records
from mllm_jax.data.reading import DataError, is_safe_name, read_image_file
from mllm_jax.mini.world.questions import OPEN_SUFFIX

_ALWAYS_UNPACKED = 1 << 26  # bytes, whatever the size of the archive

Json = Any
Turns = list[tuple[str, str]]


def easy_vqa(source: Path, out: Path, max_turns: int | None = None) -> dict[str, int]:
    """easy-VQA: simple shapes, questions with 13 answers.

    Reads `{train,test}_questions.json` (question, answer, image_id) and `{train,test}_images.zip` (`ID.png`).
    The training questions of an image become one conversation of several turns.

    Args:
      source: folder with these files.
      out: folder to fill.
      max_turns: questions per conversation at most; more make several samples. None for no limit.
    """
    names_of: dict[str, dict[str, None]] = {"train": {}, "test": {}}  # dicts keep the order of first mention
    turns: dict[str, Turns] = collections.defaultdict(list)
    test = []
    for split, names in names_of.items():
        path = source / f"{split}_questions.json"
        for index, row in enumerate(load_entries(path)):
            question, answer = _text(row, "question", path, index), _text(row, "answer", path, index)
            name = f"{_get(row, 'image_id', path, index)}.png"
            names[name] = None
            if split == "train":
                turns[name].append((f"{question}\n{OPEN_SUFFIX}", answer))
            else:
                test.append(
                    {
                        "question_id": f"test-{index}",
                        "image": f"test/{name}",
                        "question": question,
                        "answer": answer,
                        "ability": _easy_vqa_ability(answer),
                    }
                )
        _unpack(source / f"{split}_images.zip", names, out / "images" / split)
    train = []
    for name, pairs in turns.items():
        size = max_turns or len(pairs)
        for start in range(0, len(pairs), size):
            part = f"-{start // size}" if size < len(pairs) else ""
            sample_id = f"train-{PurePosixPath(name).stem}{part}"
            train.append(conversation(sample_id, f"train/{name}", pairs[start : start + size]))
    return _write(out, train, test)


def _easy_vqa_ability(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes_no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "color"


def coco_cc(source: Path, out: Path) -> dict[str, int]:
    """Photographs with five captions each: stage-1 data from the train split, references from the rest.

    Reads `annotations.json` (image_id, file, split "train" or "eval", captions) and the JPEGs beside it. Each
    caption is a training sample; `test.json` holds one row per image, with the list of its captions.
    """
    path = source / "annotations.json"
    train, test = [], []
    for index, row in enumerate(load_entries(path)):
        image_id, file = _get(row, "image_id", path, index), _text(row, "file", path, index)
        captions = _get(row, "captions", path, index)
        if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
            raise DataError(f"{path}: entry #{index}: 'captions' must be a non-empty list of strings")
        split = _text(row, "split", path, index)
        if split not in ("train", "eval"):
            raise DataError(f"{path}: entry #{index}: split {split!r} is neither 'train' nor 'eval'")
        name = PurePosixPath(file).name
        target = out / "images" / name
        if target.exists():
            raise DataError(f"{path}: entry #{index}: two images are called {name!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        data = read_image_file(source, file, str(image_id))
        _check_image(data, f"{source / file}")
        target.write_bytes(data)
        question = "Describe the image briefly."
        if split == "train":
            train += [
                conversation(f"{image_id}-{number}", name, [(question, " ".join(caption.split()))])
                for number, caption in enumerate(captions)
            ]
        else:
            references = [" ".join(caption.split()) for caption in captions]
            row = {"question_id": str(image_id), "image": name, "question": question, "captions": references}
            test.append(row)
    return _write(out, train, test)


def nlvr(source: Path, out: Path) -> dict[str, int]:
    """NLVR: drawings of blocks, each with a sentence that is true or false about it.

    Reads `{train,eval}.jsonl` (identifier, file, sentence, label "true" or "false") and
    `{train,eval}_images.zip`.
    """
    train, test = [], []
    for split in ("train", "eval"):
        path = source / f"{split}.jsonl"
        names: dict[str, None] = {}
        for index, row in enumerate(load_entries(path)):
            name, label = _text(row, "file", path, index), _text(row, "label", path, index)
            identifier, sentence = _text(row, "identifier", path, index), _text(row, "sentence", path, index)
            names[name] = None
            question = f'Is this sentence about the image true or false? "{sentence}"'
            folder = "train" if split == "train" else "test"
            if split == "train":
                pairs = [(f"{question}\n{OPEN_SUFFIX}", label)]
                train.append(conversation(f"train-{identifier}", f"train/{name}", pairs))
            else:
                row = {"question_id": f"test-{identifier}", "image": f"test/{name}"}
                test.append(row | {"question": question, "answer": label})
        _unpack(source / f"{split}_images.zip", names, out / "images" / folder)
    return _write(out, train, test)


Converter = Callable[..., dict[str, int]]
CONVERTERS: dict[str, Converter] = {"coco_cc": coco_cc, "easy_vqa": easy_vqa, "nlvr": nlvr}
SEVERAL_TURNS = ("easy_vqa",)  # converters that take `max_turns`


def convert(name: str, source: str | Path, out: str | Path, max_turns: int | None = None) -> dict[str, int]:
    """Converts a known data set into a new folder, which appears only once it is complete.

    Args:
      name: a key of `CONVERTERS`.
      source: the folder of the data set.
      out: the folder to make; must not exist, or be empty.
      max_turns: questions per conversation at most, for data sets with several questions per image.

    Returns:
      How many of what were written.

    Raises:
      DataError: for missing or damaged source files, and for an output folder in use.
    """
    source, out = Path(source), Path(out)
    if max_turns is not None and max_turns < 1:
        raise DataError(f"max_turns {max_turns}: a conversation has at least one turn")
    if max_turns is not None and name not in SEVERAL_TURNS:
        raise DataError(f"max_turns: the conversations of {name} have one question each")
    if not source.is_dir():
        raise DataError(f"{source}: no such folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists already; choose another folder, nothing is overwritten")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-incomplete-", dir=out.parent))
    try:
        options = {} if max_turns is None else {"max_turns": max_turns}
        counts = CONVERTERS[name](source, part, **options)
        read_records(part / "train.json", part / "images")  # what is handed out is sound
        part.chmod(0o755)
        os.replace(part, out)
    except BaseException:
        shutil.rmtree(part)
        raise
    return counts


def conversation(sample_id: str, image: str, pairs: Turns) -> dict[str, Json]:
    """A LLaVA-format sample from (question, answer) pairs about one image, the image in front."""
    turns = []
    for index, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": question if index else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": sample_id, "image": image, "conversations": turns}


def _write(out: Path, train: list[Json], test: list[Json]) -> dict[str, int]:
    for name, rows in (("train.json", train), ("test.json", test)):
        files.write_json(out / name, rows)
    return {
        "training samples": len(train),
        "training answers": sum(len(sample["conversations"]) // 2 for sample in train),
        "test rows": len(test),
        "images": sum(path.is_file() for path in (out / "images").rglob("*")),
    }


def _unpack(archive: Path, names: dict[str, None], target: Path) -> None:
    """Writes the named images of a zip archive into a folder; other members are left alone."""
    target.mkdir(parents=True)
    try:
        with zipfile.ZipFile(archive) as file:
            members = {info.filename: info for info in file.infolist()}
            for name in members:
                if not is_safe_name(name) or ":" in name:
                    raise DataError(
                        f"{archive}: unsafe file name {name!r}; it would be written outside of the folder"
                    )
            for name, data in _read_members(file, members, names, archive):
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    except FileNotFoundError:
        raise DataError(f"{archive}: no such file") from None
    except limits.LimitError as error:
        raise DataError(str(error)) from None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise DataError(f"{archive}: damaged or unsupported zip archive: {error}") from None


def _read_members(
    file: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], names: dict[str, None], archive: Path
) -> Iterator[tuple[str, bytes]]:
    """The named members; all are images, none is a link, and together they stay within the limits of archives."""
    packed, unpacked = archive.stat().st_size, 0
    for name in names:
        if name not in members or members[name].is_dir():
            raise DataError(f"{archive}: does not hold {name!r}, which the questions name")
        if stat.S_ISLNK(members[name].external_attr >> 16):
            raise DataError(f"{archive}: {name!r} is a symbolic link, which may lead out of the folder")
        # The declared size may be a lie: no more than that is read, and zipfile checks the sum.
        size = members[name].file_size
        unpacked += size
        limits.check("MAX_IMAGE_FILE_BYTES", size, f"{archive}: {name!r}")
        limits.check("MAX_UNPACKED_BYTES", unpacked, archive)
        if unpacked > _ALWAYS_UNPACKED:
            limits.check("MAX_ARCHIVE_RATIO", -(-unpacked // max(packed, 1)), archive)
        with file.open(members[name]) as member:
            data = member.read(size)
        _check_image(data, f"{archive}: {name!r}")
        yield name, data


def _check_image(data: bytes, source: str) -> None:
    """What is handed on is an image, whatever its name says.

    Raises:
      DataError: it is none.
    """
    try:
        decode_image(data, source=source)
    except ImageError as error:
        raise DataError(str(error)) from None


def _get(row: Json, key: str, path: Path, index: int) -> Json:
    if not isinstance(row, dict) or key not in row:
        raise DataError(f"{path}: entry #{index} has no {key!r}")
    return row[key]


def _text(row: Json, key: str, path: Path, index: int) -> str:
    value = _get(row, key, path, index)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{path}: entry #{index}: {key!r} must be a non-empty string, found {value!r}")
    return value.strip()
