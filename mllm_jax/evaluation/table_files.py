"""Table files: TSV, CSV and XLSX (MMBench's questions and submissions)."""

import csv
import io
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_jax import files, limits
from mllm_jax.escape import spreadsheet
from mllm_jax.evaluation.predictions import PredictionError, Problems, read_text
from mllm_jax.storage import Path, as_path, size

TABLES = (".tsv", ".csv", ".xlsx")
_MOST_ROWS, _MOST_COLUMNS = 1 << 20, 1024  # of a sheet; a row number or column letter costs a file nothing
# What pandas reads as no value, and with it the official evaluations of tables; "Na" and "no" are answers.
_ABSENT = frozenset(
    "|#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null".split(
        "|"
    )
)
_CELL = 32_767  # characters of a cell of a spreadsheet


def is_absent(value: Any) -> bool:
    """Whether a cell holds no value: None, NaN, or a text that pandas or LLaVA reads as either.

    Example:
        >>> [is_absent(v) for v in (None, float("nan"), "nan", "NONE", "A cat", "Na")]
        [True, True, True, True, False, False]
    """
    return value is None or value != value or str(value) in _ABSENT or str(value).lower() in ("nan", "none")


def read_table(path: Path, problems: Problems) -> list[dict[str, str]]:
    """Rows of a `.tsv`, `.csv` or `.xlsx` file as dicts of texts, keyed by the header line.

    Raises:
        PredictionError: no such file, or it is no table.
    """
    path = as_path(path)
    if not path.is_file():
        raise PredictionError(f"{path}: no such file")
    if path.suffix.lower() == ".xlsx":
        return _read_xlsx(path)
    # A base64 image is one cell: the default limit of 128 KiB would refuse it.
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


def read_whole_table(path: Path) -> list[dict[str, str]]:
    """The same of questions or annotations, where no row may be damaged.

    Raises:
        PredictionError: as `read_table`, or a row is damaged.
    """
    problems = Problems()
    rows = read_table(path, problems)
    if problems.counts.keys() - {"byte_order_mark"}:
        raise PredictionError(f"{path}: damaged: {problems.as_dict()}; fetch it again")
    return rows


def _read_xlsx(path: Path) -> list[dict[str, str]]:
    """The first sheet, by openpyxl in its streaming mode: what the file claims of its size is not believed."""
    import openpyxl  # a slow import that only spreadsheets need

    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        limits.check("MAX_TABLE_BYTES", unpacked, path)
        limits.check("MAX_ARCHIVE_RATIO", unpacked // size(path), path)
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of features that are not read: styles, validation
            book = openpyxl.load_workbook(file, read_only=True, data_only=True)
            sheet = book.worksheets[0]
            sheet.reset_dimensions()
            table = [_cells(number, row) for number, row in enumerate(sheet.iter_rows(values_only=True), 1)]
    except (limits.LimitError, OSError) as error:
        raise PredictionError(str(error)) from error
    except Exception as error:  # openpyxl lets out whatever a damaged part of the archive leads to
        raise PredictionError(
            f"{path}: no readable XLSX workbook ({type(error).__name__}: {error})"
        ) from error
    if not table or not table[0]:
        raise PredictionError(f"{path}: the first sheet is empty")
    header = [(place, name) for place, name in enumerate(table[0]) if name]
    rows = [row for row in table[1:] if row]
    return [{name: row[place] if place < len(row) else "" for place, name in header} for row in rows]


def _cells(number: int, row: Sequence[Any]) -> list[str]:
    if number > _MOST_ROWS or len(row) > _MOST_COLUMNS:
        raise ValueError(f"row {number} has {len(row)} cells; {_MOST_ROWS} rows of {_MOST_COLUMNS} are read")
    return ["" if value is None else str(value) for value in row]


def write_xlsx(
    path: Path,
    header: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    numbers: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> None:
    """Writes one sheet; cells are texts, and empty where `is_absent`.

    Args:
        numbers: columns of whole numbers.
        texts: columns that hold what they say, also if it looks absent.

    Raises:
        ValueError: a cell has more characters than the format can hold.
    """
    import openpyxl

    book = openpyxl.Workbook()
    sheet = book.active
    for number, row in enumerate([dict(zip(header, header, strict=True)), *rows], 1):
        for column, name in enumerate(header, 1):
            value = row[name]
            if number > 1 and is_absent(value) and name not in texts:
                continue  # an empty cell, as in a table that pandas wrote
            if number > 1 and name in numbers:
                sheet.cell(number, column, int(value))
                continue
            value = str(value)
            if len(value) > _CELL:
                key = f"{header[0]} {row[header[0]]}"
                raise ValueError(f"{name!r} of {key} has {len(value)} characters; a cell holds {_CELL}")
            cell = sheet.cell(number, column, spreadsheet(value))
            cell.data_type = "s"  # text that begins with "=" is no formula
    with files.replacing(path) as file:
        book.save(file)
