"""Says what a checkpoint is: layout, geometry, parameters per module, dtype and memory.

    mllm-jax inspect llava-hf/llava-1.5-7b-hf --fetch
    mllm-jax inspect runs/quickstart
    mllm-jax inspect mini

Reads configuration and headers only, no tensor data. For vision towers, LLMs, multimodal checkpoints in any layout that
`mllm-jax import` reads, our own model directories, LoRA adapters and runs of train.py. Nothing is fetched unless
`--fetch` is given: a checkpoint that is neither a directory nor in the hub's cache is named instead, also one that
another checkpoint's config.json names.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import pathlib
from typing import Any

from mllm_jax.console import complain, make_console, print_table, say, size_text

BUCKETS = ("",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("source", help="directory, hub id, or 'mini'")
    parser.add_argument("--fetch", action="store_true", help="download what is not here from the hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Prints the description; 1 with a message when there is nothing to describe."""
    from mllm_jax.interop.hub import NotFetchedError, local_only

    try:
        with contextlib.nullcontext() if args.fetch else local_only():
            found = describe(args.source)
    except NotFetchedError as error:
        complain(f"mllm-jax inspect: {error}; give --fetch to do so")
        return 1
    except (OSError, ValueError) as error:
        complain(f"mllm-jax inspect: {error}")
        return 1
    if args.json:
        print(json.dumps(found, indent=1, default=str))
        return 0
    console = make_console()
    say(console, f"{args.source}: {found['what']}")
    for part, fields in found["geometry"].items():
        say(console, f"\n{part}: " + ", ".join(f"{key} {value}" for key, value in fields.items()))
    rows = [
        (m["module"], m["dtype"], f"{m['parameters']:,}", size_text(m["bytes"])) for m in found["modules"]
    ]
    rows.append(("total", "", f"{found['parameters']:,}", size_text(found["bytes"])))
    print()
    print_table(console, ("module", "dtype", "parameters", "memory"), rows, text_columns=2)
    return 0


def describe(source: str) -> dict[str, Any]:
    """What a checkpoint is, as plain JSON.

    Raises:
      FileNotFoundError, ValueError: nothing there, or a family that is not supported.
    """
    from mllm_jax.inference.runs import is_run
    from mllm_jax.interop import native, peft
    from mllm_jax.interop.hub import resolve_path
    from mllm_jax.interop.towers import fused_paths

    if source == "mini":
        return _merge("the shipped mini vision tower and mini LLM", _lone("mini"), _lone("mini", llm=True))
    if is_run(pathlib.Path(source)):
        return _run(pathlib.Path(source))
    if several := fused_paths(source):
        parts = {f"vision/tower_{i}": _lone(path) for i, path in enumerate(several)}
        return _merge(
            "fused vision towers", *(_renamed(part, "vision", name) for name, part in parts.items())
        )
    directory = resolve_path(source)
    if native.is_native(directory):
        return _native(directory)
    if peft.is_adapter(directory):
        return _adapter(directory)
    from mllm_jax.interop import composite, families

    fields, _ = composite.read_config(directory)
    if composite.is_composite(fields):
        return _composite(directory)
    return _lone(directory, llm=str(fields.get("model_type")) in families.LLMS)


def _merge(what: str, *parts: dict[str, Any]) -> dict[str, Any]:
    modules = [module for part in parts for module in part["modules"]]
    geometry = {key: value for part in parts for key, value in part["geometry"].items()}
    return _total(what, geometry, modules)


def _renamed(part: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    modules = [{**row, "module": row["module"].replace(old, new, 1)} for row in part["modules"]]
    return {**part, "modules": modules, "geometry": {new: part["geometry"][old]}}


def _total(what: str, geometry: dict[str, Any], modules: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "what": what,
        "geometry": geometry,
        "modules": modules,
        "parameters": sum(module["parameters"] for module in modules),
        "bytes": sum(module["bytes"] for module in modules),
    }


def _modules(leaves: dict[str, tuple[Any, tuple[int, ...]]], prefix: str = "") -> list[dict[str, Any]]:
    """Rows per module from {path: (dtype, shape)}; blocks by their layers."""
    import numpy as np

    counts: dict[str, list[Any]] = collections.defaultdict(lambda: [0, 0, set()])
    for path, (dtype, shape) in leaves.items():
        keys = (prefix + path).split("/")
        depth = 1 + keys[1].startswith("tower_") if len(keys) > 2 else 1  # fused towers lie one level deeper
        name = "/".join(keys[: depth + 2] if keys[depth] == "blocks" else keys[: depth + 1])
        size = int(np.prod(shape, dtype=np.int64))
        counts[name][0] += size
        counts[name][1] += size * np.dtype(dtype).itemsize
        counts[name][2].add(str(np.dtype(dtype)))
    return [
        {"module": name, "parameters": count, "bytes": size, "dtype": "/".join(sorted(dtypes))}
        for name, (count, size, dtypes) in counts.items()
    ]


def _geometry(config: Any) -> dict[str, Any]:
    """The fields of a config that differ from its defaults, and those that have none."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }


def _placed(source: Any, placements: Any, shapes: Any) -> dict[str, tuple[Any, tuple[int, ...]]]:
    from mllm_jax.interop.assemble import leaf_dtypes

    dtypes = leaf_dtypes(source, placements)
    return {path: (dtypes[path], shape) for path, shape in shapes.items()}


def _lone(path: Any, llm: bool = False) -> dict[str, Any]:
    from mllm_jax import interop
    from mllm_jax.interop import families, parts, towers
    from mllm_jax.interop.source import Source

    config = interop.llm_config(path) if llm else interop.vision_config(path)
    table, name = (families.LLMS, "llm") if llm else (families.VISION, "vision")
    family = families.for_config(table, config)
    source = Source(interop.resolve_path(path, "mini_llm" if llm else "mini_vit"))
    part = parts.llm_part(config, family) if llm else parts.vision_part(config, family)
    neighbours = towers.LLM_NEIGHBOURS if llm else towers.VISION_NEIGHBOURS
    placements, shapes, _ = parts.plan_parts(source, [part], neighbours)
    what = f"{'LLM' if llm else 'vision tower'} ({family.model_type})"
    return _total(what, {name: _geometry(config)}, _modules(_placed(source, placements, shapes), f"{name}/"))


def _model_geometry(model: Any) -> dict[str, Any]:
    from mllm_jax.models.encoders import EncodersConfig

    whole = {key: value for key, value in _geometry(model).items() if key not in ("vision", "llm")}
    whole["visual_tokens_per_image"] = model.image_layout.most_tokens
    described = {"vision": _geometry(model.vision)}
    if isinstance(model.vision, EncodersConfig):
        del described["vision"]["towers"]
        described |= {f"vision/tower_{i}": _geometry(tower) for i, tower in enumerate(model.vision.towers)}
    return {"model": whole, **described, "llm": _geometry(model.llm)}


def _native(directory: pathlib.Path) -> dict[str, Any]:
    from mllm_jax.interop import native

    model = native.load_config(directory)
    what = f"mllm-jax model directory, connector {model.connector}"
    return _total(what, _model_geometry(model), _modules(native.stored(directory)))


def _composite(directory: pathlib.Path) -> dict[str, Any]:
    from mllm_jax.interop import checkpoints

    composite, planned = checkpoints.plan_model(directory)
    leaves = {}
    for tensors, placements, shapes, _ in planned:
        leaves |= _placed(tensors, placements, shapes)
    what = f"multimodal checkpoint, {checkpoints.describe(composite)}"
    if len(planned) > 1:
        what += f"; vision tower beside it: {'+'.join(composite.towers)}"
    return _total(what, _model_geometry(composite.model), _modules(leaves))


def _adapter(directory: pathlib.Path) -> dict[str, Any]:
    from mllm_jax.interop import peft
    from mllm_jax.interop.source import Source

    lora = peft.read_lora(directory)
    source = Source(directory, [p for p in (directory / name for name in peft.WEIGHTS) if p.exists()][:1])
    leaves = {f"adapter/{name.split('.')[-3]}": [] for name in source}
    modules = []
    for key in leaves:
        names = [name for name in source if name.split(".")[-3] == key.split("/")[1]]
        parts = _modules({f"{key}/{name}": (source.dtype(name), source.shape(name)) for name in names})
        modules += parts
    geometry = {"adapter": {"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout}}
    return _total("LoRA adapter (PEFT)", geometry, modules)


def _run(directory: pathlib.Path) -> dict[str, Any]:
    from mllm_jax.inference import runs
    from mllm_jax.interop import native
    from mllm_jax.models.mllm import abstract_params
    from mllm_jax.models.paths import flatten
    from mllm_jax.workdir import saved_config

    config = saved_config(directory)
    model = runs.model_config(config)
    finished = runs.finished_stages(directory, config)
    if finished:
        leaves = native.stored_tree(directory / "params" / finished[-1])
    else:
        leaves = {path: (leaf.dtype, leaf.shape) for path, leaf in flatten(abstract_params(model)).items()}
    what = f"run of train.py, connector {model.connector}; finished stages: {', '.join(finished) or 'none'}"
    return _total(what, _model_geometry(model), _modules(leaves))
