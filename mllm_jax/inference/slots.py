"""Answers that come and go: a cache of slots, each with a column of its own, for requests that arrive at any time.

    slots = Slots(config, params, rows=8, stop_ids=model.stops[0])
    slots.put(3, prompts, max_new_tokens=64, sampling=None)    # reads one prompt into slot 3
    progress = slots.step()                                    # the next token of every slot
    slots.free(3)

Every prompt is read alone, and all rows take every step, so that what one row computes never depends on the others.
The cache has as many columns as the longest of the present sequences needs, a power of two; it grows when a longer one
is put in and is made anew when none is left.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from mllm_jax.inference.prefixes import PromptBatch
from mllm_jax.inference.sampling import Draws, Sampling, every_draw
from mllm_jax.inference.session import Session, State, advance, progress
from mllm_jax.models import mllm
from mllm_jax.models.attention import current_platform
from mllm_jax.models.decoder import Cache, apart_cache, apart_params
from mllm_jax.models.mllm import ModelConfig, Params

_FEWEST = 128  # columns


class Progress(NamedTuple):
    """What a step did to every slot; see `session.State`."""

    tokens: Int32[np.ndarray, " B"]
    counts: Int32[np.ndarray, " B"]
    stopped: Bool[np.ndarray, " B"]
    done: Bool[np.ndarray, " B"]


class Slots:
    """Rows that are given to prompts one by one.

    Args:
      config, params: the model.
      rows: B.
      stop_ids: ids that end an answer.
      most_columns: tokens of the longest prompt together with its answer; None = the LLM's context.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        rows: int,
        stop_ids: Sequence[int],
        most_columns: int | None = None,
    ):
        self._session = Session(config, params, stop_ids=stop_ids)
        self.rows, self.limit = rows, self._session.limit
        self.most_columns = min(most_columns or config.llm.max_positions, config.llm.max_positions)
        self._apart = current_platform() == "cpu"
        self._params = {**params, "llm": apart_params(params["llm"])} if self._apart else params
        self._state: State | None = None
        self._needed = np.zeros(rows, np.int64)  # columns of each slot; 0 = free
        self._drawing = np.zeros(rows, bool)
        self._draws = every_draw([], [], rows)

    @property
    def columns(self) -> int:
        """Columns that the cache has; 0 while no slot is in use."""
        return 0 if self._state is None else self._state.cache.segments.shape[1]

    def put(
        self, row: int, prompts: PromptBatch, *, max_new_tokens: int, sampling: Sampling | None
    ) -> tuple[int, bool, bool]:
        """Reads one prompt into a free slot and chooses the first token of its answer.

        Args:
          prompts: of one request.
          max_new_tokens: most tokens of the answer.
          sampling: how tokens are drawn; None = greedy.

        Returns:
          The token, whether it is a stop id, and whether the answer is complete.

        Raises:
          ValueError: the slot is in use, or prompt and answer do not fit `most_columns`.
        """
        (request,) = prompts.requests
        needed = len(request.prompt) + max_new_tokens
        if self._needed[row]:
            raise ValueError(f"slot {row} is in use")
        if needed > self.most_columns:
            raise ValueError(f"prompt and answer have {needed} tokens, more than {self.most_columns}")
        draws = every_draw([sampling], [request.id], 1)
        columns = prompts.prefixes.segments.shape[1] + prompts.rows.tokens.shape[1]
        read = self._session.read(prompts, max_new_tokens, draws, self._sized(columns) - columns)
        if self._state is None:
            self._state = _empty(self._session.config, self.rows, self._sized(needed), self._apart)
        elif needed > self.columns:
            self._state = _widened(self._state, self._sized(needed) - self.columns)
        state, self._state = self._state, None  # used up, also if this fails
        self._state, self._draws = _place(state, self._draws, row, read)
        self._needed[row], self._drawing[row] = needed, sampling is not None and sampling.temperature > 0
        token, _, stopped, done = jax.device_get(progress(read))
        return int(token[0]), bool(stopped[0]), bool(done[0])

    def step(self) -> Progress:
        """Gives every slot its next token; free and done ones have none that means anything.

        Raises:
          ValueError: no slot is in use.
        """
        if self._state is None:
            raise ValueError("no slot is in use")
        # Greedy rows choose the same tokens either way; without draws the logits are not sorted.
        draws = self._draws if self._drawing.any() else None
        state = self._state.replace(draws=draws)
        self._state = None  # used up, also if the step fails
        found, state = _step(self._session.config, state, self._params, self._session.stops)
        if draws is not None:
            self._draws = state.draws
        self._state = state.replace(draws=None)
        return Progress(*jax.device_get(found))

    def free(self, row: int) -> None:
        """Gives a slot back, whatever its answer has come to."""
        self._needed[row], self._drawing[row] = 0, False
        if not self._needed.any():
            self._state = None

    def clear(self) -> None:
        """Gives all slots back, also after a step that failed."""
        self._needed[:], self._drawing[:], self._state = 0, False, None
        self._draws = every_draw([], [], self.rows)

    def _sized(self, columns: int) -> int:
        return max(_FEWEST, 1 << (columns - 1).bit_length())


def _empty(config: ModelConfig, rows: int, columns: int, apart: bool) -> State:
    """All rows done, with a column of their own each."""
    cache = mllm.empty_cache(config, rows, columns)
    cache = cache.replace(column=jnp.zeros(rows, jnp.int32))
    none = np.zeros(rows, np.int32)
    return State(
        cache=apart_cache(cache) if apart else cache,
        logits=jnp.zeros((rows, config.llm.vocab), jnp.float32),
        tokens=jnp.asarray(none),
        positions=jnp.asarray(none),
        counts=jnp.asarray(none),
        limits=jnp.asarray(none),
        stopped=jnp.zeros(rows, bool),
        done=jnp.ones(rows, bool),
        draws=None,
    )


@functools.partial(jax.jit, static_argnums=1)
def _widened(state: State, more: int) -> State:
    cache = state.cache
    k, v = jax.tree.map(lambda leaf: _padded(leaf, more), (cache.k, cache.v))
    return state.replace(cache=Cache(k, v, jnp.pad(cache.segments, ((0, 0), (0, more))), cache.column))


def _padded(leaf: Array, more: int) -> Array:
    return jnp.pad(leaf, [(0, 0)] * 3 + [(0, more), (0, 0)])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step(
    config: ModelConfig, state: State, params: Params, stops: Int[Array, " n"]
) -> tuple[tuple[Array, ...], State]:
    state = advance(config, params, state, stops)
    return progress(state), state


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _place(state: State, draws: Draws, row: Int[Array, ""], other: State) -> tuple[State, Draws]:
    """Puts the only row of `other` into a row; the columns of its prompt move together, without padding."""
    cache, new = state.cache, other.cache
    columns = min(cache.segments.shape[1], new.segments.shape[1])
    order = jnp.argsort(new.segments[0] == 0, stable=True)[:columns]
    length = jnp.sum(new.segments[0] != 0)

    def written(whole: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice(
            whole, part[:, :, :, order].astype(whole.dtype), (0, row, 0, 0, 0)
        )

    if cache.apart:
        new = apart_cache(new)
    k, v = jax.tree.map(written, (cache.k, cache.v), (new.k, new.v))
    segments = (jnp.arange(cache.segments.shape[1]) < length).astype(jnp.int32)

    def put(whole: Array, part: Array) -> Array:
        return whole.at[row].set(part[0])

    fields = ("logits", "tokens", "positions", "counts", "limits", "stopped", "done")
    placed = state.replace(
        cache=Cache(k, v, cache.segments.at[row].set(segments), cache.column.at[row].set(length)),
        **{field: put(getattr(state, field), getattr(other, field)) for field in fields},
    )
    return placed, jax.tree.map(put, draws, other.draws)
