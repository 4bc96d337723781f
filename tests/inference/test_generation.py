import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.data.batch import Batch
from mllm_jax.data.conversations import SampleError
from mllm_jax.data.layout import Slot, WholeImage
from mllm_jax.data.tokens import EncodedSample, SampleTooLong
from mllm_jax.inference import session
from mllm_jax.inference.batching import Request, chunks
from mllm_jax.inference.generate import generate
from mllm_jax.inference.likelihood import option_log_likelihoods
from mllm_jax.models import mllm
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.vit import VisionConfig

VOCAB = 40
STOP = 34


class Letters:
    """Decodes id i to the i-th letter from "A" on; enough of a tokenizer for generation."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return " " + "".join(chr(65 + i) for i in ids)


@pytest.fixture(scope="module")
def config():
    return mllm.ModelConfig(
        vision=VisionConfig(16, 2, 2, 32, 4, 8, class_token=False),
        llm=DecoderConfig(VOCAB, 16, 2, 2, 1, 8, 24, max_positions=64),
        image_size=8,
        remat="none",
        vision_remat="none",
    )


def make_params(config):
    """Large random weights, so that greedy tokens vary and depend on everything before them."""
    tree = jax.jit(mllm.init, static_argnums=0)(config, jax.random.key(1))
    return jax.tree.map(lambda leaf: leaf * (12 if leaf.ndim > 1 else 1), tree)


@pytest.fixture(scope="module")
def params(config):
    return make_params(config)


def load(key, layout):
    return np.random.default_rng(key).integers(0, 256, (len(layout.slots), 8, 8, 3), dtype=np.uint8)


def prompt(before, images, after, answer=(), tokens_per_image=4):
    """`before` ids, the images' placeholders, `after` ids and a supervised answer."""
    visual = tokens_per_image * images
    tokens = [*before, *[0] * visual, *after, *answer]
    image_of = np.full(len(tokens), -1, np.int32)
    image_of[len(before) : len(before) + visual] = np.arange(visual) // tokens_per_image
    weights = np.zeros(len(tokens), np.float32)
    if answer:
        weights[-len(answer) :] = 1
    seen = image_of >= 0
    return EncodedSample(
        "x",
        np.asarray(tokens, np.int32),
        weights,
        np.where(seen, np.cumsum(seen) - 1, -1).astype(np.int32),
        image_of,
        (WholeImage(Slot(tokens_per_image, size=(8, 8)))(),) * images,
    )


def make_requests(count=23, seed=0):
    """Prompts of many lengths, with no, one or two images, some of them shared; one ends in its image."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        images = int(rng.choice([0, 1, 1, 1, 2]))
        after = rng.integers(4, VOCAB, int(rng.integers(1, 14))).tolist()
        if index == 5:
            images, after = 1, []
        before = [1, 7] if index % 4 else [1, 9, 9]
        keys = tuple(int(key) for key in rng.integers(0, 4, images))
        made.append(Request(f"q{index}", prompt(before, images, after), keys))
    return made


LENGTH = 48  # of the reference's only row; longer than any prompt with its answer


@functools.partial(jax.jit, static_argnums=0)
def _all_logits(config, params, batch):
    return mllm.apply(config, params, batch)[0]


def logits_without_cache(config, params, request, extra=()):
    """Logits [T, V] of one row, computed without cache, prefixes or neighbours."""
    sample = request.prompt
    total = len(sample) + len(extra)

    def padded(values, fill):
        return np.concatenate([values, np.full(LENGTH - len(values), fill)]).astype(np.int32)[None]

    images = np.zeros((1, 2, 8, 8, 3), np.uint8)
    for slot, key in enumerate(request.images):
        images[0, slot : slot + 1] = load(key, sample.layouts[slot])
    batch = Batch(
        tokens=padded([*sample.tokens, *extra], 0),
        positions=padded(np.arange(total), 0),
        segment_ids=padded(np.ones(total), 0),
        visual_index=padded(sample.visual_index, -1),
        images=images,
        image_mask=np.arange(2)[None] < len(request.images),
    )
    return np.asarray(_all_logits(config, params, batch)[:total])


def greedy(config, params, request, max_new_tokens):
    out = []
    for _ in range(max_new_tokens):
        token = int(logits_without_cache(config, params, request, out)[-1].argmax())
        if token == STOP:
            return tuple(out), True
        out.append(token)
    return tuple(out), False


def run(config, params, requests, **settings):
    settings = {"load_image": load, "max_new_tokens": 5, "batch_size": 4, "stop_ids": [STOP]} | settings
    return list(generate(config, params, iter(requests), Letters(), **settings))


@pytest.fixture(scope="module")
def expected(config, params):
    return {r.id: greedy(config, params, r, 5) for r in make_requests()}


@pytest.mark.parametrize(
    ("batch_size", "buckets"),
    [
        (4, (2, 8, 16)),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [(1, (16,)), (5, (64,)), (32, (3,))]),
    ],
    ids=str,
)
def test_token_for_token_as_without_cache(config, params, expected, batch_size, buckets):
    requests = make_requests()
    answers = run(config, params, requests, batch_size=batch_size, buckets=buckets)
    assert [a.id for a in answers] == [r.id for r in requests]
    assert {a.id: (a.tokens, a.stopped) for a in answers} == expected
    assert len({a.tokens for a in answers}) > 15  # the test would see a row that got another's answer


@pytest.mark.parametrize("steps", [1, 3])
def test_rows_leave_a_batch_when_they_are_done(config, params, expected, steps, monkeypatch):
    regrown, sizes = session._regrown, []

    def noted(state, rows, more):
        sizes.append(len(rows))
        return regrown(state, rows, more)

    monkeypatch.setattr(session, "_STEPS", steps)
    monkeypatch.setattr(session, "_regrown", noted)
    early = [r for r in make_requests() if expected[r.id][1] and len(expected[r.id][0]) < 4]
    late = [r for r in make_requests() if not expected[r.id][1]][: len(early)]
    answers = run(config, params, early + late, batch_size=2 * len(early))
    assert {a.id: (a.tokens, a.stopped) for a in answers} == {r.id: expected[r.id] for r in early + late}
    assert sizes[0] == 2 * len(early)
    assert sizes[-1] < sizes[0]


def test_expected_answers_have_stops_at_several_places(expected):
    lengths = {len(tokens) for tokens, stopped in expected.values() if stopped}
    assert len(lengths) > 1
    assert not all(stopped for _, stopped in expected.values())


def test_bfloat16_answers_do_not_depend_on_batching(config, params):
    half = dataclasses.replace(config, dtype="bfloat16")
    first = run(half, params, make_requests(), batch_size=4, buckets=(16,))
    second = run(half, params, make_requests(), batch_size=23, buckets=(32,))
    assert [a.tokens for a in first] == [a.tokens for a in second]
    assert len({a.tokens for a in first}) > 15


def test_text_cut_at_stop_text(config, params):
    plain = run(config, params, make_requests(), stop_ids=[])
    assert all(not a.stopped and len(a.tokens) == 5 for a in plain)
    letter = plain[0].text[2]
    cut = run(config, params, make_requests(), stop_ids=[], stop_text=letter)
    assert cut[0].text == plain[0].text[: plain[0].text.index(letter)]
    assert cut[0].stopped


def test_text_only_requests_need_no_images(config, params):
    request = Request("t", prompt([1], 0, [4, 5, 6]))
    answers = run(config, params, [request, request], load_image=None)
    assert answers[0].tokens == answers[1].tokens == greedy(config, params, request, 5)[0]
    assert run(config, params, []) == []


def test_each_image_is_loaded_once_per_chunk(config, params):
    loaded = []

    def counting(key, layout):
        loaded.append(key)
        return load(key, layout)

    batches = []
    requests = [Request(f"{i}", prompt([1], 1, [4 + i]), (i % 3,)) for i in range(12)]
    run(config, params, requests, load_image=counting, on_batch=batches.append)
    assert sorted(loaded) == [0, 1, 2]
    assert batches == [4, 4, 4]


def test_chunks_keep_order_and_limits():
    requests = make_requests(40)
    parts = list(chunks(iter(requests), max_requests=9, max_prefixes=5))
    assert [r.id for part in parts for r in part.requests] == [r.id for r in requests]
    assert max(len(part.requests) for part in parts) <= 9
    assert max(len(part.prefixes) for part in parts) <= 5
    for part in parts:
        for request, which in zip(part.requests, part.prefix_of, strict=True):
            assert part.prefixes[which].prefix_key == request.prefix_key


def test_errors_name_the_request(config, params):
    with pytest.raises(SampleTooLong, match=r"long.*limit of 64"):
        run(config, params, [Request("long", prompt([1], 0, [4] * 60))])
    with pytest.raises(SampleError, match=r"'odd'.*1 image\(s\)"):
        run(config, params, [Request("odd", prompt([1], 2, [4]), (0,))])
    with pytest.raises(ValueError, match="'blindfold' has images"):
        run(config, params, [Request("blindfold", prompt([1], 1, [4]), (0,))], load_image=None)
    with pytest.raises(ValueError, match="batch_size=0"):
        run(config, params, [], batch_size=0)


def test_errors_of_the_image_loader_are_passed_on(config, params):
    def broken(key, layout):
        raise OSError("no such image")

    with pytest.raises(OSError, match="no such image"):
        run(config, params, make_requests(), load_image=broken)


@pytest.mark.parametrize(("batch_size", "buckets"), [(3, (4, 16, 32)), (16, (32,))])
def test_option_log_likelihoods(config, params, batch_size, buckets):
    rng = np.random.default_rng(3)
    questions = []
    for index in range(5):
        images = int(rng.integers(0, 3))
        after = rng.integers(4, VOCAB, index).tolist() or [8]
        keys = tuple(int(key) for key in rng.integers(0, 4, images))
        options = [rng.integers(4, VOCAB, int(rng.integers(1, 6))).tolist() for _ in range(index % 3 + 2)]
        questions.append(
            [Request(f"{index}", prompt([1, 7], images, after, [*o, STOP]), keys) for o in options]
        )
    found = list(
        option_log_likelihoods(
            config, params, questions, load_image=load, batch_size=batch_size, buckets=buckets
        )
    )
    assert [len(scores) for scores in found] == [len(options) for options in questions]
    for options, scores in zip(questions, found, strict=True):
        for request, score in zip(options, scores, strict=True):
            logits = logits_without_cache(config, params, request)
            places = np.flatnonzero(request.prompt.loss_weights)
            logs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=-1))
            assert score == pytest.approx(
                logs[places - 1, request.prompt.tokens[places]].sum(), rel=1e-4, abs=1e-4
            )
