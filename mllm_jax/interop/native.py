"""Our own model directory: what `mllm-jax import` writes and training, evaluation and export read.

model.json                  the computation (`ModelConfig`) and the format's version
params/                     an Orbax checkpoint of the parameters alone
preprocessor_config.json    image mean, standard deviation, size
tokenizer files             as Hugging Face has them
"""

import contextlib
import dataclasses
import pathlib
import shutil
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mllm_jax import files, limits
from mllm_jax.data.naflex import NaFlexProcessor
from mllm_jax.data.preprocessing import ImageProcessor, UnsupportedProcessorError
from mllm_jax.interop.assemble import Placement, read_tree, write_plan
from mllm_jax.interop.families.base import check_geometry
from mllm_jax.interop.hub import read_json
from mllm_jax.interop.rules import Rule
from mllm_jax.interop.safetensors_io import write_sharded
from mllm_jax.interop.sinks import read_to_devices
from mllm_jax.interop.source import Source
from mllm_jax.models.mllm import ModelConfig, abstract_params
from mllm_jax.models.paths import flatten, unflatten
from mllm_jax.storage import Path, absolute

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
)


EXTRAS = {"template": str, "aspect": str, "image_token_index": int}  # what else model.json may say


def model_to_json(config: ModelConfig, **extras: str | int | None) -> dict[str, Any]:
    """A `ModelConfig` as plain JSON.

    Args:
      extras: `template` and `aspect`, the conversation template that the model was trained with and how it was shown
        images that are not square (`data.aspect`); `image_token_index`, the id that stands for an image in the
        tokenizer of a llava-hf checkpoint. None = not known.
    """
    known = {key: value for key, value in extras.items() if value is not None}
    fields = dataclasses.asdict(config)
    return {"format": FORMAT, **{name: fields[name] for name in config.settings}, **known}


def model_from_json(fields: dict[str, Any]) -> ModelConfig:
    """The inverse of `model_to_json`.

    Raises:
      ValueError: another format version, or a field that this version does not know.
    """
    fields = dict(fields)
    version = fields.pop("format", None)
    if version != FORMAT:
        raise ValueError(f"{FILE}: format {version!r}; this version of mllm-jax reads {FORMAT}")
    read_extras(fields)
    config = _dataclass(ModelConfig, {key: value for key, value in fields.items() if key not in EXTRAS})
    _check_sizes(config)
    return config


def read_extras(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a `model_to_json` says besides the computation, where it is known.

    Raises:
      ValueError: a value of another type.
    """
    for key, kind in EXTRAS.items():
        if key in fields and type(fields[key]) is not kind:
            raise ValueError(f"{FILE}: {key}={fields[key]!r} must be {kind.__name__}")
    return {key: fields[key] for key in EXTRAS if key in fields}


def _check_sizes(config: ModelConfig) -> None:
    for name in ("dtype", "param_dtype"):
        if (value := getattr(config, name)) not in DTYPES:
            raise ValueError(f"{FILE}: {name}={value!r} is none of {', '.join(DTYPES)}")
    if config.max_patches:
        limits.check("MAX_WIDTH", config.max_patches, f"{FILE}: max_patches")
    else:
        limits.check("MAX_IMAGE_SIDE", max(config.slot_size), f"{FILE}: image_size")
    if config.video:
        limits.check("MAX_WIDTH", config.video.combination.taps * config.video.frames, f"{FILE}: video")
    for pair in config.tiles.pinpoints if config.tiles else ():
        limits.check("MAX_IMAGE_SIDE", max(pair) * max(config.slot_size), f"{FILE}: pinpoints")
    for part in (*config.vision.towers, config.llm):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if type(value) is not int:
                continue
            if value < 1 and field.name != "registers":
                raise ValueError(f"{FILE}: {field.name}={value} must be positive")
            name = _LIMITS.get(field.name, "MAX_WIDTH")
            limits.check(name, value, f"{FILE}: {field.name}")
        try:
            check_geometry(part)
        except ValueError as error:
            raise ValueError(f"{FILE}: {error}") from error


DTYPES = ("float32", "bfloat16", "float16")  # that a model computes in
_LIMITS = {
    "depth": "MAX_LAYERS",
    "image_size": "MAX_IMAGE_SIDE",
    "vocab": "MAX_VOCABULARY",
    "max_positions": "MAX_POSITIONS",
    "rope_theta": "MAX_POSITIONS",
}


def _dataclass(kind: type, fields: dict[str, Any]) -> Any:
    known = {field.name: typing.get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}
    for name in fields:
        if name not in known:
            raise ValueError(f"{FILE}: {kind.__name__} has no field {name!r}; written by a newer mllm-jax?")
    for field in dataclasses.fields(kind):
        if field.name not in fields and field.default is dataclasses.MISSING:
            raise ValueError(f"{FILE}: {kind.__name__} lacks {field.name!r}")
    return kind(**{name: _value(name, known[name], value) for name, value in fields.items()})


def _value(name: str, hint: Any, value: Any) -> Any:
    """A JSON value in the type of a field.

    Raises:
      ValueError: it has another type.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, dict):
        kinds = [option for option in options if dataclasses.is_dataclass(option)]
        fits = [kind for kind in kinds if value.keys() <= {field.name for field in dataclasses.fields(kind)}]
        if kinds:
            return _dataclass((fits or kinds)[0], value)
    elif isinstance(value, list):
        for option in (option for option in options if typing.get_origin(option) is tuple):
            items = typing.get_args(option)
            if items[-1] is ...:
                return tuple(_value(name, items[0], item) for item in value)
            if len(items) == len(value):
                return tuple(_value(name, each, item) for each, item in zip(items, value, strict=True))
        if typing.Any in options:
            return tuple(_value(name, Any, item) for item in value)
    elif typing.Any in options or type(value) in options:
        return value
    elif type(value) is int and float in options and abs(value) < 1 << 53:
        return float(value)
    wanted = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ValueError(f"{FILE}: {name}={value!r} must be {wanted}")


def is_native(directory: pathlib.Path) -> bool:
    """Whether a directory is one of ours."""
    return (directory / FILE).exists()


def save_native(
    directory: pathlib.Path,
    config: ModelConfig,
    params: Any,
    form: str = "orbax",
    processor: Mapping[str, Any] | None = None,
    **extras: str | int | None,
) -> None:
    """Writes configuration, parameters and image processor; tokenizer files are added by `copy_tokenizer`.

    Args:
      form: "orbax" or "safetensors".
      processor: the tower's, as in `processor_json`.
      extras: as in `model_to_json`.

    Raises:
      FileExistsError: the directory holds files already.
      ValueError: as in `processor_json`; nothing is written.
    """
    directory = pathlib.Path(directory)
    refuse_existing(directory)
    if config.max_patches:
        processor = NaFlexProcessor.of(config).hf_config()
    else:
        processor = processor_json(config.vision, config.image_size, processor)
    directory.mkdir(parents=True, exist_ok=True)
    if form == "orbax":
        import orbax.checkpoint as ocp  # slow to import

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((directory / "params").absolute(), params)
    else:
        rules = [Rule(path, path) for path in flatten(params)]
        write_sharded(directory, write_plan(params, rules))
    files.write_json(directory / "preprocessor_config.json", processor, indent=2)
    files.write_json(directory / FILE, model_to_json(config, **extras))


def refuse_existing(directory: pathlib.Path) -> None:
    """Nothing is overwritten, and no weights are left beside new ones: a checkpoint is written into an empty folder.

    Raises:
      FileExistsError: `directory` holds something (hidden files do not count), or is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; choose another directory")
    found = min((path for path in directory.glob("*") if not path.name.startswith(".")), default=None)
    if found is not None:
        raise FileExistsError(f"{found} exists; choose another directory or remove it")


def processor_json(vision: Any, size: int, published: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An image processor's configuration in Hugging Face's words; of fused towers the first one's.

    Args:
      published: the configuration that came with the tower (`hub.load_processor_config`), of which filter and geometry
        are kept; without it, or of a kind that is not known here, they are CLIP's for a tower with a class token, and
        SigLIP's for one without.

    Raises:
      ValueError: `published` holds a value of the wrong type; its key is named.
    """
    vision = vision.towers[0]
    processor = ImageProcessor(size, "crop" if vision.crops else "stretch", vision.mean, vision.std)
    if published:
        with contextlib.suppress(UnsupportedProcessorError):
            processor = ImageProcessor.from_hf_config(published).at_size(size)
    return processor.hf_config()


def copy_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> list[str]:
    """Copies tokenizer files; returns their names."""
    found = [name for name in TOKENIZER_FILES if (source / name).exists()]
    for name in found:
        shutil.copyfile(source / name, directory / name)
    return found


def load_config(directory: pathlib.Path) -> ModelConfig:
    """The computation of a model directory."""
    return model_from_json(read_json(pathlib.Path(directory) / FILE))


def load_extras(directory: pathlib.Path) -> dict[str, Any]:
    """What model.json says besides the computation: `template`, `aspect`, `image_token_index`, where they are known."""
    return read_extras(read_json(pathlib.Path(directory) / FILE))


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
    path: Path,
    part: str | None = None,
    sharding_of: ShardingOf | None = None,
    dtype: Any = None,
) -> Any:
    """An Orbax checkpoint of parameters, or one of its top-level entries; arguments as in `load_params`."""
    import orbax.checkpoint as ocp  # slow to import

    path, items, arguments = absolute(path), {}, {}
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


def stored_tree(path: Path) -> Stored:
    """What an Orbax checkpoint of parameters holds.

    Raises:
      ValueError: it is incomplete.
    """
    import orbax.checkpoint as ocp  # slow to import

    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(absolute(path)).item_metadata
    if metadata is None:
        raise ValueError(f"{path} is not a complete Orbax checkpoint: its metadata are missing")
    tree = flatten(metadata.tree)
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
