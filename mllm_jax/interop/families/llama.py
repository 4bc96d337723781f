"""Llama 1/2/3, Vicuna, Yi: RMSNorm, rotary, grouped-query attention, gated SiLU MLP."""

from typing import Any

from mllm_jax.interop.families.base import Family, Json
from mllm_jax.interop.families.names import activation_name, our_activation
from mllm_jax.interop.rules import TRANSPOSE, Rule, linear, norm
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.rope import SCALINGS

LAYER = "model.layers.{i}"


# Settings of each rope_type; what transformers does not read for a type (Llama 3's factors with "linear") is refused.
_CONTEXT = "original_max_position_embeddings"
ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor", _CONTEXT}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", _CONTEXT}),
    "yarn": frozenset(
        {
            "factor",
            _CONTEXT,
            "beta_fast",
            "beta_slow",
            "truncate",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
        }
    ),
}


def common(fields: Json, partial_rotary: bool = False) -> dict[str, Any]:
    """What every family's config.json says in the same words.

    Args:
      partial_rotary: the family rotates only a part of each head where partial_rotary_factor says so.

    Raises:
      ValueError: a rope setting that is not supported; it is named.
    """
    heads = fields["num_attention_heads"]
    rope = dict(fields["rope_parameters"])
    theta = float(rope.pop("rope_theta"))
    kind = rope.get("rope_type", "default")
    rope.pop("type", None)  # the older spelling of rope_type
    fraction = rope.pop("partial_rotary_factor", None)
    if kind not in ("default", *SCALINGS):
        raise ValueError(f"rope_type {kind!r} is not supported; supported: default, {', '.join(SCALINGS)}")
    if fraction not in (None, 1) and not partial_rotary:
        raise ValueError(f"partial_rotary_factor={fraction!r} is not supported for this family")
    for key, value in rope.items():
        if key != "rope_type" and key not in ROPE_KEYS[kind] and value is not None:
            raise ValueError(f"rope_parameters: {key}={value!r} is not supported with rope_type {kind!r}")
    if kind != "default" and not rope["factor"] > 0:
        raise ValueError(f"rope_parameters: factor={rope['factor']!r} must be positive")
    return {
        "vocab": fields["vocab_size"],
        "width": fields["hidden_size"],
        "depth": fields["num_hidden_layers"],
        "heads": heads,
        "kv_heads": fields.get("num_key_value_heads") or heads,
        "head_width": fields.get("head_dim") or fields["hidden_size"] // heads,
        "mlp_width": fields["intermediate_size"],
        "rope_theta": theta,
        "rope_scaling": () if kind == "default" else tuple(sorted(rope.items())),
        "tied": fields["tie_word_embeddings"],
        "max_positions": fields["max_position_embeddings"],
    }


def write_common(config: DecoderConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The same, written; rope settings in the spellings of transformers 4 and 5."""
    rope = dict(config.rope_scaling) or {"rope_type": "default"}
    if config.rotary_fraction != 1:
        rope["partial_rotary_factor"] = config.rotary_fraction
    fields: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.mlp_width,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
    }
    if config.rope_scaling:
        fields["rope_scaling"] = dict(config.rope_scaling)
    return fields


def read(fields: Json) -> DecoderConfig:
    """The decoder of a llama config."""
    return DecoderConfig(
        **common(fields),
        eps=float(fields["rms_norm_eps"]),
        activation=our_activation(fields["hidden_act"]),
        qkv_bias=fields["attention_bias"],
        out_bias=fields["attention_bias"],
        mlp_bias=fields["mlp_bias"],
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """A llama config."""
    return {
        **write_common(config, "llama", "LlamaForCausalLM"),
        "head_dim": config.head_width,
        "rms_norm_eps": config.eps,
        "hidden_act": activation_name(config.activation),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


def head(config: DecoderConfig) -> tuple[Rule, ...]:
    """The output head, unless it is tied."""
    rules = () if config.tied else (Rule("head", "lm_head.weight", TRANSPOSE),)
    return (*rules, Rule("head_bias", "lm_head.bias")) if config.head_bias else rules


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """The weight-name table of Llama, Mistral, Qwen2 and Qwen3."""
    qk_norms = (
        *norm("blocks/q_norm", f"{LAYER}.self_attn.q_norm", bias=False),
        *norm("blocks/k_norm", f"{LAYER}.self_attn.k_norm", bias=False),
    )
    return (
        Rule("embedding", "model.embed_tokens.weight"),
        *norm("blocks/norm1", f"{LAYER}.input_layernorm", bias=False),
        *linear("blocks/q", f"{LAYER}.self_attn.q_proj", config.qkv_bias),
        *linear("blocks/k", f"{LAYER}.self_attn.k_proj", config.qkv_bias),
        *linear("blocks/v", f"{LAYER}.self_attn.v_proj", config.qkv_bias),
        *(qk_norms if config.qk_norm else ()),
        *linear("blocks/o", f"{LAYER}.self_attn.o_proj", config.out_bias),
        *norm("blocks/norm2", f"{LAYER}.post_attention_layernorm", bias=False),
        *linear("blocks/gate", f"{LAYER}.mlp.gate_proj", config.mlp_bias),
        *linear("blocks/up", f"{LAYER}.mlp.up_proj", config.mlp_bias),
        *linear("blocks/down", f"{LAYER}.mlp.down_proj", config.mlp_bias),
        *norm("final_norm", "model.norm", bias=False),
        *head(config),
    )


IGNORED = (
    (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from rope_theta"),
    (r"model\.rotary_emb\.inv_freq", "computed from rope_theta"),
    (r"model\.layers\.\d+\.self_attn\.(bias|masked_bias)", "a constant mask"),
)

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=read,
    write=write,
    rules=rules,
    ignored=IGNORED,
)
