"""Answers that grow together, a token a step: `prefill` reads prompts, `step` gives every row its next token.

    session = Session(model.config, model.params, stop_ids=model.stops[0])
    state = session.prefill(model.prompt_batch(images, prompts), max_new_tokens=64)
    while not state.done.all():
        state = session.step(state)
        print(state.tokens)          # of every row; whoever is done has none

Rows never see each other and padding is masked, so an answer does not depend on its neighbours, and a row that is done
can be given to another prompt (`insert`). `answer`, which `generate` uses, runs the same steps without coming back to
the host in between. On CPUs it comes back after 64 steps, then after as many as all before: the cache gets columns for
the next ones, and rows that are done leave the batch.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mllm_jax.data.batch import Batch
from mllm_jax.inference.prefill import decode, prefill_limit, read_prompts, without_remat
from mllm_jax.inference.prefixes import PromptBatch
from mllm_jax.inference.sampling import Draws, Sampling, choose, make_draws
from mllm_jax.models import mllm
from mllm_jax.models.attention import current_platform
from mllm_jax.models.decoder import Cache, apart_cache, apart_params
from mllm_jax.models.mllm import ModelConfig, Params
from mllm_jax.parallel.mesh import current_row_shards, replicate

_STEPS = 64  # that `answer` takes at first on CPUs; then as many as all before


@flax.struct.dataclass
class State:
    """Answers that grow, one per row.

    Attributes:
      cache: of everything read so far.
      logits: from which `tokens` were chosen.
      tokens: the newest token of each row; not read yet. A stop id in the step in which a row ends with one, and of no
        meaning afterwards.
      positions: of `tokens`, in their sequences.
      counts: tokens of each answer so far, stop ids not counted.
      limits: most tokens that an answer may have.
      stopped: a stop id came.
      done: the answer is complete: a stop id came, it has as many tokens as it may, or the row never held a prompt.
      draws: how tokens are drawn; None = greedy.

    Examples:
      >>> import mllm_jax
      >>> model = mllm_jax.load("runs/quickstart")
      >>> session = Session(model.config, model.params, stop_ids=model.stops[0])
      >>> state = session.prefill(model.prompt_batch("cat.jpg", "What is this?"), max_new_tokens=4)
      >>> state.tokens.shape == state.done.shape == (len(state.logits),)
      True
    """

    cache: Cache
    logits: Float[Array, "B V"]
    tokens: Int[Array, " B"]
    positions: Int[Array, " B"]
    counts: Int[Array, " B"]
    limits: Int[Array, " B"]
    stopped: Bool[Array, " B"]
    done: Bool[Array, " B"]
    draws: Draws | None


class Session:
    """Reads prompts and lets their answers grow; holds no state of its own.

    Args:
      config, params: the model.
      stop_ids: ids that end an answer.
      prefill_bytes: on every device, for what reading needs besides the cache; None = `prefill.prefill_limit`.

    Examples:
      >>> import mllm_jax
      >>> model = mllm_jax.load("runs/quickstart")
      >>> session = Session(model.config, model.params, stop_ids=model.stops[0])
      >>> prompts = model.prompt_batch(["cat.jpg", None], ["What is this?", "What is a cat?"])
      >>> state = session.prefill(prompts, max_new_tokens=4)
      >>> while not state.done.all():
      ...     state = session.step(state)
      >>> bool((state.counts <= 4).all())
      True
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        stop_ids: Sequence[int],
        prefill_bytes: int | None = None,
    ):
        self.config, self.params = without_remat(config), params
        self.stops = np.asarray(stop_ids, np.int32)
        self.limit = prefill_limit(prefill_bytes)

    def prefill(
        self,
        prompts: PromptBatch,
        *,
        max_new_tokens: int,
        sampling: Sampling | Sequence[Sampling | None] | None = None,
        room: int | None = None,
    ) -> State:
        """Reads prompts and chooses the first token of every answer.

        Args:
          prompts: from `Model.prompt_batch` or `prefixes.answer_in_order`.
          max_new_tokens: most tokens of an answer, 1 or more.
          sampling: how tokens are drawn, for all requests or one by one; None = greedy.
          room: columns of the cache behind the prompts; more than `max_new_tokens` if rows will be inserted later.

        Raises:
          ValueError: `room` does not hold `max_new_tokens`.
        """
        if room is not None and room < max_new_tokens:
            raise ValueError(f"room={room} columns do not hold max_new_tokens={max_new_tokens}")
        return self.read(prompts, max_new_tokens, _draws(prompts, sampling), room or max_new_tokens)

    def read(self, prompts: PromptBatch, max_new_tokens: int, draws: Draws | None, room: int) -> State:
        """As `prefill`, with the rows' draws, and `room` as little as 0: for rows that go into another cache."""
        lengths = prompts.lengths
        limits = np.full(len(lengths), max_new_tokens, np.int32)
        visual, cache = prompts.open_cache(prompts.rows.tokens.shape[1] + room)
        rows = (prompts.rows, lengths, visual, limits, draws)
        return _prefill(self.config, self.limit, cache, self.params, *rows, self.stops)

    def step(self, state: State) -> State:
        """The next token of every row that is not done; `state` is used up."""
        return _step(self.config, state, self.params, self.stops)

    def insert(self, state: State, rows: Sequence[int], other: State) -> State:
        """Gives `rows` of `state` to the answers of `other`; `state` is used up.

        Raises:
          ValueError: `other` has more columns than `state`, the longest answer that is left does not fit behind
            the column where both go on, or only one of them draws tokens.
        """
        if other.cache.segments.shape[1] > state.cache.segments.shape[1]:
            raise ValueError(
                f"the inserted rows have {other.cache.segments.shape[1]} columns, more than the state's "
                f"{state.cache.segments.shape[1]}; prefill the state with more `room`"
            )
        if (state.draws is None) != (other.draws is None):
            raise ValueError(
                "only one of the states draws tokens; give all requests a `Sampling`, greedy ones one of 0"
            )
        inserted = _insert(state, np.asarray(rows, np.int32), other)
        column, missing = jax.device_get(
            (inserted.cache.column, jnp.where(inserted.done, 0, inserted.limits - inserted.counts).max())
        )
        # A write past the last column would overwrite it, and with it what all rows attend to.
        if column + missing > inserted.cache.segments.shape[1]:
            raise ValueError(
                f"{missing} tokens may follow behind column {column}, but the state has "
                f"{inserted.cache.segments.shape[1]} columns; prefill it with more `room`"
            )
        return inserted

    def answer(
        self, prompts: PromptBatch, *, max_new_tokens: int, sampling: Sampling | None = None
    ) -> tuple[Int[np.ndarray, "B N"], Int[np.ndarray, " B"], Bool[np.ndarray, " B"]]:
        """Whole answers.

        Args:
          prompts, max_new_tokens, sampling: as in `prefill`; N is `max_new_tokens`.

        Returns:
          Tokens, how many of them count in each row, and whether a stop id came.
        """
        # An accelerator may have no room for the second cache that growing takes, and compiles for long.
        growing = current_platform() == "cpu"
        state = self.read(
            prompts, max_new_tokens, _draws(prompts, sampling), 0 if growing else max_new_tokens
        )
        rows, made = np.arange(len(state.tokens)), 1  # rows of the results that the state's rows are
        first, counts, stopped, done = (np.array(field) for field in jax.device_get(progress(state)))
        tokens = np.zeros((len(rows), max_new_tokens), np.int32)
        tokens[:, 0] = first
        while not done.all():
            steps = max_new_tokens - made
            if growing:
                steps, kept = min(max(made, _STEPS), steps), np.arange(len(rows))
                # Not at once, which would compile the last, smaller batch of a benchmark for itself.
                if made > 1:
                    kept = np.argsort(done, kind="stable")[: _rows_for(int((~done).sum()), len(rows))]
                rows = rows[kept]
                state = _regrown(state, kept.astype(np.int32), steps)
            found, state = _run(self.config, steps, state, self.params, self.stops)
            tokens[rows, made : made + steps], (_, counts[rows], stopped[rows], done) = jax.device_get(found)
            made += steps
        return tokens, counts, stopped


def _draws(prompts: PromptBatch, sampling: Sampling | Sequence[Sampling | None] | None) -> Draws | None:
    samplings = sampling if isinstance(sampling, Sequence) else [sampling] * len(prompts.requests)
    return make_draws(samplings, [request.id for request in prompts.requests], len(prompts.lengths))


def _rows_for(unfinished: int, size: int) -> int:
    """Rows that a batch of `size` keeps: a power of two and a multiple of the devices that share them, or all."""
    kept = 1 << (unfinished - 1).bit_length()
    return min(size, kept + -kept % current_row_shards())


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _prefill(
    config: ModelConfig,
    limit: int,
    cache: Cache,
    params: Params,
    rows: Batch,
    lengths: Int[Array, " B"],
    visual: Float[Array, "B IM D"] | None,
    limits: Int[Array, " B"],
    draws: Draws | None,
    stops: Int[Array, " n"],
) -> State:
    hidden, positions, cache = read_prompts(config, params, rows, lengths, visual, cache, limit)
    none = jnp.zeros_like(lengths)
    state = State(
        cache=cache,
        logits=mllm.apply(config, params, hidden, method="logits"),
        tokens=none,
        positions=positions,
        counts=none,
        limits=limits,
        stopped=none > 0,
        done=lengths == 0,
        draws=draws,
    )
    return _chosen(state, stops)


def _chosen(state: State, stops: Int[Array, " n"]) -> State:
    """The state with the next tokens chosen from its logits."""
    tokens = choose(state.logits, state.draws, state.counts)
    stopping = (tokens[:, None] == stops).any(-1) & ~state.done
    counts = state.counts + ~(state.done | stopping)
    return state.replace(
        tokens=tokens,
        positions=state.positions + 1,
        counts=counts,
        stopped=state.stopped | stopping,
        done=state.done | stopping | (counts >= state.limits),
    )


def advance(config: ModelConfig, params: Params, state: State, stops: Int[Array, " n"]) -> State:
    """The state with the next token of every row; to be called under `jax.jit`."""
    hidden, cache = decode(config, params, state.tokens, state.positions, state.cache)
    logits = mllm.apply(config, params, hidden, method="logits")
    return _chosen(state.replace(cache=cache, logits=logits), stops)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step(config: ModelConfig, state: State, params: Params, stops: Int[Array, " n"]) -> State:
    return advance(config, params, state, stops)


@jax.jit
def progress(
    state: State,
) -> tuple[Int[Array, " B"], Int[Array, " B"], Bool[Array, " B"], Bool[Array, " B"]]:
    """What the host follows answers by: `tokens`, `counts`, `stopped` and `done`."""
    return replicate((state.tokens, state.counts, state.stopped, state.done))


@functools.partial(jax.jit, static_argnums=2)
def _regrown(state: State, rows: Int[Array, " b"], more: int) -> State:
    """These rows of a state, whose cache is `apart` and has `more` columns."""
    cache = apart_cache(state.cache)
    width = [(0, 0), (0, 0), (0, 0), (0, more), (0, 0)]
    k, v = jax.tree.map(lambda leaf: jnp.pad(leaf[:, rows], width), (cache.k, cache.v))
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    fields["cache"] = None
    kept = jax.tree.map(lambda leaf: leaf[rows], fields)
    kept["cache"] = Cache(k, v, jnp.pad(cache.segments[rows], width[2:4]), cache.column)
    return State(**kept)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _run(
    config: ModelConfig, steps: int, state: State, params: Params, stops: Int[Array, " n"]
) -> tuple[tuple[Int[Array, "B m"], tuple[Array, ...]], State]:
    """The next tokens of every row and `progress`; and the state, for only what is returned is updated in place."""
    if state.cache.apart:
        params = {**params, "llm": apart_params(params["llm"])}
    tokens = jnp.zeros((len(state.tokens), steps), jnp.int32)

    def unfinished(carry: tuple[Array, Array, State]) -> Array:
        return (carry[0] < steps) & ~carry[2].done.all()

    def grow(carry: tuple[Array, Array, State]) -> tuple[Array, Array, State]:
        index, tokens, state = carry
        state = advance(config, params, state, stops)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, state.tokens, index, axis=1)
        return index + 1, tokens, state

    _, tokens, state = jax.lax.while_loop(unfinished, grow, (jnp.int32(0), tokens, state))
    return (replicate(tokens), progress(state)), state


@functools.partial(jax.jit, donate_argnums=0)
def _insert(state: State, rows: Int[Array, " b"], other: State) -> State:
    """The columns of `other` come first in their rows; those behind them, up to the state's column, stay empty."""
    cache, new = state.cache, other.cache
    columns = new.segments.shape[1]
    written = jnp.arange(columns) < new.column

    def put(field: str) -> Any:
        return jax.tree.map(
            lambda mine, theirs: mine.at[rows].set(theirs), getattr(state, field), getattr(other, field)
        )

    fields = ("logits", "tokens", "positions", "counts", "limits", "stopped", "done", "draws")
    return State(
        cache=cache.replace(
            k=cache.k.at[:, rows, :, :columns].set(new.k),
            v=cache.v.at[:, rows, :, :columns].set(new.v),
            segments=cache.segments.at[rows].set(0).at[rows, :columns].set(new.segments * written),
            column=jnp.maximum(cache.column, new.column),
        ),
        **{field: put(field) for field in fields},
    )
