"""Answers what a harness asks: requests in its own form, with documents that are looked at one by one.

lmms-eval's requests are tuples (its version 0.7): a *simple* model is asked `(context, settings, doc_to_visual, doc_id,
task, split)`, a *chat* model `(context, doc_to_messages, settings, doc_id, task, split)`, likelihoods are asked for by
`(context, continuation, doc_to_visual, doc_id, task, split)`. Nothing here imports it.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from mllm_jax.console import complain, make_console, progress_bar
from mllm_jax.data.conversations import VIDEO
from mllm_jax.data.layout import VisualLayout, layouts
from mllm_jax.data.tokens import SampleTooLong
from mllm_jax.harness.questions import Conversation, Media, from_context, from_messages
from mllm_jax.inference.batching import Request
from mllm_jax.inference.generate import generate
from mllm_jax.inference.likelihood import answer_likelihoods
from mllm_jax.inference.model import Model
from mllm_jax.inference.prompts import encode_conversation
from mllm_jax.inference.sampling import Sampling

Doc = Mapping[str, Any]
Documents = Mapping[str, Mapping[str, Sequence[Doc]]]  # task -> split -> documents

READ_SETTINGS = ("until", "max_new_tokens", "do_sample", "temperature", "top_p", "num_beams")
DEFAULT_STOP = "\n\n"  # between few-shot examples; a harness puts it into every task that names no stop text


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an answer is generated: at most `max_new_tokens`, greedily unless `temperature` is above 0."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """A generated answer, and how many tokens were read and made for it."""

    text: str
    input_tokens: int
    output_tokens: int


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """One thing to be asked.

    Attributes:
      name: for messages, and from which random draws are made.
      about: equal where the images are the same.
      conversation: makes what the model is shown; not before it is its turn, because images take memory.
      settings: of an answer.
      answer: whose likelihood is asked for.
    """

    name: str
    about: Hashable
    conversation: Callable[[], Conversation]
    settings: Settings | None = None
    answer: Callable[[], str] | None = None


@dataclasses.dataclass(frozen=True)
class _Pass:
    """Questions that one program answers: with videos or without, and answers of this length (likelihoods: 0)."""

    settings: Settings
    videos: bool


class Adapter:
    """A model as a harness asks it.

    Args:
      model: the model.
      chat: whether it is asked as a chat model, by messages.
      batch_size: prompts at once.
      max_new_tokens: in place of what tasks say; None = theirs (128 where they say nothing).
      overlong: a prompt that fills the LLM's context: "error", or "empty", an empty answer.
      seed: of draws.
      video: how videos are read; see `Model.with_video`.
    """

    def __init__(
        self,
        model: Model,
        *,
        chat: bool,
        batch_size: int = 16,
        max_new_tokens: int | None = None,
        overlong: str = "error",
        seed: int = 0,
        video: Mapping[str, Any] | None = None,
    ):
        if overlong not in ("error", "empty"):
            raise ValueError(f"overlong={overlong!r} must be 'error' or 'empty'")
        self.model, self.chat, self.batch_size, self.seed = model, chat, batch_size, seed
        self._max_new_tokens, self._overlong = max_new_tokens, overlong
        self._video = dict(video or {})
        self._watching: Model | None = model.with_video(**self._video) if self._video else None
        self._told: set[str] = set()

    # --------------------------------------------------------------------------------------- a harness's requests

    def generate_until(self, requests: Sequence[Any], documents: Documents) -> list[Answer]:
        """Answers, in the order of the requests.

        Args:
          requests: with the attribute `args`, as the module says.
          documents: what `task`, `split` and `doc_id` of a request name.

        Raises:
          ImageError, FileNotFoundError, SampleError: an image or video that cannot be used.
          SampleTooLong: a prompt fills the LLM's context (`overlong="error"`).
          ValueError: settings that this model does not have (beams).
        """
        questions, seen = [], collections.Counter()
        for request in requests:
            context, second, third, doc_id, task, split = request.args
            doc, name = documents[task][split], f"{task}/{split}/{doc_id}"
            seen[name] += 1
            if seen[name] > 1:  # a harness repeats a request for answers that are drawn anew
                name += f"#{seen[name]}"
            shown, given = (second, third) if self.chat else (third, second)
            show = self._first(shown, context, doc, doc_id, name)
            questions.append(Question(name, (task, split, doc_id), show, self._settings(given, task)))
        return self._answers(questions)

    def generate_until_multi_round(self, requests: Sequence[Any], documents: Documents) -> list[list[str]]:
        """Answers in rounds, each asked by the task when it has seen the earlier ones; all documents go together.

        A chat request's `doc_to_messages` is called with `round_idx`, `previous_output`, `previous_round_info` and
        returns messages, whether that was all, the answers so far, and what the next call is told; simple requests have
        a `doc_to_text` in their fourth place, which returns images and text in place of messages.

        Returns:
          Of each request what the task says at its end are its answers; else the answer of each round.
        """
        conversations = [self._rounds(request, documents) for request in requests]
        upcoming = [next(rounds) for rounds in conversations]
        while live := [index for index, question in enumerate(upcoming) if isinstance(question, Question)]:
            for index, answer in zip(live, self._answers([upcoming[i] for i in live]), strict=True):
                upcoming[index] = conversations[index].send(answer.text)
        return upcoming

    def loglikelihood(self, requests: Sequence[Any], documents: Documents) -> list[tuple[float, bool]]:
        """How likely continuations are, and whether greedy decoding gives them, what closes an answer included.

        Of a task of multiple choice the number is minus the log-likelihood, because lmms-eval takes the choice with the
        smallest one; of a task of likelihoods, whose continuation is a function of the document, it is the
        log-likelihood, which its `perplexity` is computed from.

        Raises: as `generate_until`; also
          ValueError: likelihoods without a context (the metric `acc_mutual_info`), which lmms-eval mixes up.
        """
        questions, signs = [], []
        for number, request in enumerate(requests):
            if len(request.args) != 6:
                raise ValueError(
                    "a likelihood without a context, for the metric acc_mutual_info: lmms-eval 0.7 takes the wrong one "
                    "of the two sums for each choice; remove the metric from the task"
                )
            context, continuation, doc_to_visual, doc_id, task, split = request.args
            docs, name = documents[task][split], f"{task}/{split}/{doc_id}, answer {number}"
            show = self._first(doc_to_visual, context, docs, doc_id, name, chat=False)
            signs.append(1.0 if callable(continuation) else -1.0)
            questions.append(
                Question(name, (task, split, doc_id), show, answer=_text(continuation, docs, doc_id))
            )
        found = self._likelihoods(questions)
        return [(sign * value, greedy) for sign, (value, greedy) in zip(signs, found, strict=True)]

    def _first(
        self,
        shown: Callable[..., Any] | None,
        context: str,
        docs: Sequence[Doc],
        doc_id: int,
        name: str,
        chat: bool | None = None,
    ) -> Callable[[], Conversation]:
        """What is shown at first, by `doc_to_messages` of a chat request or `doc_to_visual` of another."""
        if self.chat if chat is None else chat:
            return lambda: from_messages(shown(docs[doc_id]), sample=name)
        return lambda: from_context(context, shown(docs[doc_id]) if callable(shown) else None, sample=name)

    def _rounds(self, request: Any, documents: Documents) -> Iterator[Any]:
        """Yields questions and is sent their answers; in the end yields the answers."""
        if self.chat:
            context, shown, given, doc_id, task, split = request.args
            ask = shown
        else:
            context, given, shown, ask, doc_id, task, split = request.args
        docs, settings = documents[task][split], self._settings(given, task)
        outputs: list[str] = []
        told: Any = None
        name = f"{task}/{split}/{doc_id}"
        show = self._first(shown, context, docs, doc_id, name)
        while True:
            about = (task, split, doc_id, len(outputs))
            outputs.append((yield Question(f"{name}, round {len(outputs) + 1}", about, show, settings)))
            payload = ask(
                docs[doc_id],
                round_idx=len(outputs),
                previous_output=list(outputs),
                previous_round_info=told,
            )
            if not isinstance(payload, tuple):
                break
            *question, over, before, told = payload
            if isinstance(before, list | tuple):
                outputs = list(before)
            if over:
                break
            show = self._next(question, name)
        yield outputs

    def _next(self, question: Sequence[Any], name: str) -> Callable[[], Conversation]:
        if self.chat:
            return lambda: from_messages(question[0], sample=name)
        return lambda: from_context(question[1], question[0], sample=name)

    def _settings(self, given: Mapping[str, Any], task: str) -> Settings:
        """A task's settings.

        Raises:
          ValueError: beams.
        """
        if unread := sorted(
            key for key, value in given.items() if key not in READ_SETTINGS and value is not None
        ):
            self._tell(f"{task}: generation settings without a meaning here: {', '.join(unread)}")
        if (beams := given.get("num_beams") or 1) != 1:
            raise ValueError(
                f"{task}: num_beams={beams}; this model answers without beams: --gen_kwargs num_beams=1"
            )
        until = given.get("until") or ()
        until = (until,) if isinstance(until, str) else until
        temperature = float(given.get("temperature") or 0)
        drawn = temperature > 0 and given.get("do_sample", True)
        return Settings(
            self._max_new_tokens or int(given.get("max_new_tokens") or 128),
            temperature if drawn else 0.0,
            float(given.get("top_p") or 1) if drawn else 1.0,
            tuple(text for text in until if text and text != DEFAULT_STOP),
        )

    def _tell(self, message: str) -> None:
        if message not in self._told:
            complain(message)
            self._told.add(message)

    # --------------------------------------------------------------------------------------------------- answering

    def _answers(self, questions: Sequence[Question]) -> list[Answer]:
        def asked(todo: _Pass, requests: Iterator[Request], load: Any, model: Model) -> Iterator[Answer]:
            settings = todo.settings
            sampling = Sampling(settings.temperature, settings.top_p, self.seed)
            lengths: collections.deque[int] = collections.deque()

            def counted() -> Iterator[Request]:
                for request in requests:
                    lengths.append(len(request.prompt))
                    yield request

            found = generate(
                model.config,
                model.params,
                counted(),
                model.tokenizer,
                load_image=load,
                max_new_tokens=settings.max_new_tokens,
                batch_size=min(self.batch_size, len(questions)),
                stop_ids=model.stops[0],
                stop_text=model.stop_texts(settings.stop),
                sampling=sampling if settings.temperature else None,
            )
            for one in found:
                yield Answer(one.text, lengths.popleft(), len(one.tokens))

        return self._in_passes(questions, asked, lambda: Answer("", 0, 0))

    def _likelihoods(self, questions: Sequence[Question]) -> list[tuple[float, bool]]:
        def asked(
            todo: _Pass, requests: Iterator[Request], load: Any, model: Model
        ) -> Iterator[tuple[float, bool]]:
            size = min(self.batch_size, len(questions))
            return answer_likelihoods(model.config, model.params, requests, load_image=load, batch_size=size)

        return self._in_passes(questions, asked, lambda: (-np.inf, False))

    def _in_passes(
        self, questions: Sequence[Question], asked: Callable[..., Iterator[Any]], empty: Callable[[], Any]
    ) -> list[Any]:
        """Answers questions in their order, those together that one program answers.

        Whether a question has videos, and how much room is left for its answer, is known when it has been looked at:
        what does not fit the pass it was first put into waits for one of its own.
        """
        results: list[Any] = [None] * len(questions)
        waiting: dict[_Pass, list[int]] = {}
        for index, question in enumerate(questions):
            waiting.setdefault(_Pass(question.settings or Settings(0), False), []).append(index)
        with self.model.on_mesh(), progress_bar(make_console()) as progress:
            task = progress.add_task("answers", total=len(questions))
            while waiting:
                todo = next(iter(waiting))
                indices, taken = waiting.pop(todo), collections.deque()
                kept = _Kept()
                model = self._reader(todo.videos)

                def requests(todo=todo, indices=indices, taken=taken, kept=kept) -> Iterator[Request]:
                    for index in indices:
                        request, media, fit = self._request(questions[index], todo)
                        if fit != todo:
                            if fit is None:
                                results[index] = empty()
                                progress.advance(task)
                            else:
                                waiting.setdefault(fit, []).append(index)
                            continue
                        kept.put(questions[index].about, media)
                        taken.append(index)
                        yield request

                for result in asked(todo, requests(), kept.load, model):
                    index = taken.popleft()
                    results[index] = result
                    kept.drop(questions[index].about)
                    progress.advance(task)
        return results

    def _request(self, question: Question, todo: _Pass) -> tuple[Request | None, Media | None, _Pass | None]:
        """The request of a question, and the pass that it belongs to; None = the prompt fills the context."""
        conversation = question.conversation()
        if videos := any(each.kind == VIDEO for each in conversation.media):
            todo = dataclasses.replace(todo, videos=videos)
        model = self._reader(todo.videos)
        media = Media(model, conversation.media, question.name)
        found = layouts(model.config.visual_layout, media.shown(), sample=question.name)
        answer = None if question.answer is None else question.answer()
        prompt = encode_conversation(model, conversation.turns, found, answer, sample=question.name)
        context, wanted = model.config.llm.max_positions, todo.settings.max_new_tokens
        if (room := context - len(prompt)) < min(wanted, 1):
            if self._overlong == "empty":
                return None, None, None
            raise SampleTooLong(question.name, len(prompt) + min(wanted, 1), context)
        if room < wanted:  # powers of two, so that there are few programs
            shorter = dataclasses.replace(todo.settings, max_new_tokens=1 << (room.bit_length() - 1))
            todo = dataclasses.replace(todo, settings=shorter)
        keys = tuple((question.about, index) for index in range(len(conversation.media)))
        return Request(question.name, prompt, keys), media, todo

    def _reader(self, videos: bool) -> Model:
        """The model, as it reads images or videos."""
        if not videos:
            return self.model
        if self._watching is None:
            self._watching = self.model if self.model.config.video is not None else self.model.with_video()
        return self._watching


def _text(continuation: Any, docs: Sequence[Doc], doc_id: int) -> Callable[[], str]:
    """The answer whose likelihood is asked for, without the space that a harness puts before it."""
    return lambda: str(continuation(docs[doc_id]) if callable(continuation) else continuation).strip()


class _Kept:
    """The media of questions that are being answered, by what they are about; let go when the last one is done."""

    def __init__(self):
        self._media: dict[Hashable, Media] = {}
        self._users: collections.Counter[Hashable] = collections.Counter()
        self._lock = threading.Lock()  # requests are made in another thread than answers are taken

    def put(self, about: Hashable, media: Media) -> None:
        with self._lock:
            self._media.setdefault(about, media)
            self._users[about] += 1

    def drop(self, about: Hashable) -> None:
        with self._lock:
            self._users[about] -= 1
            if not self._users[about]:
                del self._media[about], self._users[about]

    def load(self, key: tuple[Hashable, int], layout: VisualLayout) -> UInt8[np.ndarray, "n H W 3"]:
        about, index = key
        with self._lock:
            media = self._media[about]
        return media.load(index, layout)
