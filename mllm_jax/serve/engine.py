"""Continuous batching for one model: requests join the answers that are being made, and leave when theirs is complete.

No threads and no HTTP: whoever owns the engine calls `submit` and then `work` until it is idle.

    engine = Engine(model, slots=8)
    engine.submit(Job(request, images.__getitem__, max_new_tokens=64))
    while not engine.idle:
        for update in engine.work():
            print(update.text, update.answer)
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import UInt8

from mllm_jax.data.layout import VisualLayout
from mllm_jax.inference.batching import Request
from mllm_jax.inference.generate import Generation
from mllm_jax.inference.model import Model
from mllm_jax.inference.prefix_cache import PrefixCache
from mllm_jax.inference.sampling import Sampling
from mllm_jax.inference.slots import Slots
from mllm_jax.inference.stream import TextStream, answer_text

JOINS = 4  # prompts that are read between two steps, at most: those who have begun wait for them


@dataclasses.dataclass(eq=False)
class Job:
    """One answer that is wanted.

    Attributes:
      request: the prompt. Draws are made from its id and the seed.
      load_image: an image's key and layout -> its slots, without waiting for anything: decoded before.
      max_new_tokens: most tokens of the answer.
      sampling: how tokens are drawn; None = greedy.
      stop_texts: texts that end the answer, besides the template's.
      streamed: pieces of the text are wanted as they come.
      reads_video: the prompt shows videos to a model that was not trained on them (`Model.with_video`).
      notify: for the owner; the engine does not look at it.
      cancelled: set by the owner from any thread; the answer is dropped at the next step.
      submitted: when it was, by `time.monotonic`.
    """

    request: Request
    load_image: Callable[[Hashable, VisualLayout], UInt8[np.ndarray, "n H W 3"]]
    max_new_tokens: int
    sampling: Sampling | None = None
    stop_texts: tuple[str, ...] = ()
    streamed: bool = False
    reads_video: bool = False
    notify: Callable[["Update"], None] | None = None
    cancelled: bool = False
    submitted: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """What has become of a job.

    Attributes:
      job: which one.
      text: the next piece of a streamed answer; "" = none.
      answer: the whole answer, once it is complete; nothing follows it.
      error: why there will be none.
    """

    job: Job
    text: str = ""
    answer: Generation | None = None
    error: Exception | None = None


@dataclasses.dataclass(eq=False)
class _Running:
    job: Job
    tokens: list[int]
    stops: Sequence[str]
    text: TextStream | None


class Engine:
    """Makes answers for one model.

    Args:
      model: with its parameters where they are to be used.
      slots: answers that are made at the same time.
      most_tokens: of a prompt together with its answer; None = the LLM's context.
    """

    def __init__(self, model: Model, *, slots: int, most_tokens: int | None = None):
        self.model = model
        with model.on_mesh():
            self._slots = Slots(
                model.config, model.params, rows=slots, stop_ids=model.stops[0], most_columns=most_tokens
            )
        self.most_tokens = self._slots.most_columns
        self._prefixes = {False: PrefixCache(model.config, model.params)}
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: list[_Running | None] = [None] * slots

    @property
    def idle(self) -> bool:
        """Nothing is wanted."""
        return not self._waiting and not self.running

    @property
    def waiting(self) -> int:
        """Jobs whose prompts have not been read."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that are being made."""
        return sum(one is not None for one in self._running)

    @property
    def prefix_hits(self) -> tuple[int, int]:
        """Prompts whose images had been read for an earlier one, and those whose had not."""
        caches = self._prefixes.values()
        return sum(cache.hits for cache in caches), sum(cache.misses for cache in caches)

    def submit(self, job: Job) -> None:
        """Puts a job behind those that wait.

        Raises:
          ValueError: prompt and answer do not fit the model's context.
        """
        needed = len(job.request.prompt) + job.max_new_tokens
        if needed > self.most_tokens:
            raise ValueError(f"prompt and answer have {needed} tokens, more than {self.most_tokens}")
        self._waiting.append(job)

    def work(self) -> list[Update]:
        """Lets waiting jobs join, then makes the next token of all answers.

        An exception of one job's prompt, and one of a step, are updates of the jobs that they concern.
        """
        updates: list[Update] = []
        self._drop_cancelled()
        try:
            with self.model.on_mesh():
                for _ in range(JOINS):
                    if None not in self._running or not self._waiting:
                        break
                    job = self._waiting.popleft()
                    if not job.cancelled:
                        updates += self._join(job, self._running.index(None))
                if self.running:
                    updates += self._step()
        except Exception as error:  # of any kind: the server goes on without these jobs
            lost = [one.job for one in self._running if one is not None]
            self._running = [None] * len(self._running)
            self._slots.clear()
            failed = RuntimeError("a step failed")  # not the jobs' own fault, whatever it is
            failed.__cause__ = error
            updates += [Update(job, error=failed) for job in lost]
        return updates

    def _drop_cancelled(self) -> None:
        for row, one in enumerate(self._running):
            if one is not None and one.job.cancelled:
                self._leave(row)
        if any(job.cancelled for job in self._waiting):
            self._waiting = collections.deque(job for job in self._waiting if not job.cancelled)

    def _join(self, job: Job, row: int) -> list[Update]:
        try:
            if job.reads_video and True not in self._prefixes:
                self._prefixes[True] = PrefixCache(self.model.with_video().config, self.model.params)
            prompts = self._prefixes[job.reads_video].prompt_batch(job.request, job.load_image)
            token, stopped, done = self._slots.put(
                row, prompts, max_new_tokens=job.max_new_tokens, sampling=job.sampling
            )
        except Exception as error:
            return [Update(job, error=error)]
        stops = self.model.stop_texts(job.stop_texts)
        text = TextStream(self.model.tokenizer, stops) if job.streamed or stops else None
        self._running[row] = _Running(job, [], stops, text)
        return self._grown(row, None if stopped else token, stopped, done)

    def _step(self) -> list[Update]:
        progress = self._slots.step()
        updates = []
        for row, one in enumerate(self._running):
            if one is not None:
                stopped = bool(progress.stopped[row])
                token = None if stopped else int(progress.tokens[row])
                updates += self._grown(row, token, stopped, bool(progress.done[row]))
        return updates

    def _grown(self, row: int, token: int | None, stopped: bool, done: bool) -> list[Update]:
        """A row has one more token, or has come to its end without one."""
        one = self._running[row]
        try:
            piece, answer = self._read(one, token, stopped, done)
        except Exception as error:  # of the tokenizer
            self._leave(row)
            return [Update(one.job, error=error)]
        if answer is not None:
            self._leave(row)
        shown = piece if one.job.streamed else ""
        return [Update(one.job, shown, answer)] if shown or answer is not None else []

    def _read(
        self, one: _Running, token: int | None, stopped: bool, done: bool
    ) -> tuple[str, Generation | None]:
        """The text that became certain; and the answer, if it is complete."""
        piece = ""
        if token is not None:
            one.tokens.append(token)
            if one.text is not None:
                piece = one.text.push(token)
                done = done or one.text.stopped
        if not done:
            return piece, None
        if one.text is not None:
            piece += one.text.finish()
        text, cut = answer_text(self.model.tokenizer, one.tokens, one.stops)
        return piece, Generation(one.job.request.id, tuple(one.tokens), text, stopped or cut)

    def _leave(self, row: int) -> None:
        self._running[row] = None
        self._slots.free(row)
