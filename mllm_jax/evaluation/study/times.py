"""How long steps and answers take, cell by cell: as `study latency` measured them, or as the runs logged their steps.

A time is known by its key: "prefill_seconds", "token_seconds", and "step_seconds/STAGE" for a training step.
"""

from collections.abc import Mapping
from typing import Any

from mllm_jax.evaluation.study.results import Study

STEP = "step_seconds/"  # and the stage's name
ANSWERING = {  # key -> how it is called
    "prefill_seconds": "image to first token",
    "token_seconds": "further token",
}


def time_name(key: str) -> str:
    """How a time is called."""
    return ANSWERING.get(key, f"step, {key.removeprefix(STEP)}")


class Times:
    """The times of a study's cells.

    Attributes:
      seconds: variant -> key -> seconds; every variant is there, but not every key.
      keys: of the times that any cell has, steps first.
      about: in words, where they come from.
    """

    def __init__(self, study: Study, latency: Mapping[str, Any] | None = None):
        """Steps count as measured if they were for all cells that have the stage; else those of the logs are taken.

        Args:
          latency: what `study latency` has written.
        """
        measured = latency["cells"] if latency else {}
        self.seconds: dict[str, dict[str, float]] = {variant.name: {} for variant in study.variants}
        logged = []
        for stage in study.stages:
            key = STEP + stage
            log = {v.name: v.step_seconds(stage) for v in study.variants}
            known = {v.name: measured.get(v.name, {}).get(key) for v in study.variants if v.trains(stage)}
            if not all(known.values()):
                known = {name: seconds for name, seconds in log.items() if seconds}
                logged.append(stage)
            for name, seconds in known.items():
                self.seconds[name][key] = seconds
        for name, seconds in self.seconds.items():
            seconds |= {key: one for key, one in measured.get(name, {}).items() if key in ANSWERING}
        found = {key for seconds in self.seconds.values() for key in seconds}
        self.keys = [key for key in (*(STEP + stage for stage in study.stages), *ANSWERING) if key in found]
        said = [f"Times are those of {latency['device']}, one cell after another."] if measured else []
        if logged:
            said.append(
                f"Steps of {' and '.join(logged)} are as the runs logged them, which depends on what else the machine "
                "was doing; “mllm-jax study latency” measures them apart."
            )
        self.about = " ".join(said)
