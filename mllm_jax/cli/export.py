"""Writes a model for use elsewhere.

    mllm-jax export --from runs/quickstart --format safetensors --to exported
    mllm-jax export --from models/llava --format llava-hf --to exported        # transformers' from_pretrained

Formats:

* `llava-hf`: transformers' LlavaForConditionalGeneration, with the same logits (connectors mlp2x_gelu and sci).
* `llava`: LLaVA's own layout: LLaVA-1.5, LLaVA-1.6 (images in tiles) and Dense Connector (`dci`, `sci`, `sti`).
* `safetensors`, `orbax`: our own model directory (`model.json`, parameters, tokenizer), for every connector.
* `llm`, `vision`: one part in Hugging Face's layout.
* `connector`: the connector alone, which `--config.model.connector.path` starts from; under the names of the models
  that are published with it (LLaVA, MobileVLM, Honeybee, InternVL, Idefics3, BLIP-2), else under our own.
* `adapter`: the LoRA adapters of the LLM in PEFT's format, for the LLM alone.
* `llava-hf-adapter`: all that a stage with LoRA trained, in PEFT's format, for a llava-hf model: adapters of LLM and
  vision tower, the connector and other modules as a whole (`modules_to_save`).
* `llava-adapter`: the same in LLaVA's layout: the LLM's adapters in PEFT's format, connector and newline beside them in
  `non_lora_trainables.bin`, and LLaVA's config.json.

A model card is written beside the model (README.md, unless there is one): how to load it and, of a run, its recipe, the
fingerprints of its data and its scores.

`--from` is a run of `train.py` (its last finished stage, or `--stage`), a model directory, or any checkpoint that
`mllm-jax import` reads. Export followed by import gives the same parameters bit for bit.
"""

import argparse
import dataclasses
import pathlib
import re
from typing import Any

from mllm_jax.console import complain
from mllm_jax.storage import Path, as_path

BUCKETS = ("from",)

FORMATS = (
    "llava-hf",
    "llava",
    "safetensors",
    "orbax",
    "llm",
    "vision",
    "connector",
    "adapter",
    "llava-hf-adapter",
    "llava-adapter",
)
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "--from", dest="source", required=True, help="run (also gs://), model directory, checkpoint or hub id"
    )
    parser.add_argument("--to", required=True, help="directory to write; must not hold weights")
    parser.add_argument("--format", choices=FORMATS, default="llava-hf")
    parser.add_argument("--stage", help="stage of a run (default: the last one that is finished)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype to store, but of adapters (default: as they are)"
    )
    parser.add_argument("--base", help="adapters: name of the base model to write (default: the run's LLM)")
    parser.add_argument(
        "--tower",
        help="llava, llava-adapter: name of the vision tower to write (default: the one it is from)",
    )
    parser.add_argument("--keep-adapters", action="store_true", help="do not merge LoRA adapters")


def run(args: argparse.Namespace) -> int:
    """Exports; 1 with a message when the model cannot be expressed in the format."""
    from mllm_jax.evaluation import model_card

    try:
        code = _export(args)
        model_card.write(pathlib.Path(args.to), args.source, args.format, args.stage)
        return code
    except (OSError, ValueError) as error:
        complain(f"mllm-jax export: {error}")
        return 1


def _export(args: argparse.Namespace) -> int:
    import jax
    import jax.numpy as jnp

    from mllm_jax import interop
    from mllm_jax.inference import runs
    from mllm_jax.interop import checkpoints, llava_layout, native, special_tokens
    from mllm_jax.models import lora

    target = pathlib.Path(args.to)
    native.refuse_existing(target)
    adapter = args.format.endswith("adapter")
    for name in ("dtype", "keep_adapters") if adapter else ("base",):
        if getattr(args, name):
            raise ValueError(
                f"--{name.replace('_', '-')} says nothing for --format {args.format}; leave it out"
            )
    if args.tower and args.format not in ("llava", "llava-adapter"):
        raise ValueError(f"--tower says nothing for --format {args.format}; leave it out")
    model, params, tokenizer = load_any(args.source, args.stage)
    run = runs.is_run(as_path(args.source))
    home = interop.resolve_path(tokenizer if run else args.source)
    extras = _extras(args.source, home)
    dtype = jnp.dtype(args.dtype) if args.dtype else None
    if args.dtype:
        model = dataclasses.replace(model, dtype=args.dtype, param_dtype=args.dtype)
    adapters = getattr(model, "lora", None)
    if adapter:
        return _export_adapter(args, model, params, tokenizer if run else "")
    if adapters is not None and not args.keep_adapters:
        params, model = jax.device_get(lora.merge(params, adapters)), dataclasses.replace(model, lora=None)
    processor = _processor(args.source)
    if args.format == "vision":
        interop.save_vision(target, model.vision, params["vision"], dtype, processor)
        print(f"{args.format} written to {target}")
        return 0
    if args.format == "connector":
        layout = checkpoints.save_connector(target, model, params["connector"], dtype, **extras)
        print(f"{args.format} written to {target} under the names of {layout}")
        return 0
    loaded = interop.load_tokenizer(tokenizer) if tokenizer else None
    generation = special_tokens.generation(home, loaded, _stops(extras.get("template"), loaded))
    if args.format == "llava-hf":
        checkpoints.save_llava_hf(target, model, params, loaded, dtype, generation, processor, **extras)
        _say_videos(target, model)
    elif args.format == "llava":
        tower, aspect = _tower(args), extras.get("aspect") or "pad"
        llava_layout.save_llava(target, model, params, tower, loaded, dtype, generation, aspect)
        _say_videos(target, model, tower)
    elif args.format == "llm":
        interop.save_llm(target, model.llm, params["llm"], loaded, dtype, generation)
    else:
        if dtype is not None:
            params = jax.tree.map(
                lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params
            )
        native.save_native(target, model, params, args.format, processor, **extras)
        native.copy_tokenizer(home, target)
        special_tokens.write(target, generation)
    if not generation.get("eos_token_id") and args.format in ("llava-hf", "llava", "llm"):
        print(
            "no id that ends an answer is known (the source has no tokenizer): generation will not stop by itself"
        )
    print(f"{args.format} written to {target}")
    return 0


def _export_adapter(args: argparse.Namespace, model: Any, params: Any, llm: str) -> int:
    from mllm_jax.interop import llava_adapter, peft_export
    from mllm_jax.models import lora
    from mllm_jax.workdir import saved_config

    if model.lora is None:
        raise ValueError(f"{args.source} has no LoRA adapters")
    trained = _trained(args.source, args.stage, params)
    if args.format == "llava-hf-adapter":
        _check_rows(args.base, model, trained)
        peft_export.save_model_adapter(args.to, model.lora, model, params, trained, args.base or "")
        if not args.base:
            print("give --base NAME, the llava-hf model that it belongs to, for PEFT to find it by itself")
    elif args.format == "llava-adapter":
        tower, base = _tower(args), args.base or llm
        aspect = saved_config(as_path(args.source)).data.aspect
        llava_adapter.save_llava_adapter(args.to, model.lora, model, params, trained, tower, base, aspect)
        _say_videos(pathlib.Path(args.to), model, tower)
    else:
        if lora.split({"vision": params["vision"]})[1]:
            raise ValueError(
                f"{args.source} also adapts the vision tower, which an adapter of the LLM cannot hold; give --format "
                "llava-hf-adapter, or another format, with the adapters merged"
            )
        peft_export.save_adapter(args.to, model.lora, model.llm, params["llm"], args.base or llm)
        if trained:
            print(
                f"an adapter of the LLM does not hold what was trained as a whole ({', '.join(sorted(trained)[:3])}"
                f"{', ...' * (len(trained) > 3)}); --format llava-hf-adapter does"
            )
    print(f"{args.format} written to {args.to}")
    return 0


def _say_videos(target: pathlib.Path, model: Any, tower: str | None = None) -> None:
    """Says what a published layout does not keep of how videos are read."""
    from mllm_jax.interop import video_fields
    from mllm_jax.interop.composite import read_composite

    if model.video is None:
        return
    if unsaid := video_fields.unsaid(model.video, read_composite(target, tower).model.video):
        keys = ", ".join(f"video.{key}={value!r}" for key, value in unsaid.items())
        print(f"config.json does not say how this model reads videos, so tell whoever loads it: {keys}")


def _tower(args: argparse.Namespace) -> str:
    """Where the vision tower of a source is from.

    Raises:
      ValueError: it is not known.
    """
    from mllm_jax.inference import runs
    from mllm_jax.interop.hub import named_by, read_json, resolve_path
    from mllm_jax.workdir import saved_config

    if args.tower:
        return args.tower
    if runs.is_run(as_path(args.source)):
        return saved_config(as_path(args.source)).model.vision.path
    file = resolve_path(args.source) / "config.json"
    key = "mm_vision_tower"
    if not file.is_file() or key not in (fields := read_json(file)):
        raise ValueError(f"{args.source} does not say where its vision tower is from; give --tower NAME")
    return named_by(file, key, fields[key])


def _check_rows(base: str | None, model: Any, trained: set[str]) -> None:
    """Refuses a trained embedding or head that does not fit the base, where the base is here to be looked at."""
    from mllm_jax.interop.composite import read_composite

    if (
        not trained & {"llm/embedding", "llm/head"}
        or not base
        or not (pathlib.Path(base) / "config.json").is_file()
    ):
        return
    if (rows := read_composite(base).vocab) != model.llm.vocab:
        raise ValueError(
            f"the embedding of {base} has {rows} rows, with an image token behind the vocabulary, and the one that was "
            f"trained {model.llm.vocab}; PEFT could not exchange them. Export another format, with the adapters merged"
        )


def _trained(source: str, stage: str | None, params: Any) -> set[str]:
    """Paths of the parameters that a run's stage trained itself, adapters aside; of anything else nothing is known."""
    from mllm_jax.inference import runs
    from mllm_jax.models import lora, paths
    from mllm_jax.workdir import saved_config

    directory = as_path(source)
    if not runs.is_run(directory):
        return set()
    config = saved_config(directory)
    patterns = config.stages[stage or runs.finished_stages(directory, config)[-1]].trainable
    base, _ = lora.split(params)
    return {path for path in paths.flatten(base) if any(re.fullmatch(each, path) for each in patterns)}


def _extras(source: str, home: pathlib.Path) -> dict[str, str | int | None]:
    """What is known of a source besides its computation, as `native.model_to_json` takes it.

    Args:
      home: the directory that its tokenizer is from.
    """
    from mllm_jax.inference import runs
    from mllm_jax.interop import special_tokens
    from mllm_jax.interop.composite import load_extras
    from mllm_jax.workdir import saved_config

    extras: dict[str, str | int | None] = {"image_token_index": special_tokens.image_token(home)}
    if runs.is_run(as_path(source)):
        config = saved_config(as_path(source))
        return {**extras, "template": config.eval.template, "aspect": config.data.aspect}
    return {**extras, **load_extras(home)}


def _processor(source: str) -> dict[str, Any]:
    """The image processor that a source's model was trained with."""
    from mllm_jax.inference import runs
    from mllm_jax.interop.composite import load_processor
    from mllm_jax.interop.hub import load_processor_config
    from mllm_jax.workdir import saved_config

    if runs.is_run(as_path(source)):
        return load_processor_config(saved_config(as_path(source)).model.vision.path)
    return load_processor(source)


def _stops(template: str | None, tokenizer: object) -> list[int]:
    """Ids that end an answer in the template that the model was trained with."""
    from mllm_jax.data.tokens import stop_ids

    return stop_ids(template, tokenizer) if template and tokenizer is not None else []


def load_any(source: str, stage: str | None = None):
    """(ModelConfig, parameters as NumPy arrays, where the tokenizer is) of a run or of any checkpoint.

    Raises:
      FileNotFoundError, ValueError: nothing there, or a stage that is not finished.
    """
    from mllm_jax.inference import runs
    from mllm_jax.interop import checkpoints
    from mllm_jax.interop.hub import resolve_path
    from mllm_jax.interop.native import TOKENIZER_FILES

    if runs.is_run(as_path(source)):
        return _load_run(as_path(source), stage)
    model, params, _ = checkpoints.load_model(source)
    directory = resolve_path(source)
    has_tokenizer = any(
        (directory / name).exists() for name in TOKENIZER_FILES if name.startswith("tokenizer")
    )
    return model, params, str(directory) if has_tokenizer else None


def _load_run(directory: Path, stage: str | None):
    import dataclasses

    import jax

    from mllm_jax.inference import runs
    from mllm_jax.models import quantize
    from mllm_jax.workdir import saved_config

    config = saved_config(directory)
    finished = runs.finished_stages(directory, config)
    if not finished or (stage and stage not in finished):
        wanted = f"stage {stage!r} is not" if stage and finished else "no stage is"
        others = f"; finished: {', '.join(finished)}" if finished else ""
        raise FileNotFoundError(f"{directory}: {wanted} finished{others}")
    name = stage or finished[-1]
    if not stage and name != (last := config.stage_order[-1]):
        complain(f"{directory}: stage {last!r} is not finished; the model after stage {name!r} is taken")
    model = runs.model_config(config)
    params = runs.stage_params(directory / "params" / name, model)
    if runs.is_quantized(config.stages[name]):
        params = jax.device_get(quantize.dequantize(params, config.model.frozen_dtype))
    model = dataclasses.replace(model, lora=runs.lora_settings(config.stages[name]))
    return model, params, config.model.llm.path
