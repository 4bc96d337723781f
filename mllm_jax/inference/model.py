"""A model that can be asked: parameters and what turns images and words into input."""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float32, Float64, UInt8

from mllm_jax.data.batch import Size
from mllm_jax.data.chat_template import resolve_template
from mllm_jax.data.images import MAX_PIXELS, image_size, open_rgb
from mllm_jax.data.layout import VisualLayout
from mllm_jax.data.naflex import Processor
from mllm_jax.data.span_tokenizer import span_tokenizer
from mllm_jax.data.tiles import frame_slots, slot_images
from mllm_jax.data.tokens import stop_ids
from mllm_jax.data.video import OpenVideo, pick
from mllm_jax.data.video_layout import Video
from mllm_jax.inference.attention_maps import AttentionMaps, attention_maps
from mllm_jax.inference.generate import generate
from mllm_jax.inference.likelihood import answer_log_likelihoods
from mllm_jax.inference.prefixes import PromptBatch, batch_prompts
from mllm_jax.inference.prompts import Prompts
from mllm_jax.inference.sampling import Sampling
from mllm_jax.inference.states import HiddenStates, hidden_states, sequence_logits
from mllm_jax.inference.stream import TextStream, stream_tokens
from mllm_jax.models.mllm import ModelConfig, Params
from mllm_jax.parallel.mesh import ANSWERING_RULES, use_mesh

_SAMPLED = 1 << 16  # elements of each parameter that enter the fingerprint


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model that can be asked.

    Images are paths, bytes of files, PIL images or arrays uint8[h, w, 3], of any size; a list of them where a prompt
    has several, and None where it has none. An image stands where the prompt says `<image>`, or else in front of it.
    Videos are paths of files or of folders of frames, arrays uint8[n, h, w, 3] or lists of images; a video stands where
    the prompt says `<video>`. Any model that reads images reads videos, as their frames (`with_video`).

    Attributes:
      config: the computation.
      params: its parameters, placed wherever they are to be used.
      tokenizer: a Hugging Face tokenizer.
      processor: brings images to the model's size.
      template: name of the conversation template the model was trained with.
      compat: None or "llava": how unusual image files are decoded (see `data.images`).
      max_image_pixels: larger images are refused.
      mesh: the mesh that the parameters are on; None = the current one, or one device.

    Raises:
      ValueError: processor or tokenizer do not fit the configuration.

    Examples:
      >>> import mllm_jax
      >>> model = mllm_jax.load("runs/quickstart")
      >>> sorted(model.params), model.config.visual_layout.most_tokens > 0
      (['connector', 'llm', 'vision'], True)
    """

    config: ModelConfig
    params: Params
    tokenizer: Any
    processor: Processor
    template: str
    compat: Literal["llava"] | None = None
    max_image_pixels: int = MAX_PIXELS
    mesh: Mesh | None = None

    def __post_init__(self):
        if self.processor.shape != self.config.slot_size:
            raise ValueError(
                f"the image processor makes images of {' x '.join(map(str, self.processor.shape))} px, an image slot "
                f"of the model holds {' x '.join(map(str, self.config.slot_size))}"
            )
        ours = np.asarray((self.processor.mean, self.processor.std))
        towers = np.asarray((self.config.vision.mean, self.config.vision.std))
        if not np.allclose(ours, towers, atol=1e-6):
            raise ValueError(
                f"the image processor's mean and std {ours.tolist()} are not the vision tower's "
                f"{towers.tolist()}"
            )
        # transformers' LLaVA layout adds this token to mark places of images; no text of ours becomes it.
        extra = self.tokenizer.get_added_vocab().get("<image>", -1) == self.config.llm.vocab
        if len(self.tokenizer) - extra > self.config.llm.vocab:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} tokens, more than the LLM's vocabulary of "
                f"{self.config.llm.vocab}"
            )

    # ------------------------------------------------------------------------------------------------- asking

    def generate(
        self,
        images: Any = None,
        prompt: str | Sequence[str] | None = None,
        *,
        video: Any = None,
        history: Sequence[tuple[str, str]] = (),
        system: str | None = None,
        max_new_tokens: int = 128,
        temperature: float | int = 0.0,
        top_p: float | int = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        batch_size: int = 16,
    ) -> str | list[str]:
        """The model's answer; of a list of prompts the list of answers.

        Examples:
          >>> import mllm_jax
          >>> model = mllm_jax.load("runs/quickstart")
          >>> answer = model.generate("cat.jpg", "What is this?", max_new_tokens=4)
          >>> answer = model.generate(["cat.jpg", "dog.jpg"], "Is <image> larger than <image>?", max_new_tokens=4)
          >>> answer = model.generate(video="clip.mp4", prompt="What happens?", max_new_tokens=4)
          >>> history = [("What is this?", "A cat.")]
          >>> answer = model.generate("cat.jpg", "What colour is it?", history=history, max_new_tokens=4)
          >>> questions = ["What is this?", "What is a cat?"]
          >>> drawn = model.generate(["cat.jpg", None], questions, temperature=0.7, seed=1, max_new_tokens=4)
          >>> len(drawn)
          2

        Args:
          images: of the prompt, or for a list of prompts a list with those of each (one image alone serves all).
          prompt: one, or a list.
          video: of the prompt, or for a list of prompts a list with those of each (one video alone serves all).
          history: of one prompt: earlier questions of the conversation with their answers. Images and videos then
            belong to its first question.
          system: a system text in place of the template's own.
          max_new_tokens: at most so many tokens per answer.
          temperature: 0 = the likeliest token at every place; above it tokens are drawn, more freely the higher it is.
          top_p: draw from the most probable tokens only that have this probability together.
          seed: of the draws. The answer to the n-th prompt depends on seed and n, not on batch size or devices.
          stop: texts that end an answer, besides those of the template.
          batch_size: prompts that are answered at once.

        Raises:
          ImageError, FileNotFoundError, TypeError: an image or video that cannot be used.
          ModuleNotFoundError: a video file, and PyAV is not installed.
          SampleTooLong: prompt and answer do not fit the LLM's context.
          SampleError: `<image>` stands more or less often in a prompt than it has images; likewise `<video>`; or the
            template has no place for a history or a system text.
          ValueError: a setting out of range, or a history of several prompts.
        """
        prompts = self._prompts(images, prompt, video, history, system)
        with self.on_mesh():
            found = generate(
                prompts.model.config,
                self.params,
                [prompts.request(index) for index in range(len(prompts.texts))],
                self.tokenizer,
                load_image=prompts.load_image,
                max_new_tokens=max_new_tokens,
                batch_size=min(batch_size, max(1, len(prompts.texts))),
                stop_ids=self.stops[0],
                stop_text=self.stop_texts(stop),
                sampling=Sampling(temperature, top_p, seed),
            )
            answers = [generation.text for generation in found]
        return answers[0] if prompts.single else answers

    def stream(
        self,
        images: Any = None,
        prompt: str | None = None,
        *,
        video: Any = None,
        history: Sequence[tuple[str, str]] = (),
        system: str | None = None,
        max_new_tokens: int = 128,
        temperature: float | int = 0.0,
        top_p: float | int = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """The answer to one prompt in pieces of text, as its tokens come; joined they are what `generate` gives.

        What is asked for is computed when the next piece is; whoever stops asking stops the answer.

        Examples:
          >>> import mllm_jax
          >>> model = mllm_jax.load("runs/quickstart")
          >>> pieces = list(model.stream("cat.jpg", "What is this?", max_new_tokens=4))
          >>> "".join(pieces) == model.generate("cat.jpg", "What is this?", max_new_tokens=4)
          True

        Args, Raises: as in `generate`, for one prompt.
        """
        if not isinstance(prompt, str):
            raise TypeError("`stream` answers one prompt; give a list of them to `generate`")
        prompts = self._prompts(images, prompt, video, history, system)
        tokens = stream_tokens(
            prompts.model.config,
            self.params,
            prompts.request(0),
            load_image=prompts.load_image,
            max_new_tokens=max_new_tokens,
            stop_ids=self.stops[0],
            sampling=Sampling(temperature, top_p, seed),
        )
        return self._pieces(tokens, TextStream(self.tokenizer, self.stop_texts(stop)))

    def _pieces(self, tokens: Iterator[int], text: TextStream) -> Iterator[str]:
        while not text.stopped:
            with self.on_mesh():  # not while somebody else's code runs between two pieces
                token = next(tokens, None)
            if token is None:
                break
            if piece := text.push(token):
                yield piece
        if piece := text.finish():
            yield piece

    def likelihood(
        self,
        images: Any = None,
        prompt: str | Sequence[str] | None = None,
        answers: Sequence[str] | Sequence[Sequence[str]] = (),
        *,
        video: Any = None,
        batch_size: int = 16,
    ) -> Float64[np.ndarray, " A"] | list[Float64[np.ndarray, " A"]]:
        """log p(answer | images, prompt) of each answer, in nats, what closes an answer in the template included.

        Examples:
          >>> import mllm_jax
          >>> model = mllm_jax.load("runs/quickstart")
          >>> model.likelihood("cat.jpg", "What is this?", ["A cat.", "A dog."]).shape
          (2,)

        Args:
          images, prompt, video: as in `generate`.
          answers: of the prompt; for a list of prompts, a list with those of each.
          batch_size: answers at once.

        Raises:
          ImageError, FileNotFoundError, TypeError, SampleTooLong, SampleError: as in `generate`.
          ValueError: no lists of answers for as many prompts.
        """
        prompts = self._prompts(images, prompt, video)
        wanted = [answers] if prompts.single else list(answers)
        if len(wanted) != len(prompts.texts) or any(isinstance(own, str) for own in wanted):
            raise ValueError("`answers` is a list of answers; for a list of prompts, a list of such lists")
        requests = [prompts.request(i, answer) for i, own in enumerate(wanted) for answer in own]
        with self.on_mesh():
            found = answer_log_likelihoods(
                prompts.model.config,
                self.params,
                requests,
                load_image=prompts.load_image,
                batch_size=min(batch_size, max(1, len(requests))),
            )
            scores = np.asarray(list(found), np.float64)
        split = np.split(scores, np.cumsum([len(own) for own in wanted])[:-1])
        return split[0] if prompts.single else split

    def logits(
        self, images: Any = None, prompt: str | None = None, answer: str | None = None, *, video: Any = None
    ) -> Float32[np.ndarray, "T V"]:
        """Logits of the token after each position of the prompt: template, visual tokens and words.

        Args:
          images, video: of the prompt.
          prompt: one.
          answer: appended to the prompt if given, as in training.

        Raises:
          ImageError, FileNotFoundError, TypeError, SampleError: as in `generate`.

        Examples:
          >>> import mllm_jax
          >>> model = mllm_jax.load("runs/quickstart")
          >>> model.logits("cat.jpg", "What is this?").shape[1] == model.config.llm.vocab
          True
        """
        prompts = self._prompts(images, prompt, video)
        config, request = prompts.model.config, prompts.request(0, answer)
        with self.on_mesh():
            return sequence_logits(config, self.params, request, prompts.load_image)

    def hidden_states(
        self, images: Any = None, prompt: str | None = None, answer: str | None = None, *, video: Any = None
    ) -> HiddenStates:
        """Every layer's states of vision encoder and LLM, and the visual tokens; see `states.HiddenStates`.

        Examples:
          >>> import mllm_jax
          >>> model = mllm_jax.load("runs/quickstart")
          >>> states = model.hidden_states("cat.jpg", "What is this?")
          >>> images, layers, patches, channels = states.encoder.shape
          >>> at_image = states.llm[-1][states.image_of == 0]  # the last block's states at the image's tokens
          >>> at_image.shape == states.visual[0].shape
          True

        Args, Raises: as in `logits`.
        """
        prompts = self._prompts(images, prompt, video)
        config, request = prompts.model.config, prompts.request(0, answer)
        with self.on_mesh():
            return hidden_states(config, self.params, request, prompts.load_image)

    def attention_maps(
        self,
        images: Any,
        prompt: str,
        answer: str,
        *,
        video: Any = None,
        history: Sequence[tuple[str, str]] = (),
        system: str | None = None,
    ) -> AttentionMaps:
        """Which visual tokens an answer attended to, and where in the image they are.

        Examples:
          >>> import mllm_jax
          >>> model = mllm_jax.load("runs/quickstart")
          >>> maps = model.attention_maps("cat.jpg", "What is this?", "A cat.")
          >>> blocks, tokens, visual_tokens = maps.weights.shape
          >>> (heat,) = maps.on_views(maps.weights.mean(axis=(0, 1)))  # on a grid over maps.views[0].pixels

        Args:
          answer: such as `generate` gave.
          images, prompt, video, history, system: as in `generate`, for one prompt.

        Raises:
          ImageError, FileNotFoundError, TypeError, SampleError: as in `generate`.
          ValueError: the answer has no text.
        """
        prompts = self._prompts(images, prompt, video, history, system)
        with self.on_mesh():
            return attention_maps(prompts.model, prompts.request(0, answer), prompts.load_image)

    def prompt_batch(
        self, images: Any = None, prompt: str | Sequence[str] | None = None, *, video: Any = None
    ) -> PromptBatch:
        """Prompts as one batch that a `session.Session` reads; images, prompts and videos as in `generate`.

        Raises:
          ImageError, FileNotFoundError, TypeError, SampleTooLong, SampleError: as in `generate`.

        Examples:
          >>> import mllm_jax
          >>> model = mllm_jax.load("runs/quickstart")
          >>> len(model.prompt_batch(["cat.jpg", None], ["What is this?", "What is a cat?"]).requests)
          2
        """
        prompts = self._prompts(images, prompt, video)
        requests = [prompts.request(index) for index in range(len(prompts.texts))]
        with self.on_mesh():
            return batch_prompts(prompts.model.config, self.params, requests, load_image=prompts.load_image)

    def with_video(self, **settings: Any) -> "Model":
        """The same model that reads videos in this way, and shares its parameters.

        Examples:
          >>> import mllm_jax
          >>> freeva = mllm_jax.load("runs/quickstart").with_video(frames=4, pool="none")
          >>> isinstance(freeva.generate(video="clip.mp4", prompt="What happens?", max_new_tokens=4), str)
          True

        Args:
          settings: fields of `data.video_layout.Video`; those that are not given are as the model reads videos now, or
            as in Dense Connector where it reads none.

        Raises:
          ValueError: settings that cannot be, also because of the model's connector or tiles, or a newline that the
            model has not learned.
        """
        video = dataclasses.replace(self.config.video or Video(), **settings)
        config = dataclasses.replace(self.config, video=video)
        if config.visual_layout.separated and "separators" not in self.params:
            raise ValueError(
                f"video.newline={video.newline!r} needs a learned newline, which this model does not have; choose "
                "'no_token'"
            )
        return dataclasses.replace(self, config=config)

    def _prompts(
        self,
        images: Any,
        prompt: str | Sequence[str] | None,
        video: Any,
        history: Sequence[tuple[str, str]] = (),
        system: str | None = None,
    ) -> Prompts:
        if prompt is None:
            raise TypeError("no prompt was given")
        reads = video is None or self.config.video is not None
        return Prompts(self if reads else self.with_video(), images, prompt, video, history, system)

    @contextlib.contextmanager
    def on_mesh(self) -> Iterator[None]:
        """Makes the model's mesh current, unless one is."""
        if self.mesh is None or not jax.sharding.get_abstract_mesh().empty:
            yield
        else:
            with use_mesh(self.mesh, ANSWERING_RULES):
                yield

    @functools.cached_property
    def stops(self) -> tuple[list[int], str]:
        """Ids that end an answer, and the text that does where the template closes with text ("" where not)."""
        template = resolve_template(self.template, self.tokenizer)
        ids = stop_ids(template, self.tokenizer)
        close = template.answer_close.strip(" ")
        if close in template.specials:
            return ids, ""
        spelled = span_tokenizer(self.tokenizer).middle(close)
        return sorted({*ids, *(spelled if len(spelled) == 1 else ())}), close

    def stop_texts(self, more: str | Sequence[str] = ()) -> list[str]:
        """Texts that end an answer, none of them empty: the template's, if it closes with text, and more."""
        return [text for text in (self.stops[1], *([more] if isinstance(more, str) else more)) if text]

    # ------------------------------------------------------------------------------------------------- images

    def image(self, data: bytes, source: str, layout: VisualLayout) -> UInt8[np.ndarray, "n H W 3"]:
        """The slots of an image file as the model takes them.

        Raises:
          ImageError: it cannot be used; names `source`.
        """
        image = open_rgb(data, source=source, compat=self.compat, max_pixels=self.max_image_pixels)
        return slot_images(self.processor, image, layout)

    def image_size(self, data: bytes, source: str) -> Size:
        """Height and width of an image file in pixels.

        Raises:
          ImageError: it cannot be used; names `source`.
        """
        return image_size(data, source=source, compat=self.compat, max_pixels=self.max_image_pixels)

    def frames(self, video: OpenVideo) -> UInt8[np.ndarray, "n H W 3"]:
        """The slots of a video as the model takes them; how many, `config.video` says.

        Raises:
          ImageError: it cannot be used; names it.
        """
        found = pick(video, *self.config.video.picked, compat=self.compat, max_pixels=self.max_image_pixels)
        return frame_slots(self.processor, found)

    def blind_image(self) -> UInt8[np.ndarray, "H W 3"]:
        """What a blind model is shown: the mean colour everywhere, zero after normalisation (to 1/255)."""
        return np.broadcast_to(np.asarray(self.processor.fill, np.uint8), (*self.processor.shape, 3))

    # ----------------------------------------------------------------------------------------------- identity

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of what decides answers: configuration, parameter values, tokenizer, images, template.

        Of each parameter evenly spaced elements are read (all of them up to 65,536), so that it is cheap for
        large models too. How the computation is arranged (remat, attention implementation) does not enter.
        """
        digest = hashlib.sha256()
        same = {"remat", "vision_remat", "attention"}
        fields = self.config.settings
        digest.update(repr(sorted((k, v) for k, v in fields.items() if k not in same)).encode())
        digest.update(repr((self.processor, self.compat, self.template, len(self.tokenizer))).encode())
        probe = "The quick brown fox, 12 + 7 = 19? <image>\n"
        digest.update(repr(self.tokenizer(probe).input_ids).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
            digest.update(sampled(leaf).tobytes())
        return digest.hexdigest()[:16]


def sampled(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """Evenly spaced elements of a parameter in their order, on the host; all if they are few.

    A parameter split over several hosts (`mesh.fsdp`) is sampled on its devices, by all processes together.
    """
    step = max(1, leaf.size // _SAMPLED)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        few = jax.jit(lambda values: values.reshape(-1)[::step])(leaf)
        return np.asarray(multihost_utils.process_allgather(few, tiled=True))
    return np.asarray(leaf.reshape(-1)[::step])
