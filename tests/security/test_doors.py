"""One door for each danger: the package's own source has no second one."""

import ast

import openpyxl
import pytest
from guard import ROOT

from mllm_jax.evaluation.table_files import write_xlsx

FILES = sorted((ROOT / "mllm_jax").rglob("*.py"))
# These write into folders that `tempfile` has just made, which nobody else can write to.
PRIVATE_FOLDER = {"data/convert.py", "serve/messages.py"}
OBJECT_IN_A_BUCKET = ("files.py", "path.write_bytes")  # the helper's own


def calls(path):
    """(written name of the function, call) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _writes(name, call):
    """Whether a call writes a file without `files`: `open` for writing, `Path.write_*`, or a library's own writer."""
    last = name.rsplit(".", 1)[-1]
    if last in ("write_text", "write_bytes"):
        return not name.startswith(("files.", "write_"))
    if last == "open":
        modes = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        texts = [one.value for one in modes if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        guarded = any(keyword.arg == "opener" for keyword in call.keywords)
        first = call.args[0] if call.args else None
        opened = isinstance(first, ast.Name) and first.id in ("descriptor", "file")  # which `files` gave
        return (
            any(set("wax+") & set(text) and len(text) <= 3 for text in texts) and not guarded and not opened
        )
    return name in (
        "np.save",
        "np.savez",
        "json.dump",
        "shutil.copy",
        "pickle.dump",
    ) and "stdout" not in ast.unparse(call)


def test_every_file_is_written_through_the_one_helper():
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {name}"
        for path in FILES
        if path.relative_to(ROOT / "mllm_jax").as_posix() not in PRIVATE_FOLDER
        for name, call in calls(path)
        if _writes(name, call) and (path.name, name) != OBJECT_IN_A_BUCKET
    ]
    assert not found


def test_the_search_for_writers_finds_them():
    lines = [
        'open(p, "w")',
        'path.open("ab")',
        'path.write_text("x")',
        "open(p)",
        'open(p, "a", opener=no_links)',
    ]
    text = "\n".join([*lines, "files.write_text(p, x)"])
    calls_in = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls_in if _writes(ast.unparse(call.func), call)] == [1, 2, 3]


@pytest.mark.parametrize(
    "door",
    [
        "Image.open",
        "pickle.load",
        "pickle.loads",
        "torch.load",
        "tfds.builder_from_directory",
        "eval",
        "os.system",
    ],
)
def test_doors_that_stay_shut(door):
    found = [f"{path.name}:{call.lineno}" for path in FILES for name, call in calls(path) if name == door]
    assert not found


def test_no_code_of_a_checkpoint_is_trusted():
    given = [
        keyword.value
        for path in FILES
        for _, call in calls(path)
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code"
    ]
    assert given
    assert all(isinstance(value, ast.Constant) and value.value is False for value in given)


def test_cells_of_a_workbook_are_text(tmp_path):
    header = ["index", "=1+1", "+cmd"]
    write_xlsx(
        tmp_path / "x.xlsx", header, [{"index": 1, "=1+1": '=HYPERLINK("x")', "+cmd": "@SUM(1)"}], ["index"]
    )
    cells = [cell for row in openpyxl.load_workbook(tmp_path / "x.xlsx").active for cell in row]
    assert [cell.value for cell in cells] == [*header, 1, '=HYPERLINK("x")', "@SUM(1)"]
    assert [cell.data_type for cell in cells] == ["s", "s", "s", "n", "s", "s"]
