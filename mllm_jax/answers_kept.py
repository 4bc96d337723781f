"""Answers that a run has already got: whether a configuration asks for others in their place."""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mllm_jax import storage
from mllm_jax.config import data_seed
from mllm_jax.history import starts
from mllm_jax.storage import Path

MANIFEST = "manifest.json"  # of a folder of answers (`evaluation.store`)
Changes = Mapping[str, list[Any]]  # key -> [value before, value now]


def find_conflict(workdir: Path, resolved: Mapping[str, Any], changed: Changes) -> tuple[Path, str] | None:
    """A folder of answers, and the key that was another one when they were given, so that they cannot be continued.

    What is not certain without reading the questions is left to the evaluation, which compares them with those that
    were answered (`evaluation.store.check_manifest`).

    Args:
      resolved: the configuration now.
      changed: what differs in it from that of the run.
    """
    changed = {key: values for key, values in changed.items() if key.startswith("eval.")}
    if not changed:
        return None
    before = list(starts(workdir))
    for name, values in resolved["eval"]["benchmarks"].items():
        folder = workdir / "eval" / name
        try:
            noted = json.loads(storage.read_text(folder / MANIFEST))
            written = storage.modified(folder / MANIFEST)
        except (OSError, ValueError):  # none, or damaged, as the evaluation says
            continue
        # What was changed after the answers were given is not of them.
        unsure = {key for start in before if start.time > written for key in start.changed}
        if not isinstance(noted, dict) or f"eval.benchmarks.{name}" in unsure:
            continue
        for key, (before, now) in changed.items():
            if key not in unsure and _conflicts(key, before, now, name, values, noted, resolved):
                return folder, key
    return None


def _conflicts(
    key: str,
    before: Any,
    now: Any,
    name: str,
    values: Mapping[str, Any],
    noted: Mapping[str, Any],
    resolved: Any,
) -> bool:
    match key.removeprefix(f"eval.benchmarks.{name}."):
        case "eval.template":
            return noted.get("template") == before
        case "eval.overlong":
            return noted.get("overlong", "error") == before
        case "eval.max_new_tokens":  # the answers may have had a limit of their own
            return not values["max_new_tokens"] and noted.get("max_new_tokens") == before
        case "max_new_tokens":  # 0: the official limit, which only the benchmark knows
            return bool(now) and noted.get("max_new_tokens") != now
        case "kind" | "options":
            return True
        case "count" | "framed":  # of questions that are made, not of those in a file
            return not values["path"]
        case "seed":
            common = data_seed(ConfigDict(resolved))
            seeds = [common if seed is None else seed for seed in (before, now)]
            return not values["path"] and seeds[0] != seeds[1]
    return False
