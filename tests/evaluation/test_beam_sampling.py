"""Sampled beams against a plain loop without cache, and that the draws belong to the question."""

import jax
import numpy as np
import pytest
from test_generation import STOP, VOCAB, config, logits_without_cache, make_requests, params, run  # noqa: F401

from mllm_jax.evaluation.beam_sampling import Sampling

STEPS = 4
OTHER_STOP = 7


def log_softmax(values):
    values = np.asarray(values, np.float64)
    return values - np.log(np.sum(np.exp(values - values.max()))) - values.max()


def reference(config, params, request, sampling, stops):  # noqa: F811
    """One question by the rules of transformers' beam sampling, with lists instead of arrays."""
    width = sampling.beams
    beams = [((), 0.0)] * width
    ended = []
    key = jax.random.wrap_key_data(sampling.key(request.id), impl="threefry2x32")
    for step in range(STEPS):
        logits = [logits_without_cache(config, params, request, tokens)[-1] for tokens, _ in beams]
        total = np.concatenate(
            [
                (log_softmax(row) + score) / sampling.temperature
                for row, (_, score) in zip(logits, beams, strict=True)
            ]
        )
        noise = np.asarray(jax.random.gumbel(jax.random.fold_in(key, step), (width * VOCAB,)))
        drawn = np.argsort(-(total + noise), kind="stable")[: width * (1 + len(stops))]
        drawn = sorted(drawn, key=lambda place: -total[place])
        best, after = total[drawn[0]] / (step + 1), []
        for rank, place in enumerate(drawn):
            tokens, token = beams[place // VOCAB][0], int(place % VOCAB)
            if token not in stops:
                after.append(((*tokens, token), total[place]))
            elif rank < width:
                ended = sorted([*ended, (total[place] / (step + 1), tokens)], key=lambda e: -e[0])[:width]
        beams = after[:width]
        if len(ended) == width and ended[-1][0] >= best:
            break
    else:
        ended += [(score / STEPS, tokens, False) for tokens, score in beams]
    _, tokens, *unfinished = max(ended, key=lambda e: e[0])
    return tokens, not unfinished


def test_beams_are_those_of_the_plain_loop(config, params):  # noqa: F811
    sampling, stops = Sampling(1, 2, 2.0), (STOP, OTHER_STOP)
    requests = make_requests(9)
    settings = {"sampling": sampling, "stop_ids": list(stops), "max_new_tokens": STEPS}
    found = run(config, params, requests, batch_size=4, **settings)
    assert {a.id: (a.tokens, a.stopped) for a in found} == {
        r.id: reference(config, params, r, sampling, stops) for r in requests
    }
    assert len({a.stopped for a in found}) == 2  # both kinds of answers were met


def test_draws_belong_to_seed_and_question(config, params):  # noqa: F811
    requests = make_requests(9)

    def tokens(seed, order, **settings):
        settings = {"sampling": Sampling(seed, 3, 4.0), "max_new_tokens": STEPS} | settings
        return {a.id: a.tokens for a in run(config, params, order, **settings)}

    first = tokens(42, requests)
    assert tokens(42, requests[:1:-1], batch_size=1, buckets=(64,)) == dict(list(first.items())[2:])
    assert tokens(43, requests) != first


def test_impossible_sampling():
    for values in ({"beams": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="at least one beam"):
            Sampling(**values)
