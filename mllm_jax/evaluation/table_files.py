"""Rows from TSV, CSV and XLSX files (MMBench's questions and submissions), standard library only."""

from __future__ import annotations

import csv
import io
import re
import sys
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mllm_jax.evaluation.predictions import PredictionError, Problems, read_text

_MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_ABSENT = ("", "nan", "none", "null", "n/a", "na")  # what pandas and LLaVA read as no value


def is_absent(value: Any) -> bool:
    """Whether a cell holds no value: None, NaN, or the text of either.

    Example:
        >>> [is_absent(v) for v in (None, float("nan"), "nan", "A cat")]
        [True, True, True, False]
    """
    return value is None or value != value or str(value).strip().lower() in _ABSENT


def read_table(path: Path, problems: Problems) -> list[dict[str, str]]:
    """Rows of a `.tsv`, `.csv` or `.xlsx` file as dicts of texts, keyed by the header line.

    Raises:
        PredictionError: no such file, or it is no table.
    """
    path = Path(path)
    if not path.is_file():
        raise PredictionError(f"{path}: no such file")
    if path.suffix.lower() == ".xlsx":
        return _read_xlsx(path)
    # A base64 picture is one cell: the default limit of 128 KiB would refuse it.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        reader = csv.DictReader(io.StringIO(read_text(path, problems), newline=""), delimiter=delimiter)
        rows = list(reader)
    except csv.Error as error:
        raise PredictionError(f"{path}: damaged table: {error}") from error
    whole = []
    for number, row in enumerate(rows, 1):
        if None in row or any(value is None for value in row.values()):
            problems.add("unreadable_line", f"{path.name} row {number}: not as many columns as the header")
        else:
            whole.append(row)
    return whole


def _read_xlsx(path: Path) -> list[dict[str, str]]:
    try:
        with zipfile.ZipFile(path) as book:
            names = book.namelist()
            shared: list[str] = []
            if "xl/sharedStrings.xml" in names:
                root = ElementTree.fromstring(book.read("xl/sharedStrings.xml"))
                shared = [
                    "".join(t.text or "" for t in si.iter(f"{_MAIN}t")) for si in root.iter(f"{_MAIN}si")
                ]
            sheets = sorted(n for n in names if re.fullmatch(r"xl/worksheets/sheet\d+\.xml", n))
            root = ElementTree.fromstring(book.read(sheets[0]))
    except (zipfile.BadZipFile, ElementTree.ParseError, KeyError, IndexError) as error:
        raise PredictionError(f"{path}: no readable XLSX workbook ({error})") from error
    table = [
        {_column(c): _cell(c, shared) for c in row.iter(f"{_MAIN}c")} for row in root.iter(f"{_MAIN}row")
    ]
    if not table:
        raise PredictionError(f"{path}: the first sheet is empty")
    header = table[0]
    return [{name: row.get(column, "") for column, name in header.items()} for row in table[1:]]


def _texts(element: ElementTree.Element) -> str:
    return "".join(t.text or "" for t in element.iter(f"{_MAIN}t"))


def _column(cell: ElementTree.Element) -> str:
    return re.sub(r"\d", "", cell.get("r", ""))


def _cell(cell: ElementTree.Element, shared: list[str]) -> str:
    if cell.get("t") == "inlineStr":
        return _texts(cell)
    value = cell.find(f"{_MAIN}v")
    text = "" if value is None else value.text or ""
    return shared[int(text)] if cell.get("t") == "s" and text else text
