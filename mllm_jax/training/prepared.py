"""What `mllm-jax prepare` has written for which settings, so that training need not look at the JSON and the images.

`DATA_DIR/prepared.json` holds for every stage and source the settings that decide which samples are prepared and
whether they fit a row, and the fingerprint of the data set that came of them.
"""

import json
import pathlib
import re
from typing import Any

from ml_collections import ConfigDict

from mllm_jax import files
from mllm_jax.config import ConfigError, data_seed
from mllm_jax.data.reading import read_json
from mllm_jax.data.samples import Source

FILE = "prepared.json"
# Keys below `stages.NAME` and `data`; the places of files do not count.
_OF_STAGE = ("template", "aspect", "seq_len", "image_slots", "samples_per_row")
_OF_DATA = (
    "seq_len",
    "image_slots",
    "label_tokens",
    "compat",
    "overlong",
    "broken",
    "max_image_pixels",
    "aspect",
)
_OF_VISION = ("image_size", "max_patches", "image_sizes", "combine", "split", "overview")
_OF_SOURCE = ("kind", "split", "form", "count", "framed", "duplicate_ids")


def dataset_name(source: str) -> str:
    """The name of a source's data set among prepared data."""
    return "source_" + re.sub(r"[^a-z0-9_]", "_", source.lower())


def note_prepared(
    config: ConfigDict, stage: str, source: str, directory: pathlib.Path, fingerprint: str
) -> None:
    """Notes that a source of a stage was prepared under `directory`."""
    settings = _settings(config, stage, source)
    notes = [note for note in _read(directory) if note["settings"] != settings]
    notes.append({"stage": stage, "source": source, "fingerprint": fingerprint, "settings": settings})
    files.write_json(directory / FILE, notes)


def find_prepared(config: ConfigDict, stage: str, source: str, directory: pathlib.Path) -> Source:
    """The data set that was prepared for a source of a stage.

    Raises:
      ConfigError: none was with these settings; says which setting differs.
    """
    from mllm_jax.data import tfds_llava  # slow to import: tensorflow-datasets

    settings = _settings(config, stage, source)
    notes = [note for note in _read(directory) if (note["stage"], note["source"]) == (stage, source)]
    fix = "run `mllm-jax prepare` with this configuration, or set data.prepared=False"
    for note in notes:
        if note["settings"] == settings:
            found = tfds_llava.prepared(directory, dataset_name(source), note["fingerprint"])
            if found is None:
                raise ConfigError(
                    f"config key 'data.prepared': source {source!r} of stage {stage!r} was prepared, but its files in "
                    f"{directory / dataset_name(source)} are gone; {fix}"
                )
            return found
    why = "it was not prepared"
    if notes:
        there = notes[-1]["settings"]
        key = next(key for key in {**settings, **there} if settings.get(key) != there.get(key))
        why = f"it was prepared with {key} = {there.get(key)!r}, not {settings.get(key)!r}"
    raise ConfigError(f"config key 'data.prepared': source {source!r} of stage {stage!r}: {why}; {fix}")


def _settings(config: ConfigDict, stage: str, source: str) -> dict[str, Any]:
    """What decides which samples are prepared and whether they fit, by configuration key."""
    here = f"stages.{stage}"
    values, entry = config.stages[stage], config.stages[stage].sources[source]
    found = {f"{here}.{key}": values[key] for key in _OF_STAGE}
    found |= {f"{here}.sources.{source}.{key}": entry[key] for key in _OF_SOURCE}
    found[f"{here}.sources.{source}.json"] = pathlib.PurePath(entry.json).name
    found |= {f"data.{key}": config.data[key] for key in _OF_DATA}
    found["seed"] = data_seed(config) if entry.kind == "mini_world" else None
    chosen = config.model.connector.name
    found["model.connector.name"] = chosen
    found[f"model.connector.{chosen}"] = config.model.connector.get(chosen, ConfigDict()).to_dict()
    found["model.tiles"] = config.model.tiles.to_dict()
    if config.model.video.frames:  # without videos, as it was noted before there were any
        found["model.video"] = config.model.video.to_dict()
    found |= {f"model.vision.{key}": config.model.vision[key] for key in _OF_VISION}
    towers = [pathlib.PurePath(path).name for path in config.model.vision.path.split("+")]
    found["model.vision.path"] = "+".join(towers)
    found["model.llm.path"] = pathlib.PurePath(config.model.llm.path).name
    return json.loads(json.dumps(found))  # as it is read again: lists for tuples


def _read(directory: pathlib.Path) -> list[dict[str, Any]]:
    """The notes of a data folder, the latest last.

    Raises:
      DataError: the file is damaged.
    """
    path = directory / FILE
    return read_json(path) if path.exists() else []
