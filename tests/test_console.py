import io
import re
import subprocess
import sys

import pytest
from rich.console import Console

from mllm_jax import escape
from mllm_jax.console import complain, make_console, print_table, progress_bar, say

HEAD = ("", "n", "model %", "blind %", "majority %", "likelihood %", "open blind %")
ROWS = [
    ("all", "1600", "61.2", "33.1", "25.0", "64.0", "30.2"),
    ("object localization and spatial relationship", "400", "50.0", "25.0", "25.0", "52.5", "12.5"),
    ("structuralized_imagetext_understanding", "400", "71.5", "30.5", "25.0", "73.0", "41.0"),
]
HOSTILE = [
    "[link=https://evil.example]x[/link]",
    "[/bold]",
    ":skull:",
    "a\x1b]52;c;ZXZpbA==\x07b",
    "\u202ea",
    "\udcff",
]


def printed(width, head=HEAD, rows=ROWS, **options):
    file = io.StringIO()
    print_table(Console(file=file, width=width), head, rows, **options)
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_word_is_cut_on_any_terminal(width):
    text = printed(width, title="a title of a benchmark")
    words = [
        word for row in [HEAD, *ROWS, ("a title of a benchmark",)] for cell in row for word in cell.split()
    ]
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text), word
    assert "…" not in text
    if width > 40:
        assert max(map(len, text.splitlines())) <= width


def test_a_narrow_terminal_gets_rows_under_each_other():
    text = printed(40)
    assert "object localization and spatial relationship\n  n: 400\n  model %: 50.0\n" in text
    assert "structuralized_imagetext_understanding\n" in text


def test_a_file_gets_one_line_per_row():
    code = (
        "from mllm_jax.console import make_console, print_table\n"
        f"print_table(make_console(), {HEAD!r}, {ROWS!r}, 'a title')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    lines = done.stdout.splitlines()
    for row in ROWS:
        assert any(all(cell in line for cell in row) for line in lines), row


def test_cells_and_lines_are_no_markup_and_no_terminal_commands(capsys):
    text = printed(200, ("", "n"), [(cell, "1") for cell in HOSTILE], title=HOSTILE[0])
    narrow = printed(20, ("ability", "questions"), [(cell, "1") for cell in HOSTILE])
    file = io.StringIO()
    for cell in HOSTILE:
        say(Console(file=file, force_terminal=True, width=80), cell, "bold")
        complain(cell)
    styled = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())  # our own bold
    for shown in (text, narrow, styled, capsys.readouterr().err):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", shown)
        assert HOSTILE[0] in shown
        assert HOSTILE[1] in shown
        assert ":skull:" in shown
        assert r"a\x1b]52;c;ZXZpbA==\x07b" in shown


def test_progress_bars_show_names_as_they_are():
    file = io.StringIO()
    with progress_bar(Console(file=file, width=80)) as bar:
        task = bar.add_task("gqa [link=x]y[/link], blind", total=4, completed=1)
        bar.update(task, completed=4, shown="loss 0.629  6,558 tok/s")
    assert "gqa [link=x]y[/link], blind" in file.getvalue()
    assert "4/4 loss 0.629  6,558 tok/s" in file.getvalue()
    with progress_bar(Console(file=file, width=80), show=False) as bar:
        bar.add_task("hidden", total=1)
    assert "hidden" not in file.getvalue()


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_a_training_line_fits_80_columns(name):
    file = io.StringIO()
    with progress_bar(Console(file=file, width=80)) as bar:
        bar.add_task(name, total=100, completed=100, shown="loss 0.629  6,558 tok/s  padding 31%")
    assert re.search(rf"{name} \S+ 100/100 loss 0.629  6,558 tok/s  padding 31% [-\d]:", file.getvalue())


def test_a_console_for_a_file_is_wide():
    assert make_console(io.StringIO()).width > 1000


def test_what_the_encoding_lacks_is_spelled_out():
    code = "from mllm_jax.console import write_anything; write_anything(); print('é–\\udcff')"
    command = [sys.executable, "-X", "utf8=0", "-c", code]
    done = subprocess.run(command, capture_output=True, env={"PYTHONIOENCODING": "ascii"}, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"\\xe9\\u2013\\udcff\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("counting", "counting"),
        ("80.0", "80.0"),
        ("–", "–"),
        ("<script>alert(1)</script>", r"\<script\>alert(1)\</script\>"),
        ("[x](javascript:y)", r"\[x\](javascript:y)"),
        ("![x](http://evil.example)", r"!\[x\](http://evil.example)"),
        ("a | b", r"a \| b"),
        ("# heading\n\n* item", r"\# heading \* item"),
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("---", r"\---"),
        ("_a_ a_b __c__", r"\_a\_ a_b \_\_c\_\_"),
        ("`code` &amp;", r"\`code\` \&amp;"),
        ("a\x1b[0mb", r"a\\x1b\[0mb"),
    ],
)
def test_markdown_is_one_line_without_markup(text, shown):
    assert escape.markdown(text) == shown


def test_a_markdown_table_keeps_its_columns():
    lines = escape.markdown_table(("", "n"), [("a|b\nc", "1"), ("<b>", "")], strong={0}).splitlines()
    assert lines == ["|  | n |", "|---|---:|", r"| **a\|b c** | **1** |", r"| \<b\> |  |"]
