"""What a stage with LoRA trained, in LLaVA's layout: PEFT's adapter of the LLM, and the other parameters beside it.

    adapter_config.json, adapter_model.safetensors    the adapters, as `peft_export.save_adapter` writes them
    non_lora_trainables.bin                           connector, and the newline of images in tiles
    config.json                                       the LLM's, with LLaVA's `mm_...` entries

PEFT itself saves modules, and the newline is a parameter of none. Source: haotian-liu/LLaVA `llava/train/train.py`
(`get_peft_state_non_lora_maybe_zero_3`), `llava/model/builder.py`.
"""

import pathlib
from collections.abc import Collection
from typing import Any

from mllm_jax import files
from mllm_jax.interop import torch_writer
from mllm_jax.interop.assemble import write_plan
from mllm_jax.interop.connector_names import connector_part, separators_part
from mllm_jax.interop.llava_layout import config_fields
from mllm_jax.interop.peft import PREFIX
from mllm_jax.interop.peft_export import save_adapter
from mllm_jax.models import lora
from mllm_jax.models.lora import LoRA
from mllm_jax.models.mllm import ModelConfig

BESIDE = "non_lora_trainables.bin"


def save_llava_adapter(
    directory: str | pathlib.Path,
    settings: LoRA,
    model: ModelConfig,
    params: dict[str, Any],
    trained: Collection[str],
    tower: str,
    base: str = "",
    aspect: str = "pad",
) -> None:
    """Writes the adapters of a model's LLM with its connector and newline; `load_llava_lora` reads them again.

    Args:
      settings: rank, scale and dropout of the adapters.
      model: the computation.
      params: the whole model, adapters beside their kernels.
      trained: paths of parameters that were trained themselves, such as "separators/newline".
      tower: where LLaVA finds the vision tower, a directory or hub id.
      base: the LLM that the adapters belong to, likewise.
      aspect: how images that are not square are brought to size.

    Raises:
      ValueError: no adapters there, or something that this layout cannot say; it is named.
      FileExistsError: the directory holds weights.
    """
    directory = pathlib.Path(directory)
    if other := sorted(path for path in trained if not path.startswith(("connector/", "separators/"))):
        raise ValueError(
            f"{other[0]!r} was trained itself; beside an adapter of the LLM, LLaVA keeps the connector and the newline "
            "of images in tiles. Export another format, with the adapters merged"
        )
    if lora.split({part: tree for part, tree in params.items() if part != "llm"})[1]:
        raise ValueError(
            "LLaVA has adapters of the LLM alone; export another format, with the adapters merged"
        )
    fields = config_fields(model, tower, aspect)
    parts = [connector_part(model, "llava")]
    if model.visual_layout.separated:
        parts.append(separators_part(model))
    tensors = {}
    for part in parts:
        for name, _, _, make in write_plan(
            params[part.path], part.rules, prefixes=(("", f"{PREFIX}model."),)
        ):
            tensors[name] = make()
    save_adapter(directory, settings, model.llm, params["llm"], base)
    torch_writer.save(directory / BESIDE, tensors)
    files.write_json(directory / "config.json", fields, indent=2)
