"""Our own model directory: what `mllm-jax import` writes and training, evaluation and export read.

model.json                  the computation (`ModelConfig`) and the format's version
params/                     an Orbax checkpoint of the parameters alone
preprocessor_config.json    image mean, standard deviation, size
tokenizer files             as Hugging Face has them
"""

import dataclasses
import pathlib
import shutil
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mllm_jax import files
from mllm_jax.interop.assemble import Placement, read_tree, write_plan
from mllm_jax.interop.hub import read_json
from mllm_jax.interop.rules import Rule
from mllm_jax.interop.safetensors_io import write_sharded
from mllm_jax.interop.sinks import read_to_devices
from mllm_jax.interop.source import Source
from mllm_jax.models.mllm import ModelConfig, abstract_params
from mllm_jax.models.paths import flatten, unflatten

ShardingOf = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
FILE = "model.json"
FORMAT = 1
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def model_to_json(config: ModelConfig) -> dict[str, Any]:
    """A `ModelConfig` as plain JSON."""
    return {"format": FORMAT, **dataclasses.asdict(config)}


def model_from_json(fields: dict[str, Any]) -> ModelConfig:
    """The inverse of `model_to_json`.

    Raises:
      ValueError: another format version, or a field that this version does not know.
    """
    fields = dict(fields)
    version = fields.pop("format", None)
    if version != FORMAT:
        raise ValueError(f"{FILE}: format {version!r}; this version of mllm-jax reads {FORMAT}")
    return _dataclass(ModelConfig, fields)


def _dataclass(kind: type, fields: dict[str, Any]) -> Any:
    known = {field.name: typing.get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}
    for name in fields:
        if name not in known:
            raise ValueError(f"{FILE}: {kind.__name__} has no field {name!r}; written by a newer mllm-jax?")
    return kind(**{name: _value(known[name], value) for name, value in fields.items()})


def _value(hint: Any, value: Any) -> Any:
    if isinstance(value, dict):
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = [option for option in options if dataclasses.is_dataclass(option)]
        fits = [kind for kind in kinds if value.keys() <= {field.name for field in dataclasses.fields(kind)}]
        return _dataclass((fits or kinds)[0], value)
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return tuple(_value(typing.get_args(hint)[0], item) for item in value)  # tuple[SomeDataclass, ...]
    return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def is_native(directory: pathlib.Path) -> bool:
    """Whether a directory is one of ours."""
    return (directory / FILE).exists()


def save_native(directory: pathlib.Path, config: ModelConfig, params: Any, form: str = "orbax") -> None:
    """Writes configuration, parameters and image processor; tokenizer files are added by `copy_tokenizer`.

    Args:
      form: "orbax" or "safetensors".

    Raises:
      FileExistsError: there are parameters already.
    """
    directory = pathlib.Path(directory)
    refuse_existing(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if form == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((directory / "params").absolute(), params)
    else:
        rules = [Rule(path, path) for path in flatten(params)]
        write_sharded(directory, write_plan(params, rules))
    write_processor(directory, config)
    files.write_json(directory / FILE, model_to_json(config))


def refuse_existing(directory: pathlib.Path) -> None:
    """Weights are never overwritten.

    Raises:
      FileExistsError: `directory` holds some.
    """
    found = next(
        iter([*directory.glob("params"), *directory.glob("*.safetensors"), *directory.glob("*.bin")]), None
    )
    if found is not None:
        raise FileExistsError(f"{found} exists; choose another directory or remove it")


def write_processor(directory: pathlib.Path, config: ModelConfig) -> None:
    """preprocessor_config.json of the tower at the model's resolution."""
    files.write_json(
        directory / "preprocessor_config.json", processor_json(config.vision, config.image_size), indent=2
    )


def processor_json(vision: Any, size: int) -> dict[str, Any]:
    """An image processor's configuration in Hugging Face's words; of fused towers the first one's."""
    vision = getattr(vision, "towers", (vision,))[0]
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
        "rescale_factor": 1 / 255,
        "resample": 3,
        "size": {"height": size, "width": size},
    }
    if vision.class_token:
        processor |= {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": size},
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
        }
    return processor


def copy_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> list[str]:
    """Copies tokenizer files; returns their names."""
    found = [name for name in TOKENIZER_FILES if (source / name).exists()]
    for name in found:
        shutil.copyfile(source / name, directory / name)
    return found


def load_config(directory: pathlib.Path) -> ModelConfig:
    """The computation of a model directory."""
    return model_from_json(read_json(pathlib.Path(directory) / FILE))


def load_params(
    directory: pathlib.Path,
    part: str | None = None,
    sharding_of: ShardingOf | None = None,
    dtype: Any = None,
) -> Any:
    """The parameters of a model directory, or of one part of it.

    Args:
      part: "vision", "connector" or "llm".
      sharding_of: (path, shape) -> sharding; None gives NumPy arrays.
      dtype: of the result; None keeps the stored one.

    Raises:
      ValueError: the checkpoint does not hold what model.json describes.
    """
    directory = pathlib.Path(directory)
    held = {path: shape for path, (_, shape) in stored(directory).items()}
    _check(directory, held, flatten(abstract_params(load_config(directory))))
    if not (directory / "params").exists():
        return _load_safetensors(directory, part, sharding_of, dtype)
    return load_tree(directory / "params", part, sharding_of, dtype)


def load_tree(
    path: pathlib.Path,
    part: str | None = None,
    sharding_of: ShardingOf | None = None,
    dtype: Any = None,
) -> Any:
    """An Orbax checkpoint of parameters, or one of its top-level entries; arguments as in `load_params`."""
    path, items, arguments = path.absolute(), {}, {}
    for name, (kept, shape) in stored_tree(path).items():
        if part is not None and name.split("/")[0] != part:
            continue
        kind = np.dtype(dtype or kept)
        if sharding_of is None:
            items[name] = np.empty((0,), kind)
            arguments[name] = ocp.RestoreArgs(restore_type=np.ndarray, dtype=kind)
        else:
            sharding = sharding_of(name, shape)
            items[name] = jax.ShapeDtypeStruct(shape, kind, sharding=sharding)
            arguments[name] = ocp.ArrayRestoreArgs(sharding=sharding, dtype=kind)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restore = ocp.args.PyTreeRestore(
            item=unflatten(items), restore_args=unflatten(arguments), partial_restore=True
        )
        restored = checkpointer.restore(path, args=restore)
    return restored if part is None else restored[part]


Stored = dict[str, tuple[Any, tuple[int, ...]]]  # path -> (dtype, shape)


def stored_tree(path: pathlib.Path) -> Stored:
    """What an Orbax checkpoint of parameters holds."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = flatten(checkpointer.metadata(path.absolute()).item_metadata.tree)
    return {name: (np.dtype(leaf.dtype), tuple(leaf.shape)) for name, leaf in tree.items()}


def stored(directory: pathlib.Path) -> Stored:
    """What a model directory holds, without reading it."""
    if (directory / "params").exists():
        return stored_tree(directory / "params")
    source = Source(directory)
    return {name: (source.dtype(name), source.shape(name)) for name in source}


def _load_safetensors(directory: pathlib.Path, part: str | None, sharding_of: Any, dtype: Any) -> Any:
    source = Source(directory)
    chosen = [name for name in source if part is None or name.split("/")[0] == part]
    placements = [Placement(name, name, None, Rule(name, name)) for name in chosen]
    shapes = {name: source.shape(name) for name in chosen}
    if sharding_of is None:
        params = read_tree(source, placements, shapes, dtype)
    else:
        params = read_to_devices(source, placements, shapes, sharding_of, dtype)
    return params if part is None else params[part]


def _check(directory: pathlib.Path, stored: dict[str, tuple[int, ...]], wanted: dict[str, Any]) -> None:
    adapters = {path for path in stored if path.rsplit("/", 1)[-1] in ("lora_a", "lora_b", "kernel_scale")}
    for path in sorted((stored.keys() - adapters) | wanted.keys()):
        have = stored.get(path)
        want = tuple(wanted[path].shape) if path in wanted else None
        if have != want:
            raise ValueError(f"{directory}: parameter {path!r} is stored as {have}, but {want} by {FILE}")
