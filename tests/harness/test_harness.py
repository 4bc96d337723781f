"""The lmms-eval adapter, on requests that lmms-eval 0.7.3 made of the tasks of benchmarks/harness.py."""

import dataclasses
import io
import json
import pathlib
import types

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from mllm_jax.config import ConfigError
from mllm_jax.data.conversations import IMAGE, VIDEO, SampleError
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.tokens import SampleTooLong
from mllm_jax.harness import lmms_eval, setup
from mllm_jax.harness.adapter import Adapter, Settings
from mllm_jax.harness.questions import from_context, from_messages, medium
from mllm_jax.inference.likelihood import answer_likelihoods
from mllm_jax.inference.model import Model
from mllm_jax.inference.prompts import Prompts
from mllm_jax.inference.states import sequence_logits

RECORDED = json.loads((pathlib.Path(__file__).parent / "lmms_eval_requests.json").read_text())
IMAGES = [Image.open(io.BytesIO(tiny.png(index, (30, 20)))).convert("RGB") for index in range(3)]


@pytest.fixture(scope="module")
def model(tiny_model, tiny_params, tiny_tokenizer):
    params = jax.tree.map(lambda leaf: 2 * leaf, tiny_params)
    processor = ImageProcessor(
        tiny_model.image_size, "stretch", tiny_model.vision.mean, tiny_model.vision.std
    )
    return Model(tiny_model, params, tiny_tokenizer, processor, "vicuna_v1")


@pytest.fixture(scope="module")
def adapters(model):
    return {kind: Adapter(model, chat=kind == "chat", batch_size=2) for kind in ("chat", "simple")}


def shown(value):
    """What a recorded function returned, with images in it."""
    if isinstance(value, dict):
        return (
            IMAGES[value["image"]] if value.keys() == {"image"} else {k: shown(v) for k, v in value.items()}
        )
    return [shown(each) for each in value] if isinstance(value, list) else value


def request(record):
    """A recorded request, whose functions return what they returned, to every answer but the first one of rounds."""

    def function(name):
        returned = record["functions"][name]

        def call(doc, round_idx=None, previous_output=None, previous_round_info=None):
            if round_idx is None:
                return shown(returned["first"])
            *question, over, _, told = shown(returned["later"][round_idx - 1])
            return *question, over, previous_output, told

        return call

    args = [function(a["function"]) if isinstance(a, dict) and "function" in a else a for a in record["args"]]
    return types.SimpleNamespace(args=tuple(args))


def recorded(kind, what, *tasks):
    """Requests of one sort, and the documents of their tasks."""
    chosen = [each for each in RECORDED if (each["class"], each["type"]) == (kind, what)]
    chosen = [each for each in chosen if not tasks or each["args"][-2].removeprefix("mllm_jax_") in tasks]
    documents = {each["args"][-2]: {"test": [{}, {}]} for each in chosen}
    return [request(each) for each in chosen], documents, chosen


def question(record):
    """Images and text of a recorded simple request."""
    return shown(record["functions"]["doc_to_visual"]["first"]), record["args"][0]


@pytest.mark.parametrize("kind", ["simple", "chat"])
def test_answers_are_those_of_the_python_api(kind, model, adapters):
    requests, documents, _ = recorded(kind, "generate_until")
    _, _, records = recorded("simple", "generate_until")
    found = adapters[kind].generate_until(requests, documents)
    images, prompts = zip(*map(question, records), strict=True)
    expected = model.generate(list(images), list(prompts), max_new_tokens=8, batch_size=2)
    assert [each.text for each in found] == expected
    assert len(set(expected)) > 1
    assert all(0 < each.output_tokens <= 8 < each.input_tokens for each in found)


@pytest.mark.parametrize("kind", ["simple", "chat"])
def test_rounds_are_asked_until_the_task_ends_them(kind, model, adapters):
    requests, documents, _ = recorded(kind, "generate_until_multi_round")
    _, _, records = recorded("simple", "generate_until_multi_round")
    found = adapters[kind].generate_until_multi_round(requests, documents)
    images, first = zip(*map(question, records), strict=True)
    second = [record["functions"]["doc_to_text"]["later"][0][1] for record in records]
    asked = [
        model.generate(list(images), list(each), max_new_tokens=8, batch_size=2) for each in (first, second)
    ]
    assert found == [list(rounds) for rounds in zip(*asked, strict=True)]


def test_likelihoods(model, adapters):
    requests, documents, records = recorded("simple", "loglikelihood", "choice", "likelihood")
    found = adapters["simple"].loglikelihood(requests, documents)
    given = [record["args"][1] for record in records]
    losses = [isinstance(each, str) for each in given]  # lmms-eval takes the choice with the smallest number
    answers = [
        [each.strip() if loss else record["functions"]["doc_to_target"]["first"]]
        for each, loss, record in zip(given, losses, records, strict=True)
    ]
    images, prompts = zip(*map(question, records), strict=True)
    scores = model.likelihood(list(images), list(prompts), answers, batch_size=2)
    for (value, greedy), loss, (expected,) in zip(found, losses, scores, strict=True):
        assert value == pytest.approx(-expected if loss else expected, abs=1e-4)
        assert expected < 0
        assert greedy is False  # of a random model
    with pytest.raises(ValueError, match="acc_mutual_info"):
        adapters["simple"].loglikelihood([types.SimpleNamespace(args=("", "A"))], {})


def test_greedy_is_what_greedy_decoding_gives(model):
    """The answer's tokens are made the likeliest ones, one after the other, and then another one."""
    prompts = Prompts(model, IMAGES[0], "what?")
    asked, config = prompts.request(0, "ab"), model.config
    places = np.flatnonzero(asked.prompt.loss_weights)
    for place in places:
        logits = sequence_logits(config, model.params, asked, prompts.load_image)
        tokens = asked.prompt.tokens.copy()
        tokens[place] = logits[place - 1].argmax()
        asked = dataclasses.replace(asked, prompt=dataclasses.replace(asked.prompt, tokens=tokens))
    other = tokens.copy()
    other[places[-1]] = logits[places[-1] - 1].argmin()
    other = dataclasses.replace(asked, prompt=dataclasses.replace(asked.prompt, tokens=other))
    both = answer_likelihoods(
        config, model.params, [asked, other], load_image=prompts.load_image, batch_size=2
    )
    assert [each.greedy for each in both] == [True, False]


def test_settings_room_and_repeats(model, adapters, capsys):
    simple = adapters["simple"]
    given = {"until": ["\n\n", "ASSISTANT:"], "max_new_tokens": 16, "temperature": 0, "top_p": 0, "top_k": 3}
    assert simple._settings(given, "task") == Settings(16, stop=("ASSISTANT:",))
    assert "task: generation settings without a meaning here: top_k" in " ".join(
        capsys.readouterr().err.split()
    )
    assert simple._settings({"temperature": 0.5, "do_sample": True}, "task") == Settings(128, 0.5)
    assert simple._settings({"temperature": 0.5, "do_sample": False}, "task") == Settings(128)
    with pytest.raises(ValueError, match="num_beams=3"):
        simple._settings({"num_beams": 3}, "task")

    def ask(text, **settings):
        args = (text, settings, lambda doc: [], 0, "task", "test")
        return types.SimpleNamespace(args=args)

    documents = {"task": {"test": [{}]}}
    with pytest.raises(SampleTooLong, match="task/test/0"):
        simple.generate_until([ask("x" * 600)], documents)
    lenient = Adapter(model, chat=False, batch_size=2, overlong="empty")
    drawn = ask("x" * 300, max_new_tokens=4000, temperature=5.0)
    none, first, second = lenient.generate_until([ask("x" * 600), drawn, drawn], documents)
    assert none.text == ""
    assert first.text != second.text  # repeats are drawn anew
    # An answer gets what is left of the context, rounded down to a power of two.
    room = model.config.llm.max_positions - first.input_tokens
    assert 0 < first.output_tokens <= 1 << (room.bit_length() - 1)


@pytest.mark.slow
def test_a_video_beside_a_question_without_one(model, adapters):
    frames = [image.resize((20, 20)) for image in IMAGES]
    args = [
        ("what?", {"max_new_tokens": 4}, lambda doc, own=own: own, 0, "task", "test")
        for own in ([frames], [])
    ]
    requests = [types.SimpleNamespace(args=each) for each in args]
    found = adapters["simple"].generate_until(requests, {"task": {"test": [{}]}})
    assert found[0].text == model.generate(video=frames, prompt="what?", max_new_tokens=4, batch_size=2)
    assert found[1].text == model.generate(prompt="what?", max_new_tokens=4, batch_size=2)


def places(conversation):
    """Turns as (role, parts), and the sources of the media."""
    return [(turn.role, turn.parts) for turn in conversation.turns], [m.source for m in conversation.media]


def test_where_images_stand():
    a, b, _ = IMAGES
    first = [("human", ("", "", "\nwhat?"))]
    assert places(from_context("what?", [a, b], sample="s")) == (first, [a, b])
    assert places(from_context("<image> or <image>?", [a, b], sample="s")) == (
        [("human", ("", " or ", "?"))],
        [a, b],
    )
    # As many marks as images are places, others are words.
    assert places(from_context("<image>?", [a, b], sample="s")) == (
        [("human", ("", "", "\n<image>?"))],
        [a, b],
    )
    assert places(from_context("<image>?", None, sample="s")) == ([("human", ("<image>?",))], [])
    mixed = from_context("what?", [medium_video := "clip.mp4", a, "x.png"], sample="s")
    assert [each.kind for each in mixed.media] == [IMAGE, IMAGE, VIDEO]
    assert mixed.media[2].source == medium_video


def user(*contents):
    return {"role": "user", "content": list(contents)}


def text(words):
    return {"type": "text", "text": words}


def picture(image):
    return {"type": "image", "url": image}


def test_messages():
    a, b, _ = IMAGES
    asked = [
        {"role": "system", "content": [text("Be brief.")]},
        user(picture(a), text("what?")),
        {"role": "assistant", "content": "A cat."},
        user(text("and "), picture(b), text(" here?")),
        user(text("Say.")),
    ]
    turns = [
        ("system", ("Be brief.",)),
        ("human", ("", "\nwhat?")),
        ("gpt", ("A cat.",)),
        ("human", ("and ", " here?\nSay.")),
    ]
    assert places(from_messages(asked, sample="s")) == (turns, [a, b])
    clip = {"type": "video", "url": "clip.mp4", "start_time": 1.5, "end_time": 3}
    assert from_messages([user(clip, text("?"))], sample="s").media[0].segment == (1.5, 3.0)
    for wrong, said in (
        ([user({"type": "audio", "url": "x"})], "audio"),
        ([{"role": "tool", "content": ""}], "tool"),
        ([{"role": "assistant", "content": "Yes."}], "not the user's"),
        ([{"role": "assistant", "content": [picture(a)]}, user(text("?"))], "shows image"),
    ):
        with pytest.raises(SampleError, match=said):
            from_messages(wrong, sample="s")
    for wrong in ("sound.wav", "https://example.com/x.mp4", {"array": [0.0], "sampling_rate": 1}):
        with pytest.raises(SampleError, match="sample 's'"):
            medium(wrong, sample="s")
    cut = {"type": "video", "path": "clip.mp4", "video_start": 2, "video_end": None}
    assert medium(cut, sample="s").segment == (2.0, float("inf"))


def test_arguments_of_the_command_line(monkeypatch, model):
    loaded = {}

    def load(path, **given):
        loaded.update(path=path, **given)
        return model

    monkeypatch.setattr(setup, "load", load)
    arguments = {"pretrained": "runs/mine", "template": "v1", "seed": 3, "video.frames": 4, "mesh.data": -1}
    adapter = setup.make_adapter("", arguments, "auto", chat=True)
    assert (loaded["path"], loaded["template"], adapter.seed, adapter.batch_size) == (
        "runs/mine",
        "v1",
        3,
        16,
    )
    assert adapter._reader(True).config.video.frames == 4
    assert adapter._reader(False) is model
    for wrong, said in (
        ({"templat": "x"}, "did you mean 'template'"),
        ({"video.frames": "many"}, r"video\.frames"),
        ({"device": "cuda"}, "JAX_PLATFORMS"),
        ({}, "path=DIRECTORY"),
    ):
        with pytest.raises(ConfigError, match=said):
            setup.make_adapter("", wrong, 1, chat=False)


def test_the_classes_that_lmms_eval_loads(monkeypatch, model):
    """With stand-ins for what they take from the harness, which is not installed here."""

    class Base:
        def __init__(self):
            self.task_dict = {}

    @dataclasses.dataclass
    class Result:
        text: object
        token_counts: object = None

    monkeypatch.setattr(lmms_eval, "_classes", lambda: lmms_eval.make_classes(Base, Result, tuple))
    for name, chat in ((lmms_eval.SIMPLE, False), (lmms_eval.CHAT, True)):
        kind = getattr(lmms_eval, name)
        assert kind.is_simple != chat
        monkeypatch.setattr(setup, "load", lambda path, **given: model)
        made = kind(path="x", batch_size="2")
        assert made.adapter.chat == chat
    requests, made.task_dict, _ = recorded("simple", "loglikelihood", "likelihood")
    made.adapter.chat = False
    ((value, greedy),) = [each.text for each in made.loglikelihood(requests[:1])]
    assert isinstance(value, float)
    assert isinstance(greedy, bool)
    assert not made.loglikelihood(requests[:1])[0].text.strip()  # what lmms-eval's cache asks
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        lmms_eval.MllmJax(path="x")
