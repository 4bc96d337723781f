"""The work directory: which configuration it belongs to, and that configuration."""

import contextlib
import json
import pathlib
import re
from typing import Any

from ml_collections import ConfigDict

from mllm_jax import files
from mllm_jax.config import NAMED_CHILDREN, ConfigError, default_config, default_of, generic_key, join_key
from mllm_jax.config_check import check

# Keys that may change between runs of one work directory: they do not alter what is trained, or (overlong,
# max_image_pixels, duplicate_ids) only at a sample that would have stopped the run.
FREE = re.compile(
    r"data\.(dir|threads|overlong|max_image_pixels)|(mesh|eval)(\..*)?|stages\..+\.duplicate_ids|stages\.[^.]+\.(log_every|checkpoint_every|keep_last|keep_best|cache_features)"
)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {
            k: v
            for key, item in value.items()
            for k, v in _flat(item, f"{path}.{key}" if path else key).items()
        }
    return {path: value}


def _read(workdir: pathlib.Path) -> dict[str, Any]:
    path = workdir / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{workdir} holds no run: {path.name} is missing; give the --workdir of a run of train.py"
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged ({error}); put back the configuration that the run was begun with"
        ) from error
    if not isinstance(values, dict) or "stage_order" not in values:
        raise ConfigError(f"{path} is not that of a run; give the --workdir of a run of train.py")
    return values


def _completed(saved: Any, schema: Any, path: str = "") -> Any:
    """Saved values, with the defaults of keys that are newer than the run, and tuples for lists."""
    child = NAMED_CHILDREN.get(generic_key(path))
    if child and isinstance(saved, dict):
        return {name: _completed(entry, child(), join_key(path, name)) for name, entry in saved.items()}
    if isinstance(schema, ConfigDict) and isinstance(saved, dict):
        known = {
            key: _completed(saved[key], value, join_key(path, key)) if key in saved else value
            for key, value in schema.items()
        }
        return {**saved, **known}
    if isinstance(saved, list):
        return tuple(_completed(item, None) for item in saved)
    return saved


def saved_config(workdir: pathlib.Path) -> ConfigDict:
    """The configuration that a work directory was trained with.

    Raises:
      ConfigError: not a work directory, a damaged file, or a key or value in it that this version does not know.
    """
    config = ConfigDict(_completed(_read(workdir), default_config()))
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(f"{workdir / 'config.json'}: {error}") from error
    return config


def claim(workdir: pathlib.Path, resolved: dict[str, Any], write: bool = True) -> None:
    """Makes `workdir` belong to this configuration, or checks that it already does.

    Args:
      write: False only checks (all processes but the first).

    Raises:
      ConfigError: it holds another configuration's run; the first differing key is named.
    """
    path = workdir / "config.json"
    if path.exists():
        have, want = _flat(_read(workdir)), _flat(resolved)
        for key in want.keys() - have.keys():  # newer than the run, which is one with the default
            with contextlib.suppress(ConfigError):
                have[key] = default_of(key)
        for key in sorted(have.keys() | want.keys()):
            if have.get(key) != want.get(key) and not FREE.fullmatch(key):
                raise ConfigError(
                    f"{workdir} holds a run with {key} = {have.get(key)!r}, not {want.get(key)!r}; choose another "
                    "--workdir, or go back to that run's configuration to continue it"
                )
    elif workdir.exists() and not all(map(files.is_temporary, workdir.iterdir())):
        raise ConfigError(
            f"{workdir} is not empty and holds no run (no config.json); choose another --workdir"
        )
    if not write:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    files.remove_stale(workdir)
    files.write_text(path, json.dumps(resolved, indent=1, sort_keys=True))
