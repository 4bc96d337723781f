"""Splash attention compiles for TPUs that are not here; whether it computes the right thing there, its check says."""

import jax
import jax.numpy as jnp
import pytest

from mllm_jax.models import attention
from mllm_jax.models.attention import AttentionMask, Use
from mllm_jax.parallel.mesh import row_sharding, use_mesh
from mllm_jax.planning.topology import parse
from mllm_jax.training.stage import StagePlan

pytest.importorskip("libtpu", reason="compiles for a TPU topology")

TOPOLOGY = "v5p:2x2x1"
CASES = {  # heads, kv heads, head width, length, causal, window, soft cap
    "Llama 3 8B": (32, 8, 128, 2048, True, None, None),
    "Gemma 2 2B": (8, 4, 256, 1000, True, 512, 50.0),
    "CLIP-L at 336": (16, 16, 64, 577, False, None, None),
    "SigLIP so400m at 384": (16, 16, 72, 729, False, None, None),
}


@pytest.fixture(scope="module")
def mesh():
    return parse(TOPOLOGY).mesh({"fsdp": 2, "tensor": 2})


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_compile(case, mesh):
    heads, kv_heads, width, length, causal, window, softcap = CASES[case]

    def loss(q, k, v, segments):
        mask = AttentionMask(segments, segments, window=window) if causal else None
        return attention.attend(q, k, v, mask, "auto", softcap=softcap).astype(jnp.float32).sum()

    q, k = (jax.ShapeDtypeStruct((4, length, count, width), jnp.bfloat16) for count in (heads, kv_heads))
    segments = jax.ShapeDtypeStruct((4, length), jnp.int32)
    with use_mesh(mesh):
        use = Use(heads, kv_heads, width, "bfloat16", masked=causal, window=window, softcap=softcap)
        assert attention.choose("auto", use, attention.current_platform())[0] == "splash"
        step = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=(row_sharding(mesh),) * 4)
        compiled = step.lower(q, k, k, segments).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 3  # forward, dq, dkv
    logits = 4 * (4 // 2) * (heads // 2) * length**2
    assert compiled.memory_analysis().temp_size_in_bytes < logits


def test_a_whole_training_step_compiles(mesh, tiny_config):
    """Under the scan over blocks, rematerialisation and the mesh of a stage."""
    tiny_config.model.dtype = "bfloat16"
    plan = StagePlan(tiny_config, "finetune", mesh)
    assert plan.model.attention == "auto"
    text = plan.lower().compile().as_text()
    assert text.count("tpu_custom_call") == 4  # forward of the tower; forward, dq and dkv of the LLM
