"""A stage-2 step of any model, with no data and no files around it: what other scripts time."""

from typing import Any

import jax

from mllm_jax.config import stage_config
from mllm_jax.data.batch import Batch
from mllm_jax.models import paths
from mllm_jax.models.mllm import ModelConfig, Params
from mllm_jax.parallel.mesh import make_mesh, use_mesh
from mllm_jax.training import step
from mllm_jax.training.optimizer import make_optimizer
from mllm_jax.training.params import place

RATE = 1e-4


class Trainer:
    """Connector and LLM trained in float32 by AdamW, gradients clipped to norm 1, the tower frozen.

    Args:
      devices: that share the rows of a batch.

    trainer = Trainer(model, params)
    batch = trainer.to_device(rows)
    compiled = trainer.compile(batch, label_tokens=128)
    loss = trainer.run(compiled, batch)
    """

    def __init__(self, model: ModelConfig, params: Params, devices: int = 1):
        self.model = model
        self._mesh = make_mesh({"data": devices}, jax.devices()[:devices])
        trained, self._frozen = (
            place(part, self._mesh, "float32", model)
            for part in paths.split(params, ("connector/.*", "llm/.*"))
        )
        stage = stage_config()
        stage.learning_rate, stage.schedule, stage.warmup_ratio = RATE, "constant", 0.0
        self._optimizer, _ = make_optimizer(stage, trained, 1000)
        self._state = step.init_state(trained, self._optimizer)

    def to_device(self, rows: Batch) -> Batch:
        """NumPy rows as the step takes them."""
        return step.to_device(rows, self._mesh)

    def compile(self, batch: Batch, label_tokens: int) -> Any:
        """The step for batches of this shape."""
        shardings = step.state_shardings(self._state, self._mesh, self.model)
        given = (step.with_shardings(self._state, shardings), self._frozen, batch)
        with use_mesh(self._mesh):
            made = step.make_train_step(
                self.model, self._optimizer, *given, label_tokens=label_tokens, accumulation=1, seed=0
            )
            return made.lower(*given).compile()

    def run(self, compiled: Any, batch: Batch) -> float:
        """One step; waits for it and returns its loss."""
        self._state, metrics = compiled(self._state, self._frozen, batch)
        return float(metrics["loss"])
