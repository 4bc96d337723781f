"""Gemma 2: offset RMSNorms around each half, soft-capping, scaled embeddings, alternating windows."""

from typing import Any

from mllm_jax.interop.families import llama
from mllm_jax.interop.families.base import Family, Json
from mllm_jax.interop.families.names import activation_name, our_activation
from mllm_jax.interop.families.qwen import layer_types, layer_windows
from mllm_jax.interop.rules import Rule, norm
from mllm_jax.models.decoder import DecoderConfig


def read(fields: Json) -> DecoderConfig:
    """The decoder of a gemma2 config."""
    return DecoderConfig(
        **llama.common(fields),
        eps=float(fields["rms_norm_eps"]),
        activation=our_activation(fields["hidden_activation"]),
        qkv_bias=fields["attention_bias"],
        out_bias=fields["attention_bias"],
        norm="rms_offset",
        post_norms=True,
        windows=layer_windows(fields),
        attention_scale=fields["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=_number(fields["attn_logit_softcapping"]),
        logit_softcap=_number(fields["final_logit_softcapping"]),
        scale_embeddings=True,
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def write(config: DecoderConfig) -> dict[str, Any]:
    """A gemma2 config."""
    scale = config.head_width**-0.5 if config.attention_scale is None else config.attention_scale
    fields = {
        **llama.write_common(config, "gemma2", "Gemma2ForCausalLM"),
        "head_dim": config.head_width,
        "rms_norm_eps": config.eps,
        "hidden_activation": activation_name(config.activation),
        "hidden_act": activation_name(config.activation),
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": _inverse_square(scale),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "layer_types": layer_types(config),
    }
    if config.windows:
        fields["sliding_window"] = max(config.windows)
    return fields


def _inverse_square(scale: int | float) -> int | float:
    """The number whose -1/2 power is `scale`; whole when it can be."""
    exact = scale**-2
    return round(exact) if round(exact) ** -0.5 == scale else exact


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """The weight-name table; the names of the norms differ from Llama's."""
    layer = llama.LAYER
    renamed = {"blocks/norm2": f"{layer}.pre_feedforward_layernorm"}
    shared = [
        Rule(rule.path, f"{renamed[rule.path.removesuffix('/scale')]}.weight", rule.transform)
        if rule.path.removesuffix("/scale") in renamed
        else rule
        for rule in llama.rules(config)
    ]
    return (
        *shared,
        *norm("blocks/post_norm1", f"{layer}.post_attention_layernorm", bias=False),
        *norm("blocks/post_norm2", f"{layer}.post_feedforward_layernorm", bias=False),
    )


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read=read,
    write=write,
    rules=rules,
    ignored=llama.IGNORED,
)
