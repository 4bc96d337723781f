"""Peak memory of this process while 64 prompts of 2,048 tokens are read by an LLM of the mini LLM's size, as JSON.

python tests/inference/prefill_memory.py generate|likelihood [BYTES]
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import interop
from mllm_jax.data.tokens import EncodedSample
from mllm_jax.inference.batching import Request
from mllm_jax.inference.generate import generate
from mllm_jax.inference.likelihood import answer_log_likelihoods
from mllm_jax.models import mllm

PROMPTS, LENGTH = 64, 2048


def peak_bytes():
    """Of this program alone; `ru_maxrss` begins with what the process that started it had."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


class Ids:
    """A tokenizer that writes ids."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


def request(index, rng, answer):
    length = LENGTH if answer else LENGTH - 1  # the other position is that of the generated token
    weights = np.zeros(length, np.float32)
    if answer:
        weights[-answer:] = 1
    tokens = rng.integers(3, 1000, length).astype(np.int32)
    text = np.full(length, -1, np.int32)
    return Request(str(index), EncodedSample(str(index), tokens, weights, text, text, ()))


def main(what, *limit):
    config = mllm.ModelConfig(interop.vision_config("mini"), interop.llm_config("mini"), 84, remat="none")
    rng = np.random.default_rng(0)
    shapes = mllm.abstract_params(config)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.05, leaf.shape), leaf.dtype), shapes)
    settings = {"batch_size": PROMPTS} | ({"prefill_bytes": int(limit[0])} if limit else {})
    before = peak_bytes()
    if what == "generate":
        requests = [request(index, rng, 0) for index in range(PROMPTS)]
        found = generate(config, params, requests, Ids(), max_new_tokens=1, stop_ids=[], **settings)
        answers = [one.text for one in found]
    else:
        requests = [request(index, rng, 1024) for index in range(PROMPTS)]
        answers = list(answer_log_likelihoods(config, params, requests, **settings))
    print(json.dumps({"before_bytes": before, "peak_bytes": peak_bytes(), "answers": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
