"""Llama 1/2/3, Vicuna, Yi: RMSNorm, rotary, grouped-query attention, gated SiLU MLP."""

from mllm_jax.interop.families.base import Family, Json
from mllm_jax.interop.families.names import activation_name, our_activation
from mllm_jax.interop.rules import Rule, linear, norm
from mllm_jax.models.decoder import DecoderConfig


def common(fields: Json) -> dict:
    """The fields that every family of this shape has."""
    heads = fields["num_attention_heads"]
    return {
        "vocab": fields["vocab_size"],
        "width": fields["hidden_size"],
        "depth": fields["num_hidden_layers"],
        "heads": heads,
        "kv_heads": fields.get("num_key_value_heads") or heads,
        "head_width": fields.get("head_dim") or fields["hidden_size"] // heads,
        "mlp_width": fields["intermediate_size"],
        "rope_theta": float(fields["rope_parameters"]["rope_theta"]),
        "eps": fields.get("rms_norm_eps"),
        "activation": our_activation(fields["hidden_act"]),
        "tied": fields["tie_word_embeddings"],
        "max_positions": fields["max_position_embeddings"],
    }


def read(fields: Json) -> DecoderConfig:
    """The decoder of a llama config."""
    return DecoderConfig(**common(fields))


def write(config: DecoderConfig) -> dict:
    """A llama config."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # the spelling of transformers 4
        "rms_norm_eps": config.eps,
        "hidden_act": activation_name(config.activation),
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
    }


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """The weight-name table."""
    layer = "model.layers.{i}"
    head = () if config.tied else linear("head", "lm_head", bias=False)
    return (
        Rule("embedding", "model.embed_tokens.weight"),
        *norm("blocks/norm1", f"{layer}.input_layernorm", bias=False),
        *linear("blocks/q", f"{layer}.self_attn.q_proj", bias=False),
        *linear("blocks/k", f"{layer}.self_attn.k_proj", bias=False),
        *linear("blocks/v", f"{layer}.self_attn.v_proj", bias=False),
        *linear("blocks/o", f"{layer}.self_attn.o_proj", bias=False),
        *norm("blocks/norm2", f"{layer}.post_attention_layernorm", bias=False),
        *linear("blocks/gate", f"{layer}.mlp.gate_proj", bias=False),
        *linear("blocks/up", f"{layer}.mlp.up_proj", bias=False),
        *linear("blocks/down", f"{layer}.mlp.down_proj", bias=False),
        *norm("final_norm", "model.norm", bias=False),
        *(Rule("head", rule.name, rule.transform) for rule in head),
    )


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=read,
    write=write,
    rules=rules,
    ignored=((r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from rope_theta"),),
)
