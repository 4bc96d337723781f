"""Answers that a run has already got: whether a configuration asks for others in their place."""

import contextlib
import datetime
import json
from collections.abc import Mapping
from typing import Any

from mllm_jax import storage
from mllm_jax.storage import Path

MANIFEST = "manifest.json"  # of a folder of answers (`evaluation.store`)
Changes = Mapping[str, list[Any]]  # key -> [value before, value now]


def find_conflict(
    workdir: Path, history: Path, resolved: Mapping[str, Any], changed: Changes
) -> tuple[Path, str] | None:
    """A folder of answers, and the key that was another one when they were given, so that they cannot be continued.

    What is not certain without reading the questions is left to the evaluation, which compares them with those that
    were answered (`evaluation.store.check_manifest`).

    Args:
      history: where each start of the run noted what had changed.
      resolved: the configuration now.
      changed: what differs in it from that of the run.
    """
    for name, values in resolved["eval"]["benchmarks"].items():
        folder = workdir / "eval" / name
        try:
            noted, written = (
                json.loads(storage.read_text(folder / MANIFEST)),
                storage.modified(folder / MANIFEST),
            )
        except (OSError, ValueError):  # none, or damaged, as the evaluation says
            continue
        unsure = _changed_after(history, written)
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
            common = resolved["seed"] if resolved["data"]["seed"] is None else resolved["data"]["seed"]
            seeds = [common if seed is None else seed for seed in (before, now)]
            return not values["path"] and seeds[0] != seeds[1]
    return False


def _changed_after(history: Path, written: float) -> set[str]:
    """Keys that were changed after answers were given: what the run's configuration says of them is not of these."""
    keys: set[str] = set()
    with contextlib.suppress(FileNotFoundError):
        for line in storage.read_text(history, "replace").splitlines():
            # A line that a full disk cut off, or that is not of our making.
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                start = json.loads(line)
                if datetime.datetime.fromisoformat(start["time"]).timestamp() > written:
                    keys.update(start["changed"])
    return keys
