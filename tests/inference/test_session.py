"""Steps from the host give what `generate` gives, and a slot can be given to another prompt."""

import dataclasses

import numpy as np
import pytest
from test_generation import (  # noqa: F401
    STOP,
    config,
    expected,
    load,
    make_params,
    make_requests,
    params,
    run,
)

from mllm_jax.inference import session
from mllm_jax.inference.prefixes import answer_in_order
from mllm_jax.inference.sampling import Sampling
from mllm_jax.inference.session import Session


def batches(config, params, requests, batch_size, bucket=16):  # noqa: F811
    """`PromptBatch`es of requests."""
    found = []

    def keep(prompts):
        found.append(prompts)
        return [None] * len(prompts.requests)

    settings = {"batch_size": batch_size, "buckets": (bucket,), "threads": 1, "limit": 1 << 30}
    list(answer_in_order(config, params, iter(requests), keep, load_image=load, **settings))
    return found


def stepped(session, state, answers):
    """Runs a state to its end, a step at a time; appends the tokens of every row."""
    while True:
        for row, answer in enumerate(answers):
            if answer is not None and len(answer) < int(state.counts[row]):
                answer.append(int(state.tokens[row]))
        if bool(state.done.all()):
            return state
        state = session.step(state)


def test_steps_are_those_of_generate(config, params, expected):  # noqa: F811
    session = Session(config, params, stop_ids=[STOP])
    for prompts in batches(config, params, make_requests(), 4):
        state = session.prefill(prompts, max_new_tokens=5)
        assert (np.asarray(state.logits).argmax(-1) == np.asarray(state.tokens)).all()
        answers = [[] for _ in prompts.requests]
        state = stepped(session, state, answers)
        for row, request in enumerate(prompts.requests):
            assert (tuple(answers[row]), bool(state.stopped[row])) == expected[request.id]


@pytest.mark.parametrize(
    ("windows", "platform"),
    [*(pytest.param(one, "cpu", marks=pytest.mark.slow) for one in [(3,), (0, 3)]), ((0, 3), "gpu")],
    ids=str,
)
def test_whole_answers_are_those_of_steps(config, windows, platform, monkeypatch):  # noqa: F811
    """Computed by a scan as steps are, or, on CPUs, block by block with a cache that grows."""
    regrown, columns = session._regrown, []

    def noted(state, rows, more):
        columns.append(more)
        return regrown(state, rows, more)

    monkeypatch.setattr(session, "_STEPS", 3)
    monkeypatch.setattr(session, "_regrown", noted)
    monkeypatch.setattr(session, "current_platform", lambda: platform)
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, windows=windows))
    asked = Session(config, make_params(config), stop_ids=[STOP])
    (prompts,) = batches(config, asked.params, make_requests(6), 6)
    answers = [[] for _ in prompts.requests]
    state = stepped(asked, asked.prefill(prompts, max_new_tokens=9), answers)
    tokens, counts, stopped = asked.answer(prompts, max_new_tokens=9)
    assert [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)] == answers
    assert stopped.tolist() == np.asarray(state.stopped).tolist()
    assert (
        len({tuple(answer) for answer in answers}) > 4
    )  # the test would see a row that got another's answer
    assert columns == ([3, 4, 1] if platform == "cpu" else [])


def test_a_row_that_is_done_is_given_to_another_prompt(config, params, expected):  # noqa: F811
    """While the other rows are at any place of their answers, and with a prompt longer or shorter than theirs."""
    session = Session(config, params, stop_ids=[STOP])
    requests = make_requests()
    first, late = requests[:4], requests[4:9]
    (prompts,) = batches(config, params, first, 4)
    state = session.prefill(prompts, max_new_tokens=5, room=40)
    names, answers = [r.id for r in prompts.requests], [[] for _ in range(4)]
    found = {}

    def note(state):
        for row, name in enumerate(names):
            if name is not None and len(answers[row]) < int(state.counts[row]):
                answers[row].append(int(state.tokens[row]))
            if name is not None and bool(state.done[row]):
                found[name] = (tuple(answers[row]), bool(state.stopped[row]))
                names[row] = None

    note(state)
    while late or any(names):
        if late and None in names:
            row, request = names.index(None), late.pop(0)
            (one,) = batches(config, params, [request], 1, bucket=20)
            state = session.insert(state, [row], session.prefill(one, max_new_tokens=5))
            names[row], answers[row] = request.id, []
        else:
            state = session.step(state)
        note(state)
    assert found == {name: expected[name] for name in found}
    assert len(found) == 9


def test_what_cannot_be_inserted(config, params):  # noqa: F811
    session = Session(config, params, stop_ids=[STOP])
    (prompts,) = batches(config, params, make_requests(2), 2)
    small, large = (session.prefill(prompts, max_new_tokens=n) for n in (2, 9))
    with pytest.raises(ValueError, match="more `room`"):
        session.insert(small, [0, 1], large)
    drawing = session.prefill(prompts, max_new_tokens=2, sampling=Sampling())
    with pytest.raises(ValueError, match="only one of the states draws"):
        session.insert(large, [0, 1], drawing)


def test_requests_of_one_batch_may_be_drawn_differently(config, params, expected):  # noqa: F811
    session = Session(config, params, stop_ids=[STOP])
    requests = make_requests(4)
    (prompts,) = batches(config, params, requests, 4)
    warm = Sampling(2.0, seed=5)
    samplings = [warm if request.id == "q2" else None for request in prompts.requests]
    answers = [[] for _ in prompts.requests]
    stepped(session, session.prefill(prompts, max_new_tokens=5, sampling=samplings), answers)
    drawn = {a.id: a.tokens for a in run(config, params, requests, sampling=warm)}
    for request, answer in zip(prompts.requests, answers, strict=True):
        wanted = drawn if request.id == "q2" else {name: tokens for name, (tokens, _) in expected.items()}
        assert tuple(answer) == wanted[request.id]
