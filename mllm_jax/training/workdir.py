"""The work directory: which configuration it belongs to."""

import contextlib
import json
import os
import pathlib
import re
from typing import Any

from mllm_jax.config import ConfigError, default_of

# Keys that may change between runs of one work directory: they do not alter what is trained, or (overlong,
# max_image_pixels, duplicate_ids) only at a sample that would have stopped the run.
FREE = re.compile(
    r"data\.(dir|threads|overlong|max_image_pixels)|(mesh|eval)(\..*)?|stages\..+\.duplicate_ids|stages\.[^.]+\.(log_every|checkpoint_every|keep_last|keep_best|cache_features)"
)
TEMPORARY = "config.json.tmp"


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {
            k: v
            for key, item in value.items()
            for k, v in _flat(item, f"{path}.{key}" if path else key).items()
        }
    return {path: value}


def claim(workdir: pathlib.Path, resolved: dict[str, Any], write: bool = True) -> None:
    """Makes `workdir` belong to this configuration, or checks that it already does.

    Args:
      write: False only checks (all processes but the first).

    Raises:
      ConfigError: it holds another configuration's run; the first differing key is named.
    """
    path = workdir / "config.json"
    if path.exists():
        have, want = _flat(json.loads(path.read_text())), _flat(resolved)
        for key in want.keys() - have.keys():  # newer than the run, which is one with the default
            with contextlib.suppress(ConfigError):
                have[key] = default_of(key)
        for key in sorted(have.keys() | want.keys()):
            if have.get(key) != want.get(key) and not FREE.fullmatch(key):
                raise ConfigError(
                    f"{workdir} holds a run with {key} = {have.get(key)!r}, not {want.get(key)!r}; choose another "
                    "--workdir, or go back to that run's configuration to continue it"
                )
    elif workdir.exists() and any(entry.name != TEMPORARY for entry in workdir.iterdir()):
        raise ConfigError(
            f"{workdir} is not empty and holds no run (no config.json); choose another --workdir"
        )
    if not write:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = workdir / TEMPORARY  # all that a run killed right here leaves behind
    temporary.write_text(json.dumps(resolved, indent=1, sort_keys=True))
    os.replace(temporary, path)
