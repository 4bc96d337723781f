"""Weights in and out: Hugging Face, LLaVA, PEFT."""

from mllm_jax.interop.hub import load_processor_config, load_tokenizer, resolve_path
from mllm_jax.interop.towers import (
    check_llm,
    check_vision,
    llm_config,
    load_llm,
    load_vision,
    save_llm,
    save_vision,
    vision_config,
)

__all__ = [
    "check_llm",
    "check_vision",
    "llm_config",
    "load_llm",
    "load_processor_config",
    "load_tokenizer",
    "load_vision",
    "resolve_path",
    "save_llm",
    "save_vision",
    "vision_config",
]
