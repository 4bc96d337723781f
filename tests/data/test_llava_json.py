"""Every way a LLaVA-format file can be wrong is reported with the file and the sample's id."""

import json

import pytest
from PIL import Image

from mllm_jax.data import llava_json
from mllm_jax.data.llava_json import Record
from mllm_jax.data.reading import DataError


def sample(sample_id="a", image="x.png", question="<image>\nWhat?", answer="A cat.", **extra):
    entry = {
        "id": sample_id,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        **extra,
    }
    return entry if image is None else {**entry, "image": image}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "x.png")
    Image.new("RGB", (3, 2)).save(tmp_path / "y.png")
    return tmp_path


def write(folder, entries, name="data.json"):
    path = folder / name
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries), encoding="utf-8")
    return path


def test_reads_images_lists_text_only_and_integer_ids(folder):
    entries = [
        sample(7),
        sample("two", ["x.png", "y.png"], "<image>\n<image>\nCompare.", model="ignored"),
        sample("text", None, "Hello?"),
        sample("null", None, "Hello?", image_=None) | {"image": None},
    ]
    records = llava_json.read_records(write(folder, entries), folder)
    assert [record.id for record in records] == ["7", "two", "text", "null"]
    assert [record.images for record in records] == [("x.png",), ("x.png", "y.png"), (), ()]
    assert records[0] == Record("7", ("x.png",), tuple(entries[0]["conversations"]))


def test_json_lines_keep_unicode_line_separators(folder):
    lines = [json.dumps(sample("a", answer="one\u2028two"), ensure_ascii=False), "", json.dumps(sample("b"))]
    records = llava_json.read_records(write(folder, "\n".join(lines) + "\n", "data.jsonl"), folder)
    assert [record.id for record in records] == ["a", "b"]
    assert records[0].conversations[1]["value"] == "one\u2028two"


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ('{"id": "a"}', "data.json", "expected a JSON list of samples, found an object"),
        ("[1,", "data.json", "not valid JSON"),
        ("{}\n{}", "data.json", "name the file .jsonl"),
        ("{}\n[1,", "data.jsonl", "line 2: not valid JSON"),
        ("[]", "data.json", "holds no samples"),
        ("[" * 100_000, "data.json", "not valid JSON"),
    ],
)
def test_a_wrong_file_is_named(folder, text, name, message):
    path = write(folder, text, name)
    with pytest.raises(DataError, match=message) as error:
        llava_json.read_records(path)
    assert str(path) in str(error.value)
    (problem,) = llava_json.iter_problems(path)
    assert message in problem.message
    assert problem.sample == ""


def test_a_missing_or_binary_file_and_a_missing_image_folder(folder):
    with pytest.raises(DataError, match=r"nothing\.json: no such data file"):
        llava_json.read_records(folder / "nothing.json")
    with pytest.raises(DataError, match=r"x\.png: not UTF-8"):
        llava_json.read_records(folder / "x.png")
    with pytest.raises(DataError, match=r"image folder .* does not exist"):
        llava_json.read_records(write(folder, [sample()]), folder / "no_images")


def turns(*pairs):
    return {"id": "bad", "conversations": [{"from": role, "value": value} for role, value in pairs]}


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        (3, "wrong-type", "expected an object, found a number"),
        ({"conversations": sample()["conversations"], "image": "x.png"}, "missing-key", "no 'id'"),
        (sample(True), "wrong-type", "'id' must be"),
        (sample(""), "wrong-type", "'id' must be"),
        (sample(1.5), "wrong-type", "'id' must be"),
        ({"id": "bad", "image": "x.png"}, "missing-key", "no 'conversations' .keys: id, image"),
        (sample("bad", 3), "wrong-type", "'image' must be a path"),
        (sample("bad", ["x.png", 3]), "wrong-type", "'image' must be a path"),
        (sample("bad", ""), "wrong-type", "'image' must be a path"),
        (sample("bad", "no.png"), "missing-image", "no.png does not exist"),
        (sample("bad", "x" * 300), "missing-image", "does not exist"),
        (sample("bad", "../x.png"), "image-path", "stay in the image folder"),
        (sample("bad", "/etc/x.png"), "image-path", "must be relative"),
        ({"id": "bad", "conversations": "hello"}, "wrong-type", "non-empty list, not a string"),
        ({"id": "bad", "conversations": []}, "wrong-type", "non-empty list"),
        ({"id": "bad", "conversations": [{"from": "human"}]}, "missing-key", "turn 0 must be an object with"),
        (turns(("human", 3), ("gpt", "x")), "wrong-type", "must be strings"),
        (turns(("gpt", "x"), ("human", "y")), "roles", "turn 0 is from 'gpt' where 'human' must speak"),
        (turns(("human", "x"), ("human", "y")), "roles", "turn 1 is from 'human'"),
        (turns(("user", "x"), ("gpt", "y")), "roles", "turn 0 is from 'user'"),
        (turns(("human", "x"), ("gpt", "y"), ("human", "z")), "roles", "no answer"),
        (turns(("human", "x"), ("gpt", " \n")), "empty-answer", "turn 1: the answer is empty"),
        (sample("bad", None), "image-count", "1 <image> in the human turns but 0 images"),
        (sample("bad", question="No tag"), "image-count", "0 <image> in the human turns but 1 image$"),
        (sample("bad", ["x.png", "y.png"]), "image-count", "1 <image> in the human turns but 2 images"),
        (turns(("human", " "), ("gpt", "x")), "empty-question", "turn 0: the question is empty"),
        (turns(("human", "x"), ("gpt", "<image>")), "image-count", "turn 1: <image> in an answer"),
    ],
)
def test_each_problem_is_reported_with_the_sample(folder, entry, kind, message):
    path = write(folder, [sample("good"), entry])
    with pytest.raises(DataError, match=message) as error:
        llava_json.read_records(path, folder)
    assert str(path) in str(error.value)
    usable = isinstance(entry, dict) and entry.get("id") == "bad"
    assert repr("bad" if usable else "#1") in str(error.value)
    problems = list(llava_json.iter_problems(path, folder))
    assert [problem.kind for problem in problems] == [kind]


def test_all_problems_are_found_and_sound_samples_kept(folder):
    entries = [sample("a"), sample("b", "no.png", answer=""), sample("a"), 5, sample("c", question="no tag")]
    path = write(folder, entries)
    scanned = list(llava_json.scan(path, folder))
    assert [item.sample for item in scanned] == ["a", "b", "a", "#3", "c"]
    assert [item.record is None for item in scanned] == [False, True, True, True, True]
    assert [item.images for item in scanned] == [("x.png",), (), ("x.png",), (), ("x.png",)]
    assert [(problem.kind, problem.sample) for problem in llava_json.iter_problems(path, folder)] == [
        ("empty-answer", "b"),
        ("missing-image", "b"),
        ("duplicate-id", "a"),
        ("wrong-type", "#3"),
        ("image-count", "c"),
    ]


def test_duplicate_ids_are_refused_or_numbered(folder):
    path = write(folder, [sample("a"), sample("a"), sample("b"), sample("a")])
    with pytest.raises(DataError, match=r"sample 'a': the id occurs more than once .again at entry #1"):
        llava_json.read_records(path)
    records = llava_json.read_records(path, duplicate_ids="number")
    assert [record.id for record in records] == ["a", "a#2", "b", "a#3"]
    clash = write(folder, [sample("a#2"), sample("a"), sample("a")])
    assert [problem.kind for problem in llava_json.iter_problems(clash, duplicate_ids="number")] == [
        "duplicate-id"
    ]


def test_compat_llava_accepts_what_llava_accepts(folder):
    entries = [
        {"id": "gpt first"} | {"conversations": [{"from": "gpt", "value": "Hi"}, *sample()["conversations"]]},
        sample("collapsed", question="<image> and <image>\nWhat?"),
        sample("tag as text", None, "What does <image> mean?"),
    ]
    entries[0]["image"] = "x.png"
    path = write(folder, entries)
    assert [problem.sample for problem in llava_json.iter_problems(path)] == [
        "gpt first",
        "collapsed",
        "tag as text",
    ]
    assert len(llava_json.read_records(path, folder, compat="llava")) == 3
    wrong = write(folder, [sample("none", question="No tag"), sample("empty", answer="")])
    problems = list(llava_json.iter_problems(wrong, compat="llava"))
    assert [(problem.kind, problem.sample) for problem in problems] == [
        ("conversation", "none"),
        ("conversation", "empty"),
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("images", ["x.png"]),
        ("videos", ["clip.mp4"]),
        ("audio", "a.wav"),
        ("image_path", "x.png"),
    ],
)
def test_a_medium_that_is_named_and_not_read_is_a_problem(key, value, folder):
    path = write(folder, [sample("s1", None, "What?", **{key: value}), sample("s2")])
    (problem,) = llava_json.iter_problems(path, folder)
    assert (problem.sample, problem.kind) == ("s1", "unread-medium")
    assert f"the key '{key}'" in problem.message
    for nothing in (None, "", []):
        assert not list(llava_json.iter_problems(write(folder, [sample("s1", **{key: nothing})]), folder))


def turns_in(folder, entry):
    (record,) = llava_json.read_records(write(folder, [entry]), folder)
    return [(turn["from"], turn["value"]) for turn in record.conversations]


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<image>\nWhat?"},
    {"role": "assistant", "content": "A cat."},
]
READ = [("system", "Be brief."), ("human", "<image>\nWhat?"), ("gpt", "A cat.")]


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_messages_of_chat_apis(key, folder):
    assert turns_in(folder, {"id": "a", "image": "x.png", key: MESSAGES}) == READ
    parts = [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]
    user = {"role": "user", "content": parts}
    assert turns_in(folder, {"id": "a", "image": "x.png", key: [MESSAGES[0], user, MESSAGES[2]]}) == READ


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_text_beside_the_turns(key, folder):
    assert turns_in(folder, sample(**{key: "Be brief."})) == READ
    assert turns_in(folder, {"id": "a", "image": "x.png", "messages": MESSAGES[1:], key: "Be brief."}) == READ
    assert turns_in(folder, sample(**{key: ""})) == READ[1:]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"messages": MESSAGES, "conversations": []}, "only one of them"),
        ({"messages": MESSAGES, "system": "Another."}, "more than one system text"),
        (sample(system="One.", system_prompt="Two."), "more than one system text"),
        (sample(system=7), "'system' must be a string"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'role' 'tool' is none of 'user'"),
        ({"messages": [{"role": "user", "content": 7}]}, "'content' must be"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "no text, image or video"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "x"}]}]},
            "under the sample's 'image'",
        ),
        ({"messages": MESSAGES[1:2]}, "no answer from gpt"),
        ({"messages": []}, "non-empty list"),
        ({"messages": MESSAGES[::2]}, "'human' must speak"),
        ({"conversations": [{"from": "system", "value": "Alone."}], "image": None}, "no turn from 'human'"),
    ],
)
def test_turns_in_a_form_that_cannot_be_read(entry, said, folder):
    problems = list(
        llava_json.iter_problems(write(folder, [{"image": "x.png"} | entry | {"id": "s1"}]), folder)
    )
    assert {problem.sample for problem in problems} == {"s1"}
    assert any(said in problem.message for problem in problems)


def test_half_characters_are_named(folder):
    path = folder / "data.json"
    path.write_text(
        json.dumps([sample("s1", answer="cut \ud83d"), sample("s2", question="<image> \udc80"), sample("s3")])
    )
    problems = list(llava_json.iter_problems(path, folder))
    assert [(problem.sample, problem.kind) for problem in problems] == [("s1", "text"), ("s2", "text")]
    path.write_text(json.dumps([sample("s\ud83d"), sample("s4", image="\ud83d.png")]))
    problems = list(llava_json.iter_problems(path, folder))
    assert [problem.kind for problem in problems] == ["text", "image-path"]
    "".join(problem.describe("x") for problem in problems).encode()
