"""Mistral: Llama with a sliding attention window in every block."""

from typing import Any

from mllm_jax.interop.families import llama
from mllm_jax.interop.families.base import Family, Json
from mllm_jax.interop.families.names import activation_name, our_activation
from mllm_jax.models.decoder import DecoderConfig


def read(fields: Json) -> DecoderConfig:
    """The decoder of a mistral config."""
    window = fields["sliding_window"]
    return DecoderConfig(
        **llama.common(fields),
        eps=float(fields["rms_norm_eps"]),
        activation=our_activation(fields["hidden_act"]),
        windows=(window,) if window else (),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """A mistral config."""
    return {
        **llama.write_common(config, "mistral", "MistralForCausalLM"),
        "head_dim": config.head_width,
        "rms_norm_eps": config.eps,
        "hidden_act": activation_name(config.activation),
        "sliding_window": config.windows[0] if config.windows else None,
    }


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read=read,
    write=write,
    rules=llama.rules,
    ignored=llama.IGNORED,
)
