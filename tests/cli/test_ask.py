"""`mllm-jax ask` on a tiny model: its answers are those of the Python API."""

import io
import json

import jax
import pytest
import tiny

import mllm_jax
from mllm_jax.cli.main import main
from mllm_jax.escape import terminal
from mllm_jax.inference.prompts import Prompts
from mllm_jax.interop import native

TOKENS = 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny_model, tiny_params, tiny_tokenizer):
    """`tiny_model` with weights that make answers vary, and two images beside it."""
    root = tmp_path_factory.mktemp("ask") / "model"
    params = jax.tree.map(lambda leaf: 2 * leaf, tiny_params)
    native.save_native(root, tiny_model, params, template="vicuna_v1")
    tiny_tokenizer.save_pretrained(root)
    for index in range(2):
        (root / f"{index}.png").write_bytes(tiny.png(index, (30, 20)))
    return root


@pytest.fixture(scope="module")
def model(directory):
    return mllm_jax.load(directory)


def ask(directory, *arguments):
    return main(["ask", "--from", str(directory), "--max-new-tokens", str(TOKENS), *map(str, arguments)])


def test_one_question(directory, model, capsys):
    images = [str(directory / f"{index}.png") for index in range(2)]
    assert ask(directory, "--image", images[0], "what?") == 0
    answer = model.generate(images[0], "what?", max_new_tokens=TOKENS)
    assert capsys.readouterr().out == terminal(answer) + "\n"
    drawn = {"temperature": 0.9, "seed": 3}
    options = [f"--{name}={value}" for name, value in drawn.items()]
    assert ask(directory, "--image", images[0], "--image", images[1], *options, "--json", "what?") == 0
    assert json.loads(capsys.readouterr().out) == {
        "model": str(directory),
        "images": images,
        "videos": [],
        "turn": 1,
        "question": "what?",
        "answer": model.generate(images, "what?", max_new_tokens=TOKENS, **drawn),
    }


def test_a_conversation(directory, model, capsys, monkeypatch):
    first, second = directory / "0.png", directory / "1.png"
    lines = ["what?", "", "why?", f"/image {second}", "what?", "/image nowhere.png", "/imago", "/quit", "no"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert ask(directory, "--image", first, "--json") == 1  # a file was missing
    printed = capsys.readouterr()
    records = [json.loads(line) for line in printed.out.splitlines()]
    start = model.generate(first, "what?", max_new_tokens=TOKENS)
    then = model.generate(first, "why?", history=[("what?", start)], max_new_tokens=TOKENS)
    other = model.generate(second, "what?", max_new_tokens=TOKENS)
    assert [record["answer"] for record in records] == [start, then, other]
    assert [record["turn"] for record in records] == [1, 2, 1]
    assert len({start, then, other}) == 3
    assert "there is no file nowhere.png" in printed.err
    assert "no command '/imago'" in printed.err


def test_what_the_model_reads_in_a_conversation(model):
    history = [("what?", "A cat.")]
    prompts = Prompts(model, None, "why?", None, history, "Be brief.")
    read = model.tokenizer.decode(prompts.request(0).prompt.tokens)
    assert read == "Be brief. USER: what? ASSISTANT: A cat.</s>USER: why? ASSISTANT:"
    with pytest.raises(ValueError, match="a history is of one prompt"):
        Prompts(model, None, ["why?"], None, history)


def test_what_cannot_be_used(directory, capsys):
    assert ask(directory, "--image", "nowhere.png", "what?") == 2
    assert ask(directory / "nowhere", "what?") == 2
    assert ask(directory, "--template=mistral_instruct", "--system=Be brief.", "what?") == 2
    assert ask(directory, "--temperature=-1", "what?") == 2
    complaints = capsys.readouterr().err
    for words in ("nowhere.png", "nowhere", "'mistral_instruct' has no place for a system", "temperature=-1"):
        assert words in complaints
    assert ask(directory, "what?" * 120) == 1
    assert "limit of 512" in capsys.readouterr().err
