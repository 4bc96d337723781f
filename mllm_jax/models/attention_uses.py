"""Which attention a model computes, and by which backend."""

from collections.abc import Iterable
from typing import NamedTuple

from mllm_jax.models.attention import Use, choose, current_platform
from mllm_jax.models.attention.selfcheck import self_check
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.models.vit import VisionConfig


class Chosen(NamedTuple):
    """The backend that computes a use of attention, and why that one."""

    use: Use
    backend: str
    reason: str


def attention_uses(config: ModelConfig, length: int | None = None) -> dict[str, Use]:
    """Every kind of attention in the model, by the part that computes it.

    Args:
      length: T, positions of the LLM's rows; None = not known.
    """
    llm, windows = config.llm, sorted(set(config.llm.block_windows))
    found = {
        "LLM" if len(windows) == 1 else f"LLM with window {window}" if window else "LLM without window": Use(
            llm.heads,
            llm.kv_heads,
            llm.head_width,
            config.dtype,
            length,
            window=window or None,
            softcap=llm.attention_softcap,
        )
        for window in windows
    }
    inputs = config.vision.inputs(config.slot_size)
    for index, (tower, size) in enumerate(inputs):
        if not isinstance(tower, VisionConfig):
            continue  # computes no attention
        name = "vision tower" if len(inputs) == 1 else f"vision tower {index}"
        rows, columns = tower.grid(*size)
        heads, width = tower.heads, tower.width // tower.heads
        patches = tower.prefix + rows * columns
        found[name] = Use(
            heads, heads, width, config.dtype, patches, masked=config.max_patches > 0, causal=False
        )
    return found


def chosen_backends(config: ModelConfig, length: int | None = None) -> dict[str, Chosen]:
    """The backend of every part, as `attend` will choose it on the current platform.

    Raises:
      ValueError: the configured backend cannot compute a part of this model here.
    """
    return {
        part: Chosen(use, *choose(config.attention, use, current_platform()))
        for part, use in attention_uses(config, length).items()
    }


def check_backends(config: ModelConfig, lengths: Iterable[int]) -> None:
    """Compares the backends of all parts with the oracle on this machine; see `selfcheck.self_check`.

    Args:
      lengths: T of the LLM's rows, one for each kind of row.

    Raises:
      ValueError: as `chosen_backends`.
      BackendError: a backend computes something else.
    """
    chosen = (one for length in lengths for one in chosen_backends(config, length).values())
    self_check(dict.fromkeys((one.backend, one.use) for one in chosen))
