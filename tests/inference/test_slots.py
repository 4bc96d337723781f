"""Answers of slots, which join and leave at any step, are those of `generate`."""

import dataclasses

import jax
import numpy as np
import pytest
from test_generation import STOP, config, load, make_params, make_requests, run  # noqa: F401

from mllm_jax.inference import slots
from mllm_jax.inference.prefix_cache import PrefixCache
from mllm_jax.inference.sampling import Sampling
from mllm_jax.inference.slots import Slots

SHORT, LONG = 5, 35  # tokens of answers; only one is long


def answered(asked, cache, requests, sampling):
    """Tokens and whether a stop id came of every request, some of which join while others are being answered."""
    waiting, present, found, columns = list(requests), {}, {}, set()

    def note(row, name, token, stopped, done):
        tokens = found.setdefault(name, ((), False))[0]
        found[name] = (tokens if stopped else (*tokens, token), stopped)
        if done:
            asked.free(row)
            present.pop(row, None)

    while waiting or present:
        for row in [row for row in range(asked.rows) if row not in present][: len(waiting) and 2]:
            if waiting:
                request = waiting.pop(0)
                present[row] = request.id
                prompts = cache.prompt_batch(request, load)
                which = sampling if request.id != "q2" else None
                wanted = LONG if request.id == "q4" else SHORT
                note(row, request.id, *asked.put(row, prompts, max_new_tokens=wanted, sampling=which))
        columns.add(asked.columns)
        if present:
            progress = asked.step()
            for row, name in list(present.items()):
                note(
                    row,
                    name,
                    int(progress.tokens[row]),
                    bool(progress.stopped[row]),
                    bool(progress.done[row]),
                )
    return found, columns


@pytest.mark.parametrize(
    ("windows", "platform"), [((), "cpu"), pytest.param((0, 3), "gpu", marks=pytest.mark.slow)], ids=str
)
def test_answers_are_those_of_generate(config, windows, platform, monkeypatch):  # noqa: F811
    """Of rows that have a column each, block by block as on CPUs or in a scan, in a cache that grows."""
    monkeypatch.setattr(slots, "_FEWEST", 8)
    monkeypatch.setattr(slots, "current_platform", lambda: platform)
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, windows=windows))
    params = make_params(config)
    requests = make_requests(9)
    asked = Slots(config, params, rows=3, stop_ids=[STOP])
    cache = PrefixCache(config, params)
    whole = {}
    for sampling in (None, Sampling(2.0, 0.9, seed=5)):
        whole |= {a.id: a for a in run(config, params, requests, sampling=sampling, max_new_tokens=LONG)}
        whole["q2"] = whole.get("q2 greedily") or whole["q2"]
        whole["q2 greedily"] = whole["q2"]
        wanted = {}
        for request in requests:
            most, answer = LONG if request.id == "q4" else SHORT, whole[request.id]
            wanted[request.id] = (answer.tokens[:most], answer.stopped and len(answer.tokens) < most)
        found, columns = answered(asked, cache, requests, sampling)
        assert found == wanted
        assert asked.columns == 0
        assert len(columns - {0}) > 1  # it has grown
    assert cache.hits >= len(requests)  # the second time, all prefixes were there
    assert len({tokens for tokens, _ in wanted.values()}) > 4


def test_what_cannot_be_put(config):  # noqa: F811
    params = jax.tree.map(np.asarray, make_params(config))
    asked = Slots(config, params, rows=1, stop_ids=[STOP], most_columns=40)
    (request,) = make_requests(1)
    prompts = PrefixCache(config, params).prompt_batch(request, load)
    with pytest.raises(ValueError, match="more than 40"):
        asked.put(0, prompts, max_new_tokens=60, sampling=None)
    with pytest.raises(ValueError, match="no slot is in use"):
        asked.step()
    asked.put(0, prompts, max_new_tokens=5, sampling=None)
    with pytest.raises(ValueError, match="in use"):
        asked.put(0, prompts, max_new_tokens=5, sampling=None)


def test_prefixes_leave_by_their_size(config):  # noqa: F811
    params = make_params(config)
    requests = [request for request in make_requests() if request.images][:3]
    cache = PrefixCache(config, params, most_bytes=1)
    for request in [*requests[:2], requests[1], requests[0]]:
        cache.prompt_batch(request, load)
    assert (cache.hits, cache.misses) == (1, 3)
