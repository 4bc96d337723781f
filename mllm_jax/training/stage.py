"""A stage, planned: the shapes, shardings and program of its training step, with no array made."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from mllm_jax.data.batch import Batch
from mllm_jax.inference import runs
from mllm_jax.models import mllm, paths
from mllm_jax.models.mllm import ModelConfig, Params
from mllm_jax.parallel.mesh import batch_shardings, use_mesh
from mllm_jax.parallel.row_parts import row_part
from mllm_jax.training import adapters
from mllm_jax.training.flops import StepFlops, step_flops
from mllm_jax.training.optimizer import make_optimizer
from mllm_jax.training.params import abstract, place
from mllm_jax.training.step import TrainState, init_state, make_train_step, state_shardings, with_shardings

LABEL_MULTIPLE = 32  # so that little of a change in the data makes another program


@dataclasses.dataclass(frozen=True, eq=False)
class StagePlan:
    """What a stage of a recipe computes on a mesh.

    Everything is derived from the three arguments by shapes alone: no checkpoint is read beyond its `config.json`, no
    data is opened and no array is made. A 7B model is planned in seconds on a laptop, and the mesh may be one of a
    topology that is not here (`jax.experimental.topologies`).

        plan = StagePlan(config, "finetune", mesh)
        plan.lower().compile().memory_analysis()

    `create_state`, `place_frozen` and `whole` carry the plan out with the parameters of a real run.

    Attributes:
      config: the whole recipe, checked.
      name: of the stage.
      mesh: devices, here or elsewhere; an abstract one is enough for shapes and shardings.
      num_steps: length of the stage, which decides its learning-rate schedule; None takes the stage's `steps`, or 1 for
        one that counts epochs. Shapes and costs do not depend on it.
      rows: `B` of a packed stage, which its data decide (`TrainIterator.rows`); None = one sample a row.
      most_labels: supervised tokens that no row has more of, as measured (`TrainIterator.label_tokens`);
        None = what `data.label_tokens` allows.
    """

    config: ConfigDict
    name: str
    mesh: Mesh | AbstractMesh
    num_steps: int | None = None
    rows: int | None = None
    most_labels: int | None = None

    @property
    def stage(self) -> ConfigDict:
        """The stage's settings."""
        return self.config.stages[self.name]

    @property
    def steps(self) -> int:
        """Steps of the stage."""
        return self.num_steps or self.stage.steps or 1

    @functools.cached_property
    def model(self) -> ModelConfig:
        """The model's computation, with the stage's adapters."""
        return dataclasses.replace(runs.model_config(self.config), lora=runs.lora_settings(self.stage))

    @functools.cached_property
    def _split(self) -> tuple[Params, Params]:
        return adapters.abstract_split(mllm.abstract_params(self.model), self.stage)

    @functools.cached_property
    def _optimizer(self) -> tuple[optax.GradientTransformation, optax.Schedule]:
        return make_optimizer(self.stage, self._split[0], self.steps)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the trained parameters."""
        return self._optimizer[0]

    def learning_rate(self, step: int) -> float:
        """The base learning rate of 0-based step `step`."""
        return float(self._optimizer[1](step))

    @functools.cached_property
    def state(self) -> TrainState:
        """Shapes, dtypes and shardings of what is trained: parameters and optimizer state."""
        trained = abstract(self._split[0], self.mesh, self.config.model.param_dtype, self.model)
        shapes = jax.eval_shape(lambda params: init_state(params, self.optimizer), trained)
        return with_shardings(shapes, state_shardings(shapes, self.mesh, self.model))

    @functools.cached_property
    def frozen(self) -> Params:
        """Shapes, dtypes and shardings of the other parameters that the step reads, int8 where they are kept so.

        With `cache_features` the vision encoder is not run and not among them.
        """
        kept = {part: tree for part, tree in self._split[1].items() if part not in self._left_out}
        return abstract(kept, self.mesh, self.config.model.frozen_dtype, self.model)

    @property
    def _left_out(self) -> tuple[str, ...]:
        return ("vision",) if self.stage.cache_features else ()

    @functools.cached_property
    def batch(self) -> Batch:
        """Shapes, dtypes and shardings of a batch, over all processes."""
        features = self.model.features_spec if self.stage.cache_features else None
        spec = Batch.spec(
            self.rows or self.stage.batch_size,
            length=self.seq_len,
            slots=self.stage.image_slots or self.config.data.image_slots,
            image_size=None if features else self.model.visual_layout.slot.size,
            features=features,
            grids=self.model.visual_layout.slot.native and not features,
            combination=self.model.visual_layout.combination,
        )
        return with_shardings(spec, batch_shardings(spec, self.mesh))

    @functools.cached_property
    def flops(self) -> StepFlops:
        """Model FLOPs of a step, as a function of what its batch holds."""
        return step_flops(self.model, *self._split, cached_features=self.stage.cache_features)

    @property
    def seq_len(self) -> int:
        """`T`, positions of a row."""
        return self.stage.seq_len or self.config.data.seq_len

    @property
    def label_tokens(self) -> int:
        """Positions of a row whose logits are computed: none that is supervised is left out."""
        limit = self.config.data.label_tokens or self.seq_len
        if self.most_labels is None:
            return limit
        return min(limit, -(-max(self.most_labels, 1) // LABEL_MULTIPLE) * LABEL_MULTIPLE)

    @functools.cached_property
    def step(self) -> Any:
        """`step(state, frozen, batch) -> (state, metrics)`, jitted but not compiled; see `step.make_train_step`."""
        return make_train_step(
            self.model,
            self.optimizer,
            self.state,
            self.frozen,
            self.batch,
            label_tokens=self.label_tokens,
            accumulation=self.stage.accumulation,
            seed=self.config.seed,
        )

    def lower(self) -> jax.stages.Lowered:
        """The step lowered for the mesh; `.compile()` then compiles it ahead of time."""
        with use_mesh(self.mesh):
            return self.step.lower(self.state, self.frozen, self.batch)

    def create_state(self, params: Params) -> TrainState:
        """The state before the first step, on the mesh.

        Args:
          params: of the whole model, host or device arrays (`params.starting_params`).
        """
        trained, _ = paths.split(params, adapters.trainable(self.stage))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        create = jax.jit(lambda trained: init_state(trained, self.optimizer), out_shardings=shardings)
        return create(place(trained, self.mesh, self.config.model.param_dtype, self.model))

    def place_frozen(self, params: Params) -> Params:
        """The frozen parameters that the step reads, on the mesh."""
        _, frozen = paths.split(params, adapters.trainable(self.stage))
        kept = {part: tree for part, tree in frozen.items() if part not in self._left_out}
        return place(
            adapters.quantized(self.stage, kept), self.mesh, self.config.model.frozen_dtype, self.model
        )

    def unused(self, params: Params) -> Params:
        """The parameters that the step does not read, as they are."""
        return {part: params[part] for part in self._left_out}

    def whole(self, state: TrainState, frozen: Params, unused: Params) -> Params:
        """All parameters after the stage, on the mesh: the trained, the frozen and the unused."""
        placed = place(unused, self.mesh, self.config.model.frozen_dtype, self.model)
        return paths.merge(state.params, frozen, placed)

    def empty_rows(self) -> Batch:
        """This process's rows of a batch without a sample, NumPy arrays."""
        count = row_part(self.mesh).count
        return self.batch.map(
            lambda leaf, field: np.full((leaf.shape[0] // count, *leaf.shape[1:]), field["empty"], leaf.dtype)
        )
