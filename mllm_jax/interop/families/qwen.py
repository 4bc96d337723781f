"""Qwen2, Qwen2.5 (biases on q, k, v) and Qwen3 (norms on q and k instead)."""

from typing import Any

from mllm_jax.interop.families import llama
from mllm_jax.interop.families.base import Family, Json
from mllm_jax.interop.families.names import activation_name, our_activation
from mllm_jax.models.decoder import DecoderConfig


def layer_windows(fields: Json) -> tuple[int, ...]:
    """The window of every block; () when all attend to everything.

    Raises:
      ValueError: another kind of attention than full and sliding, or not one kind a block.
    """
    window = fields.get("sliding_window") or 0
    if others := set(fields["layer_types"]) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types has {min(others)!r}; supported: full_attention, sliding_attention")
    if len(fields["layer_types"]) != fields["num_hidden_layers"]:
        raise ValueError(
            f"layer_types names {len(fields['layer_types'])} blocks of {fields['num_hidden_layers']}"
        )
    if "sliding_attention" in fields["layer_types"] and not window:
        raise ValueError(
            f"layer_types has sliding_attention, but sliding_window is {fields.get('sliding_window')!r}"
        )
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in fields["layer_types"])
    return windows if any(windows) else ()


def layer_types(config: DecoderConfig) -> list[str]:
    """`layer_types` of config.json."""
    return ["sliding_attention" if window else "full_attention" for window in config.block_windows]


def read_qwen2(fields: Json) -> DecoderConfig:
    """The decoder of a qwen2 config."""
    return DecoderConfig(
        **llama.common(fields),
        eps=float(fields["rms_norm_eps"]),
        activation=our_activation(fields["hidden_act"]),
        qkv_bias=True,
        windows=layer_windows(fields),
    )


def read_qwen3(fields: Json) -> DecoderConfig:
    """The decoder of a qwen3 config."""
    return DecoderConfig(
        **llama.common(fields),
        eps=float(fields["rms_norm_eps"]),
        activation=our_activation(fields["hidden_act"]),
        qkv_bias=fields["attention_bias"],
        out_bias=fields["attention_bias"],
        qk_norm=True,
        windows=layer_windows(fields),
    )


def _write(config: DecoderConfig, model_type: str, architecture: str) -> dict[str, Any]:
    window = max(config.block_windows)
    fields = {
        **llama.write_common(config, model_type, architecture),
        "rms_norm_eps": config.eps,
        "hidden_act": activation_name(config.activation),
        "use_sliding_window": bool(window),
    }
    if window:  # transformers 4 knows only "from this block on", which layer_types may say otherwise
        fields |= {
            "sliding_window": window,
            "layer_types": layer_types(config),
            "max_window_layers": config.depth - sum(map(bool, config.block_windows)),
        }
    return fields


def write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    """A qwen2 config."""
    return _write(config, "qwen2", "Qwen2ForCausalLM")


def write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    """A qwen3 config."""
    return {
        **_write(config, "qwen3", "Qwen3ForCausalLM"),
        "head_dim": config.head_width,
        "attention_bias": config.qkv_bias,
    }


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read=read_qwen2,
    write=write_qwen2,
    rules=llama.rules,
    ignored=llama.IGNORED,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=read_qwen3,
    write=write_qwen3,
    rules=llama.rules,
    ignored=llama.IGNORED,
)
