"""What an int8 base costs an LLM: size, next-token loss and logits beside the unrounded weights.

python benchmarks/int8_base.py                       # the shipped mini LLM on texts of the mini world
python benchmarks/int8_base.py --llm=PATH --text=FILE
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import interop
from mllm_jax.mini.world.captions import long_caption
from mllm_jax.mini.world.sampler import sample_scene
from mllm_jax.models.decoder import Decoder
from mllm_jax.models.paths import flatten
from mllm_jax.models.quantize import quantize
from mllm_jax.training.adapters import INT8_TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llm", default="mini")
    parser.add_argument("--text", type=pathlib.Path, help="UTF-8 text (default: captions of the mini world)")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    tokenizer, config = interop.load_tokenizer(args.llm), interop.llm_config(args.llm)
    if args.text:
        text = args.text.read_text(encoding="utf-8")
    else:
        text = " ".join(long_caption(sample_scene(1, index, "finetune")) for index in range(4 * args.rows))
    ids = np.asarray(tokenizer(text, add_special_tokens=False).input_ids)
    rows = min(args.rows, len(ids) // args.length)
    tokens = jnp.asarray(ids[: rows * args.length].reshape(rows, args.length), jnp.int32)
    params = {"llm": interop.load_llm(args.llm)}
    stored = quantize(params, INT8_TARGETS)
    model = Decoder(config)

    def every(decoder):
        positions = jnp.broadcast_to(jnp.arange(args.length), tokens.shape)
        hidden, _ = decoder(decoder.embed(tokens), positions, jnp.ones_like(tokens))
        return jax.nn.log_softmax(decoder.logits(hidden))

    exact, rounded = (
        jax.jit(lambda p: model.apply({"params": p["llm"]}, method=every))(p) for p in (params, stored)
    )

    def loss(scores):
        return -float(jnp.take_along_axis(scores[:, :-1], tokens[:, 1:, None], axis=-1).mean())

    sizes = [sum(leaf.nbytes for leaf in flatten(p).values()) for p in (params, stored)]
    divergence = float((jnp.exp(exact) * (exact - rounded)).sum(-1).mean())
    agree = float((exact.argmax(-1) == rounded.argmax(-1)).mean())
    print(
        f"{rows * args.length} tokens; {sizes[0] / 1e6:.1f} MB unrounded, {sizes[1] / 1e6:.1f} MB with int8 blocks"
    )
    print(f"next-token loss {loss(exact):.5f} unrounded, {loss(rounded):.5f} with int8")
    print(f"KL divergence {divergence:.2e} nats per token; {agree:.2%} of the greedy tokens are the same")


if __name__ == "__main__":
    main()
