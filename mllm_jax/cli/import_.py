"""Reads a published checkpoint, without torch and without running anything in it, into a directory of ours.

    mllm-jax import --from llava-hf/llava-1.5-7b-hf --to models/llava --template vicuna_v1
    mllm-jax import --from liuhaotian/llava-v1.5-7b --to models/llava-original
    mllm-jax import --from ADAPTER_DIR --base lmsys/vicuna-7b-v1.5 --to models/merged
    mllm-jax import --from ADAPTER_DIR --base llava-hf/llava-1.5-7b-hf --to models/merged

* A multimodal model (llava-hf, LLaVA and Dense Connector, Honeybee) becomes `model.json`, parameters and tokenizer
  files; training, evaluation and `mllm-jax export` take that directory.
* A LoRA adapter of PEFT is merged into its base, an LLM or a multimodal model; with LLaVA's non_lora_trainables beside
  it, into the whole LLaVA.
* A vision tower or an LLM alone is written again in Hugging Face's layout as safetensors (from `.bin`, or in another
  dtype); such a checkpoint can also be used as it is, as model.vision.path or model.llm.path. `--part vision` and
  `--part llm` take this part out of a larger checkpoint, also of one that is not supported as a whole.

`--from` is a directory, also in a bucket (gs://), or a hub id (the user's cache and token are used; `.bin` is read only
where there is no safetensors). Every key of its config.json that changes the computation is understood or refused by
name; tensors that no parameter takes are listed, or an error when they are unknown. Peak memory is the model and twice
its largest tensor; with `--form orbax` Orbax holds a second copy while it writes.
"""

import argparse
import collections
import dataclasses
import pathlib

from mllm_jax.console import complain
from mllm_jax.data.templates import check_name

BUCKETS = ("from", "base", "tower")
FORMS = ("safetensors", "orbax")
DTYPES = ("float32", "bfloat16", "float16")
DUAL = (
    "clip",
    "siglip",
    "siglip2",
)  # a vision tower and a text tower; the text tower's tensors are listed as ignored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("--from", dest="source", required=True, help="directory or hub id of the checkpoint")
    parser.add_argument("--to", required=True, help="directory to write; must not hold weights")
    parser.add_argument("--part", choices=("vision", "llm"), help="only this part, in Hugging Face's layout")
    parser.add_argument("--tower", help="vision tower of a LLaVA-layout checkpoint, if not the one it names")
    parser.add_argument("--base", help="model that a LoRA adapter belongs to, if not the one it names")
    parser.add_argument(
        "--template",
        type=_template,
        metavar="NAME",
        help="conversation template it was trained with, to be recorded (vicuna_v1 for LLaVA-1.5; docs/models.md)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype to store (default: the checkpoint's)")
    parser.add_argument("--form", choices=FORMS, default=FORMS[0], help="how parameters are stored")
    parser.add_argument("--verbose", action="store_true", help="list every ignored tensor")


def _template(name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
    from mllm_jax.interop import checkpoints, composite, families, native, peft, special_tokens
    from mllm_jax.interop.hub import named_by, read_json, resolve_path

    target = pathlib.Path(args.to)
    native.refuse_existing(target)
    dtype = jnp.dtype(args.dtype) if args.dtype else None
    directory = resolve_path(args.source)
    whole, adapter = composite.is_multimodal(directory), peft.is_adapter(directory)
    if args.part:
        _says_nothing(args, directory, "base", "tower", "template")
        return _part(directory, target, args.part, dtype, args.verbose)
    if not adapter:
        _says_nothing(args, directory, "base")
    source, what = directory, "model with connector {connector}"
    if adapter:
        base = args.base or named_by(
            directory / peft.CONFIG,
            "base_model_name_or_path",
            read_json(directory / peft.CONFIG).get("base_model_name_or_path"),
        )
        source, what = resolve_path(base), "model with the adapter merged"
        if whole:
            model, params, report = checkpoints.load_llava_lora(directory, base, args.tower, dtype=dtype)
        elif composite.is_multimodal(source):
            model, params, report = checkpoints.merged_model(directory, base, args.tower, dtype=dtype)
        else:
            _says_nothing(args, source, "tower", "template")
            config, llm, report = checkpoints.merged_llm(directory, base, dtype)
            interop.save_llm(target, config, llm, generation=special_tokens.generation(source))
            native.copy_tokenizer(source, target)
            return _tell(report, target, "LLM with the adapter merged", args.verbose)
    elif whole:
        model, params, report = checkpoints.load_model(directory, args.tower, dtype=dtype)
    else:
        _says_nothing(args, directory, "tower", "template")
        kind = read_json(directory / "config.json").get("model_type")
        towers = [*families.VISION, *DUAL]
        if kind not in (*towers, *families.LLMS):
            raise ValueError(
                f"{directory / 'config.json'}: model_type {kind!r} is not supported; supported: "
                f"{', '.join([*towers, *families.LLMS, 'llava'])}. A part of it alone: --part vision, --part llm"
            )
        return _part(directory, target, "llm" if kind in families.LLMS else "vision", dtype, args.verbose)
    extras = {"image_token_index": special_tokens.image_token(source), **composite.load_extras(source)}
    if args.template:
        extras["template"] = args.template
    if args.dtype:
        model = dataclasses.replace(model, dtype=args.dtype, param_dtype=args.dtype)
    processor = composite.load_processor(directory if whole else source, args.tower)
    native.save_native(target, model, params, args.form, processor, **extras)
    native.copy_tokenizer(source, target)
    special_tokens.write(target, special_tokens.generation(source))
    return _tell(report, target, what.format(connector=model.connector), args.verbose)


def _says_nothing(args: argparse.Namespace, source: pathlib.Path, *names: str) -> None:
    """Refuses options that would be ignored."""
    for name in names:
        if getattr(args, name):
            raise ValueError(
                f"--{name} says nothing for {source}{' with --part' * bool(args.part)}; leave it out"
            )


def _part(directory: pathlib.Path, target: pathlib.Path, part: str, dtype: object, verbose: bool) -> int:
    """A vision tower or an LLM, alone or out of a larger checkpoint."""
    from mllm_jax import interop
    from mllm_jax.interop import native, special_tokens, towers
    from mllm_jax.interop.hub import load_processor_config

    if part == "llm":
        params, report = towers.read_llm(directory, dtype=dtype)
        generation = special_tokens.generation(directory)
        interop.save_llm(target, interop.llm_config(directory), params, generation=generation)
        native.copy_tokenizer(directory, target)
    else:
        params, report = towers.read_vision(directory, dtype=dtype)
        processor = load_processor_config(directory)
        interop.save_vision(target, interop.vision_config(directory), params, processor=processor)
    what = {"llm": "LLM", "vision": "vision tower"}[part]
    return _tell(report, target, f"{what} (use it as model.{part}.path)", verbose)


def _tell(report: object, target: pathlib.Path, what: str, verbose: bool) -> int:
    print(f"{what} written to {target}: {len(report.used)} tensors used, {len(report.ignored)} ignored")
    if verbose:
        for name, why in sorted(report.ignored.items()):
            print(f"  {name}: {why}")
    else:
        for why, count in collections.Counter(report.ignored.values()).most_common():
            print(f"  {count:>5} ignored: {why}")
    return 0
