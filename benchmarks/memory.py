"""What a training step and a decode step need beyond what they are given; compiled from shapes, no array is made.

python benchmarks/memory.py                  # on the devices that are there; JAX_PLATFORMS=cpu for the CPU's compiler
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp

from mllm_jax.config import stage_config
from mllm_jax.data.batch import Batch
from mllm_jax.models import mllm, paths
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.vit import VisionConfig
from mllm_jax.parallel.mesh import batch_shardings, make_mesh, use_mesh
from mllm_jax.parallel.sharding import param_shardings
from mllm_jax.training import step
from mllm_jax.training.optimizer import make_optimizer

MODEL = mllm.ModelConfig(
    vision=VisionConfig(width=64, depth=2, heads=2, mlp_width=128, patch=14, image_size=56),
    llm=DecoderConfig(32000, 1024, 8, heads=16, kv_heads=8, head_width=64, mlp_width=2816, tied=True),
    image_size=56,
)

DECODED = dataclasses.replace(
    MODEL, llm=dataclasses.replace(MODEL.llm, depth=16, kv_heads=16, max_positions=2048), remat="none"
)


def temporaries(compiled: jax.stages.Compiled) -> float:
    """MB beside arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def train_step(optimizer: str) -> jax.stages.Compiled:
    """A step that trains connector and LLM in float32, 2 rows of 128 tokens."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    stage = stage_config()
    stage.optimizer = optimizer
    trained, frozen = paths.split(mllm.abstract_params(MODEL), ("connector/.*", "llm/.*"))
    made, _ = make_optimizer(stage, trained, 10)
    state = jax.eval_shape(lambda params: step.init_state(params, made), trained)
    batch = Batch.spec(2, length=128, slots=1, image_size=MODEL.visual_layout.slot.size)
    given = (
        step.with_shardings(state, step.state_shardings(state, mesh, MODEL)),
        step.with_shardings(frozen, param_shardings(frozen, mesh, MODEL)),
        step.with_shardings(batch, batch_shardings(batch, mesh)),
    )
    with use_mesh(mesh):
        fn = step.make_train_step(MODEL, made, *given, label_tokens=64, accumulation=1, seed=0)
        return fn.lower(*given).compile()


def decode_step() -> tuple[jax.stages.Compiled, float]:
    """One token for each of 8 rows with a donated cache of 2,048 columns, and the cache's MB."""
    params = mllm.abstract_params(DECODED)
    cache = jax.eval_shape(lambda: mllm.empty_cache(DECODED, 8, 2048))
    tokens = jax.ShapeDtypeStruct((8, 1), jnp.int32)

    def step(params, tokens, positions, cache):
        return mllm.apply(DECODED, params, tokens, positions, cache, method="decode")

    size = (cache.k.size + cache.v.size) * cache.k.dtype.itemsize / 1e6
    return jax.jit(step, donate_argnums=3).lower(params, tokens, tokens, cache).compile(), size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    size = 4 * paths.count({"llm": mllm.abstract_params(MODEL)["llm"]}) / 1e6
    for optimizer in ("adamw", "muon"):
        used = temporaries(train_step(optimizer))
        print(f"{optimizer} step, {size:.0f} MB trained: {used:.0f} MB of temporaries")
    compiled, size = decode_step()
    print(f"decode step, cache of {size:.0f} MB donated: {temporaries(compiled):.0f} MB of temporaries")


if __name__ == "__main__":
    main()
