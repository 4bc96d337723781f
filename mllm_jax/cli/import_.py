"""Reads a published checkpoint, without torch and without running anything in it, into a directory of ours.

    mllm-jax import --from llava-hf/llava-1.5-7b-hf --to models/llava
    mllm-jax import --from liuhaotian/llava-v1.5-7b --to models/llava-original
    mllm-jax import --from ADAPTER_DIR --base lmsys/vicuna-7b-v1.5 --to models/merged
    mllm-jax import --from ADAPTER_DIR --base llava-hf/llava-1.5-7b-hf --to models/merged

* A multimodal model (llava-hf, LLaVA and Dense Connector, Honeybee) becomes `model.json`, parameters and tokenizer
  files; training, evaluation and `mllm-jax export` take that directory.
* A LoRA adapter of PEFT is merged into its base, an LLM or a multimodal model; with LLaVA's non_lora_trainables beside
  it, into the whole LLaVA.
* A vision tower or an LLM alone is written again in Hugging Face's layout as safetensors (from `.bin`, or in another
  dtype); such a checkpoint can also be used as it is, as model.vision.path or model.llm.path.

`--from` is a directory or a hub id (the user's cache and token are used; `.bin` is read only where there is no
safetensors). Tensors of the source that no parameter takes are listed, or an error when they are unknown. Peak memory
is the model and twice its largest tensor; with `--form orbax` Orbax holds a second copy while it writes.
"""

import argparse
import collections
import pathlib

from mllm_jax.console import complain

FORMS = ("safetensors", "orbax")
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("--from", dest="source", required=True, help="directory or hub id of the checkpoint")
    parser.add_argument("--to", required=True, help="directory to write; must not hold weights")
    parser.add_argument("--tower", help="vision tower of a LLaVA-layout checkpoint, if not the one it names")
    parser.add_argument("--base", help="model that a LoRA adapter belongs to, if not the one it names")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype to store (default: the checkpoint's)")
    parser.add_argument("--form", choices=FORMS, default=FORMS[0], help="how parameters are stored")
    parser.add_argument("--verbose", action="store_true", help="list every ignored tensor")


def run(args: argparse.Namespace) -> int:
    """Imports; 1 with a message when the checkpoint cannot be read."""

    try:
        return _import(args)
    except (OSError, ValueError) as error:
        complain(f"mllm-jax import: {error}")
        return 1


def _import(args: argparse.Namespace) -> int:
    import jax.numpy as jnp

    from mllm_jax import interop
    from mllm_jax.interop import checkpoints, composite, native, peft
    from mllm_jax.interop.hub import read_json, resolve_path

    target = pathlib.Path(args.to)
    native.refuse_existing(target)
    dtype = jnp.dtype(args.dtype) if args.dtype else None
    directory = resolve_path(args.source)
    fields = read_json(directory / "config.json") if (directory / "config.json").exists() else {}
    whole = composite.is_multimodal(directory)
    if peft.is_adapter(directory):
        base = args.base or read_json(directory / peft.CONFIG).get("base_model_name_or_path", "")
        if whole:
            model, params, report = checkpoints.load_llava_lora(directory, base, args.tower, dtype=dtype)
        elif base and composite.is_multimodal(resolve_path(base)):
            model, params, report = checkpoints.merged_model(directory, base, args.tower, dtype=dtype)
        else:
            config, llm, report = checkpoints.merged_llm(directory, base, dtype)
            interop.save_llm(target, config, llm)
            native.copy_tokenizer(resolve_path(base), target)
            return _tell(report, target, "LLM with the adapter merged", args.verbose)
        native.save_native(target, model, params, args.form)
        native.copy_tokenizer(resolve_path(base), target)
        return _tell(report, target, "model with the adapter merged", args.verbose)
    if whole:
        model, params, report = checkpoints.load_model(directory, args.tower, dtype=dtype)
        native.save_native(target, model, params, args.form)
        native.copy_tokenizer(directory, target)
        return _tell(report, target, f"model with connector {model.connector}", args.verbose)
    return _lone(directory, target, fields, dtype)


def _lone(directory: pathlib.Path, target: pathlib.Path, fields: dict, dtype: object) -> int:
    """A vision tower or an LLM."""
    from mllm_jax import interop
    from mllm_jax.interop import families, native

    kind = fields.get("model_type")
    if kind in families.LLMS:
        interop.save_llm(target, interop.llm_config(directory), interop.load_llm(directory, dtype=dtype))
    elif kind in families.VISION or "vision_config" in fields:
        interop.save_vision(
            target, interop.vision_config(directory), interop.load_vision(directory, dtype=dtype)
        )
    else:
        supported = ", ".join([*families.VISION, *families.LLMS])
        raise ValueError(
            f"{directory / 'config.json'}: model_type {kind!r} is not supported; supported: {supported}"
        )
    native.copy_tokenizer(directory, target)
    print(f"{kind} written to {target} (use it as model.vision.path or model.llm.path)")
    return 0


def _tell(report: object, target: pathlib.Path, what: str, verbose: bool) -> int:
    print(f"{what} written to {target}: {len(report.used)} tensors used, {len(report.ignored)} ignored")
    if verbose:
        for name, why in sorted(report.ignored.items()):
            print(f"  {name}: {why}")
    else:
        for why, count in collections.Counter(report.ignored.values()).most_common():
            print(f"  {count:>5} ignored: {why}")
    return 0
