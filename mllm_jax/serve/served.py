"""The models of a server, and what stands between its event loop and the thread that owns JAX."""

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mllm_jax.inference.model import Model
from mllm_jax.inference.prompts import Prompts
from mllm_jax.inference.sampling import Sampling
from mllm_jax.serve.engine import Engine, Job, Update
from mllm_jax.serve.errors import ApiError
from mllm_jax.serve.messages import Prompt, build_prompt
from mllm_jax.serve.metrics import Metrics
from mllm_jax.serve.schema import ChatRequest, Message
from mllm_jax.serve.settings import Settings
from mllm_jax.serve.worker import Worker

_SMOOTHING = 0.1  # weight of the latest answer in the mean of how long one takes
_CHARACTERS = 64  # of a token: more text is not given to the tokenizer, which would take long to count


@dataclasses.dataclass(frozen=True, eq=False)
class ServedModel:
    """A model under the name by which requests ask for it.

    Attributes:
      model: refuses images that are larger than the server allows.
      engine: touched by the worker's thread alone, but for its counts.
      created: when it was loaded, seconds since 1970.
      fingerprint: of the model, which is not read again: that takes a while.
    """

    name: str
    model: Model
    engine: Engine
    created: int
    fingerprint: str


class Served:
    """Models that answer requests, from `start` to `close`.

    Args:
      models: by their names.
      settings: limits.

    Attributes:
      entered: requests that are in the server.
      metrics: what is counted.
    """

    def __init__(self, models: Mapping[str, Model], settings: Settings):
        self.settings, self.metrics = settings, Metrics()
        self.models = {name: self._served(name, model) for name, model in models.items()}
        self._worker = Worker([each.engine for each in self.models.values()], self._deliver)
        self._threads = ThreadPoolExecutor(settings.threads, "mllm-jax prompt")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._mean_seconds = 1.0
        self.entered = 0

    def _served(self, name: str, model: Model) -> ServedModel:
        pixels = min(model.max_image_pixels, self.settings.most_image_pixels)
        model = dataclasses.replace(model, max_image_pixels=pixels)
        engine = Engine(model, slots=self.settings.slots, most_tokens=self.settings.most_tokens)
        watch = self.metrics.watch
        watch("mllm_jax_running", "Answers that are being made", lambda: engine.running, name)
        watch("mllm_jax_waiting", "Prompts that wait for a slot", lambda: engine.waiting, name)
        watch(
            "mllm_jax_prefix_hits",
            "Prompts whose images were read before",
            lambda: engine.prefix_hits[0],
            name,
        )
        watch("mllm_jax_prefix_misses", "Prompts whose images were not", lambda: engine.prefix_hits[1], name)
        return ServedModel(name, model, engine, int(time.time()), model.fingerprint)

    def warm(self) -> None:
        """Answers a request with every model, so that the first client need not wait for programs to be compiled."""
        for served in self.models.values():
            prompts = Prompts(served.model, served.model.blind_image(), "What is this?")
            request = prompts.request(0)
            for sampling in (None, Sampling()):
                served.engine.submit(Job(request, prompts.load_image, 3, sampling))
                while not served.engine.idle:
                    for update in served.engine.work():
                        if update.error is not None:
                            raise update.error

    async def start(self) -> None:
        """Begins to answer; to be called in the event loop that will await answers."""
        self._loop = asyncio.get_running_loop()
        self._worker.start()

    async def close(self) -> None:
        """Ends the threads; what has not been answered is not."""
        await asyncio.to_thread(self._worker.close)
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether the thread that answers runs."""
        return self._worker.alive

    # ----------------------------------------------------------------------------------------------- requests

    @property
    def capacity(self) -> int:
        """Requests that may be in the server at once."""
        return self.settings.slots * len(self.models) + self.settings.queue

    def check_room(self) -> None:
        """Raises ApiError (429) if as many requests as may be are here."""
        if self.entered < self.capacity:
            return
        rounds = self.entered / (self.settings.slots * len(self.models))
        seconds = min(60, max(1, math.ceil(self._mean_seconds * rounds / 2)))
        raise ApiError(
            429,
            f"{self.entered} requests are being answered or wait; try again in {seconds} s",
            code="overloaded",
            headers={"Retry-After": str(seconds)},
        )

    def model(self, name: str) -> ServedModel:
        """The model of that name.

        Raises:
          ApiError: 404; there is none.
        """
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(
                404, f"there is no model {name!r}; there are: {known}", param="model", code="model_not_found"
            )
        return self.models[name]

    async def prompt(self, served: ServedModel, messages: list[Message], *, answered: bool = False) -> Prompt:
        """The prompt of a conversation, built in a thread; see `messages.build_prompt`."""

        most = served.engine.most_tokens
        if (characters := sum(message.characters for message in messages)) > _CHARACTERS * most:
            raise ApiError(
                400,
                f"the messages have {characters:,} characters; prompt and answer may have {most} tokens",
                param="messages",
                code="context_length_exceeded",
            )

        def build() -> Prompt:
            most = self.settings.most_images
            return build_prompt(
                served.model, messages, self.settings.media, most_images=most, answered=answered
            )

        return await self.in_thread(build)

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function returns, run beside the event loop and the worker."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def on_worker(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function returns that uses a model, run in the thread that owns JAX.

        Raises:
          ApiError: 504; it takes longer than an answer may.
        """
        seconds = self.settings.request_seconds
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.wrap_future(self._worker.call(function, *args))
        except TimeoutError:
            raise ApiError(504, f"there was no answer within {seconds:g} s", code="timeout") from None

    def job(self, served: ServedModel, prompt: Prompt, asked: ChatRequest, seed: int) -> Job:
        """The answer that a request asks for.

        Raises:
          ApiError: 400; it does not fit the model's context, or the limit of prompts.
        """
        length, most = len(prompt.request.prompt), served.engine.most_tokens
        allowed = min(most - 1, self.settings.most_prompt_tokens or most)
        if length > allowed:
            raise ApiError(
                400,
                f"the prompt has {length} tokens, visual tokens included; at most {allowed} are allowed",
                param="messages",
                code="context_length_exceeded",
            )
        wanted = asked.wanted_tokens or min(self.settings.answer_tokens, most - length)
        if length + wanted > most:
            raise ApiError(
                400,
                f"the prompt has {length} tokens, visual tokens included, and {wanted} more are asked for; together "
                f"they may be {most}",
                param="max_completion_tokens" if asked.max_completion_tokens else "max_tokens",
                code="context_length_exceeded",
            )
        temperature = self.settings.temperature if asked.temperature is None else asked.temperature
        top_p = 1.0 if asked.top_p is None else asked.top_p
        return Job(
            prompt.request,
            prompt.load_image,
            wanted,
            Sampling(temperature, top_p, seed) if temperature > 0 else None,
            asked.stop_texts,
            streamed=bool(asked.stream),
            reads_video=prompt.reads_video and served.model.config.video is None,
        )

    def submit(self, served: ServedModel, job: Job, notify: Callable[[Update], None]) -> None:
        """Has a job done; `notify` is called in the event loop."""
        job.notify = notify
        self._worker.submit(served.engine, job)

    def cancel(self, job: Job) -> None:
        """Drops a job, and gives its slot to another."""
        job.cancelled = True
        self._worker.wake()

    def took(self, seconds: float) -> None:
        """Notes how long an answer has taken."""
        self._mean_seconds += _SMOOTHING * (seconds - self._mean_seconds)

    def _deliver(self, updates: list[Update]) -> None:
        try:
            self._loop.call_soon_threadsafe(_notify, updates)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return


def _notify(updates: list[Update]) -> None:
    for update in updates:
        if not update.job.cancelled:
            update.job.notify(update)
