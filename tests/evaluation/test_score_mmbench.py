import zipfile

import openpyxl
import pytest
from scoring_helpers import lines

from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.benchmarks.mmbench import options_of
from mllm_jax.evaluation.option_match import infer_option
from mllm_jax.evaluation.predictions import PredictionError, Problems
from mllm_jax.evaluation.table_files import read_table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        ("B. dog", "B"),
        ("The answer is (C).", "C"),
        ("It is a dog", "B"),
        ("A dog is here now ok", "B"),
        ("A or B", None),
        ("cat and dog", None),
        ("B)", "B"),
        ("answer: D.", "D"),
        ("The answer is **C** because it has the most of all", "C"),
        ("I can't process this file.", "Z"),
        ("Z", "Z"),
        ("", None),
    ],
)
def test_golden_letters(text, expected):
    assert infer_option(text, {"A": "cat", "B": "dog", "C": "100", "D": "1000"}) == expected


def _question(base, said, answer="cat", options=("cat", "dog", "cow"), rotate=3, **more):
    rows = []
    for turn in range(rotate):
        turned = options[turn:] + options[:turn]
        row = {"index": base + turn * 1_000_000, "question": "?", "prediction": said[turn]}
        row |= dict(zip("ABCD", (*turned, None, None), strict=False))
        rows.append({**row, "answer": "ABCD"[turned.index(answer)], **more})
    return rows


def test_circular(tmp_path):
    rows = _question(1, "ACB") + _question(2, "AAA") + _question(7, "BBB")
    result = get_benchmark("mmbench").score(lines(tmp_path / "p", rows))
    assert result["evaluation"] == "circular"
    assert (result["n"], result["correct"], result["score"]) == (3, 1, 1 / 3)
    assert result["vanilla_accuracy"] == 2 / 3
    assert (result["rows"], result["row_correct"]) == (9, 5)


def test_a_missing_rotation_is_found_without_annotations(tmp_path):
    rows = _question(1, "ACB") + _question(2, "ACB")[:2]
    result = get_benchmark("mmbench").score(lines(tmp_path / "p", rows))
    assert result["score"] is None
    assert result["problems"]["missing"]["first"] == ["index 2000002"]
    assert result["partial"]["n" if "n" in result["partial"] else "answered"] == 1


def test_an_option_that_keeps_its_place_has_one_rotation_fewer(tmp_path):
    rows = []
    for turn, turned in enumerate((("cat", "dog", "none of these"), ("dog", "cat", "none of these"))):
        row = {"index": 5 + turn * 1_000_000, "prediction": "A", "answer": "AB"[turn]}
        rows.append(row | dict(zip("ABC", turned, strict=True)))
    result = get_benchmark("mmbench").score(lines(tmp_path / "p", rows))
    assert (result["complete"], result["score"], result["row_accuracy"]) == (True, 0.0, 0.5)


TSV = """index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit
1\t"two
lines"\tnan\tcat\tdog\tcow\t\tA\timage_scene\t\tx\tcoarse_perception\t\tdev
2\twhat\tnan\tcat\tdog\tcow\t\tA\tocr\t\tx\tfinegrained_perception (instance-level)\t\tdev
"""


def test_annotations_of_base_rows_with_categories(tmp_path):
    (tmp_path / "g.tsv").write_text(TSV)
    rows = _question(1, "ACB") + _question(2, "AAA") + _question(3, "AAA")
    result = get_benchmark("mmbench").score(lines(tmp_path / "p", rows), tmp_path / "g.tsv")
    assert result["subtasks"] == {"image_scene": 1.0, "ocr": 0.0}
    assert result["groups"] == {"coarse": 1.0, "fine": 0.0}
    assert result["l2_counts"]["coarse_perception"] == [1, 1]
    assert result["problems"]["unknown"]["count"] == 3


def test_llava_answer_file_without_rotations_is_vanilla(tmp_path):
    (tmp_path / "g.tsv").write_text(TSV)
    rows = [
        {
            "question_id": 1,
            "round_id": 0,
            "text": "A",
            "options": ["cat", "dog", "cow"],
            "option_char": list("ABC"),
        },
        {
            "question_id": 2,
            "round_id": 0,
            "text": "the dog",
            "options": ["cat", "dog", "cow"],
            "option_char": list("ABC"),
        },
    ]
    result = get_benchmark("mmbench_cn").score(lines(tmp_path / "p", rows), tmp_path / "g.tsv")
    assert result["benchmark"] == "mmbench_cn"
    assert result["evaluation"].startswith("vanilla")
    assert result["score"] == 0.5


def test_submission_xlsx(tmp_path):
    book = openpyxl.Workbook()
    table = (("index", "A", "B", "prediction", "answer"), (1, "cat", "dog", "the cat", "A"))
    for row in (*table, (1_000_001.0, "dog", "cat", "the cat", "B", "no column")):
        book.active.append(row)
    book.save(tmp_path / "p.xlsx")
    result = get_benchmark("mmbench").score(tmp_path / "p.xlsx")
    assert (result["score"], result["row_correct"]) == (1.0, 2)


SHEETS = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"


def workbook(path, rows, shared=(), dimension="A1:E3"):
    """An XLSX file of rows of XML, as spreadsheet programs write it."""
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    strings = "".join(f"<si><t>{text}</t></si>" for text in shared)
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types"><Override PartName="/xl/workbook.xml" '
        f'ContentType="{kind}.sheet.main+xml"/><Override PartName="/xl/worksheets/sheet1.xml" '
        f'ContentType="{kind}.worksheet+xml"/><Override PartName="/xl/sharedStrings.xml" '
        f'ContentType="{kind}.sharedStrings+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="r1" '
        f'Type="{OFFICE}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{SHEETS}" xmlns:r="{OFFICE}"><sheets>'
        '<sheet name="answers" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="r1" '
        f'Type="{OFFICE}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/sharedStrings.xml": f'<sst xmlns="{SHEETS}">{strings}</sst>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{SHEETS}"><dimension ref="{dimension}"/>'
        f"<sheetData>{rows}</sheetData></worksheet>",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        for name, text in parts.items():
            book.writestr(name, text)
    return path


def cell(column, row, text, kind):
    value = f"<is><t>{text}</t></is>" if kind == "inlineStr" else f"<v>{text}</v>"
    return f'<c r="{column}{row}" t="{kind}">{value}</c>'


def test_a_workbook_as_spreadsheet_programs_write_it(tmp_path):
    shared = ["index", "A", "B", "prediction", "answer", "cat", "dog"]
    body = "".join(cell(c, 1, i, "s") for i, c in enumerate("ABCDE"))
    rows = f'<row r="1">{body}</row>'
    table = ((1, 5, 6, "A"), (1_000_001, 6, 5, "B"))
    for number, (index, a, b, answer) in enumerate(table, 2):
        cells = cell("A", number, index, "n") + cell("B", number, a, "s") + cell("C", number, b, "s")
        cells += cell("D", number, "the cat", "inlineStr") + cell("E", number, answer, "inlineStr")
        rows += f'<row r="{number}">{cells}</row>'
    path = workbook(tmp_path / "p.xlsx", rows, shared)
    result = get_benchmark("mmbench").score(path)
    assert (result["score"], result["row_correct"]) == (1.0, 2)
    assert read_table(path, Problems())[1]["index"] == "1000001"
    path.write_bytes(b"PK")
    with pytest.raises(PredictionError, match="no readable XLSX"):
        get_benchmark("mmbench").score(path)


HEAD = f'<row r="1">{cell("A", 1, "index", "inlineStr")}</row>'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "dimension", "message"),
    [
        (HEAD + "<row/>" * 3_000_000, "A1:A2", "MLLM_JAX_MAX_ARCHIVE_RATIO="),
        (HEAD + f'<row r="1000000000000">{cell("A", 10**12, 1, "n")}</row>', "A1:A2", "1048576 rows"),
        (HEAD + f'<row r="2">{cell("XFD", 2, 1, "n")}</row>', "A1:A2", "row 2 has 16384 cells"),
        (HEAD + f'<row r="2">{cell("A", 2, 99, "s")}</row>', "A1:A2", "no readable XLSX"),
        (HEAD + f'<row r="2">{cell("A", 2, "x", "n")}</row>', "A1:A2", "no readable XLSX"),
        ("", "A1:A2", "the first sheet is empty"),
    ],
)
def test_a_hostile_workbook_is_a_message(tmp_path, rows, dimension, message):
    path = workbook(tmp_path / "p.xlsx", rows, dimension=dimension)
    with pytest.raises(PredictionError, match=rf"p\.xlsx: .*{message}"):
        read_table(path, Problems())


def test_what_a_workbook_claims_of_its_size_is_not_believed(tmp_path):
    rows = HEAD + f'<row r="2">{cell("A", 2, 7, "n")}</row>'
    path = workbook(tmp_path / "p.xlsx", rows, dimension="A1:XFD1048576")
    assert read_table(path, Problems()) == [{"index": "7"}]


def test_options_end_at_the_first_absent_one():
    assert options_of({"A": "x", "B": float("nan"), "C": "y"}) == {"A": "x"}
