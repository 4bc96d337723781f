"""Phi-1, 1.5 and 2: LayerNorm, partial rotary, biases everywhere, attention and MLP in parallel."""

from typing import Any

from mllm_jax.interop.families import llama
from mllm_jax.interop.families.base import Family, Json
from mllm_jax.interop.families.names import activation_name, our_activation
from mllm_jax.interop.rules import Rule, linear, norm
from mllm_jax.models.decoder import DecoderConfig


def read(fields: Json) -> DecoderConfig:
    """The decoder of a phi config."""
    if fields["qk_layernorm"]:
        raise ValueError("phi with qk_layernorm=true is not supported (no released checkpoint has it)")
    return DecoderConfig(
        **llama.common(fields, partial_rotary=True),
        eps=float(fields["layer_norm_eps"]),
        activation=our_activation(fields["hidden_act"]),
        rotary_fraction=float(fields["rope_parameters"].get("partial_rotary_factor", 1.0)),
        norm="layer",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
        gated=False,
        parallel=True,
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """A phi config."""
    return {
        **llama.write_common(config, "phi", "PhiForCausalLM"),
        "layer_norm_eps": config.eps,
        "hidden_act": activation_name(config.activation),
        "partial_rotary_factor": config.rotary_fraction,
    }


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """The weight-name table."""
    layer = llama.LAYER
    return (
        Rule("embedding", "model.embed_tokens.weight"),
        *norm("blocks/norm1", f"{layer}.input_layernorm"),
        *linear("blocks/q", f"{layer}.self_attn.q_proj"),
        *linear("blocks/k", f"{layer}.self_attn.k_proj"),
        *linear("blocks/v", f"{layer}.self_attn.v_proj"),
        *linear("blocks/o", f"{layer}.self_attn.dense"),
        *linear("blocks/fc1", f"{layer}.mlp.fc1"),
        *linear("blocks/fc2", f"{layer}.mlp.fc2"),
        *norm("final_norm", "model.final_layernorm"),
        *llama.head(config),
    )


FAMILY = Family(
    model_type="phi",
    architecture="PhiForCausalLM",
    read=read,
    write=write,
    rules=rules,
    ignored=llama.IGNORED,
)
