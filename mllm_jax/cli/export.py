"""Writes a model for use elsewhere.

    mllm-jax export --from runs/quickstart --format safetensors --to exported
    mllm-jax export --from models/llava --format llava-hf --to exported        # transformers' from_pretrained

Formats:

* `llava-hf`: transformers' LlavaForConditionalGeneration, with the same logits (connectors mlp2x_gelu and sci).
* `safetensors`, `orbax`: our own model directory (`model.json`, parameters, tokenizer), for every connector.
* `llm`, `vision`: one part in Hugging Face's layout.
* `adapter`: the LoRA adapters of the LLM in PEFT's format.

`--from` is a run of `train.py` (its last finished stage, or `--stage`), a model directory, or any checkpoint that
`mllm-jax import` reads. Export followed by import gives the same parameters bit for bit.
"""

import argparse
import pathlib

from mllm_jax.console import complain

FORMATS = ("llava-hf", "safetensors", "orbax", "llm", "vision", "adapter")
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "--from", dest="source", required=True, help="run, model directory, checkpoint or hub id"
    )
    parser.add_argument("--to", required=True, help="directory to write; must not hold weights")
    parser.add_argument("--format", choices=FORMATS, default="llava-hf")
    parser.add_argument("--stage", help="stage of a run (default: the last one that is finished)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype to store (default: as they are)")
    parser.add_argument("--base", help="adapter: name of the base LLM to write (default: the run's)")
    parser.add_argument("--keep-adapters", action="store_true", help="do not merge LoRA adapters")


def run(args: argparse.Namespace) -> int:
    """Exports; 1 with a message when the model cannot be expressed in the format."""
    try:
        return _export(args)
    except (OSError, ValueError) as error:
        complain(f"mllm-jax export: {error}")
        return 1


def _export(args: argparse.Namespace) -> int:
    import jax
    import jax.numpy as jnp

    from mllm_jax import interop
    from mllm_jax.inference import runs
    from mllm_jax.interop import checkpoints, native, peft, special_tokens
    from mllm_jax.models import lora

    target = pathlib.Path(args.to)
    native.refuse_existing(target)
    model, params, tokenizer = load_any(args.source, args.stage)
    run = runs.is_run(pathlib.Path(args.source))
    home = interop.resolve_path(tokenizer if run else args.source)
    extras = _extras(args.source, home)
    dtype = jnp.dtype(args.dtype) if args.dtype else None
    adapters = getattr(model, "lora", None)
    if args.format == "adapter":
        if adapters is None:
            raise ValueError(f"{args.source} has no LoRA adapters")
        if lora.split({"vision": params["vision"]})[1]:
            raise ValueError(
                f"{args.source} also adapts the vision tower, which an adapter of the LLM cannot hold; export another "
                "format, with the adapters merged"
            )
        base = args.base or (tokenizer if run else "")
        peft.save_adapter(target, adapters, model.llm, params["llm"], base)
        print(f"adapter written to {target}")
        return 0
    if adapters is not None and not args.keep_adapters:
        import dataclasses

        params, model = jax.device_get(lora.merge(params, adapters)), dataclasses.replace(model, lora=None)
    if args.format == "vision":
        interop.save_vision(target, model.vision, params["vision"], dtype)
        print(f"{args.format} written to {target}")
        return 0
    loaded = interop.load_tokenizer(tokenizer) if tokenizer else None
    generation = special_tokens.generation(home, loaded, _stops(extras.get("template"), loaded))
    if args.format == "llava-hf":
        checkpoints.save_llava_hf(target, model, params, loaded, dtype, generation, **extras)
    elif args.format == "llm":
        interop.save_llm(target, model.llm, params["llm"], loaded, dtype, generation)
    else:
        if dtype is not None:
            params = jax.tree.map(
                lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params
            )
        native.save_native(target, model, params, args.format, **extras)
        native.copy_tokenizer(home, target)
        special_tokens.write(target, generation)
    if not generation.get("eos_token_id") and args.format in ("llava-hf", "llm"):
        print(
            "no id that ends an answer is known (the source has no tokenizer): generation will not stop by itself"
        )
    print(f"{args.format} written to {target}")
    return 0


def _extras(source: str, home: pathlib.Path) -> dict[str, str | int | None]:
    """What is known of a source besides its computation, as `native.model_to_json` takes it.

    Args:
      home: the directory that its tokenizer is from.
    """
    from mllm_jax.inference import runs
    from mllm_jax.interop import native, special_tokens
    from mllm_jax.workdir import saved_config

    extras: dict[str, str | int | None] = {"image_token_index": special_tokens.image_token(home)}
    if runs.is_run(pathlib.Path(source)):
        return {**extras, "template": saved_config(pathlib.Path(source)).eval.template}
    return {**extras, **(native.load_extras(home) if native.is_native(home) else {})}


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

    if runs.is_run(pathlib.Path(source)):
        return _load_run(pathlib.Path(source), stage)
    model, params, _ = checkpoints.load_model(source)
    directory = resolve_path(source)
    has_tokenizer = any(
        (directory / name).exists() for name in TOKENIZER_FILES if name.startswith("tokenizer")
    )
    return model, params, str(directory) if has_tokenizer else None


def _load_run(directory: pathlib.Path, stage: str | None):
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
