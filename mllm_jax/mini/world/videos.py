"""Videos of the mini world: shapes that move, or that come and go, and questions that no single frame answers.

Three abilities: in which direction a shape moves, which of several comes first (or last), and how many are shown one
after the other. A video is drawn deterministically from `(seed, ability, index)`; its scene stays as it is while the
shapes change.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8

from mllm_jax import files
from mllm_jax.data.video_file import INSTALL
from mllm_jax.mini.world.dataset import write_dataset
from mllm_jax.mini.world.questions import OPTIONS
from mllm_jax.mini.world.render import LOOK_VERSION, render_array
from mllm_jax.mini.world.scene import COLORS, LIGHTING, RGB, SCENES, SHAPES, Scene, Thing

FRAMES, RATE = 24, 8  # of every video, and how many a second shows
ABILITIES = ("direction", "order", "count")
GROUP = "video"
STEPS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
COUNTS = tuple(str(n) for n in range(1, 7))
TEMPLATES = {
    "direction": ("to which side does the {x} move?", "where does the {x} go?"),
    "first": ("which shape comes first?", "what is the first shape?"),
    "last": ("which shape comes last?", "what is the last shape?"),
    "count": ("how many shapes come one after the other?", "how many shapes are there in all?"),
}
_RADIUS = 0.13  # as the large shapes of images
_CORNERS = ((0.14, 0.14), (0.86, 0.14), (0.14, 0.86), (0.86, 0.86))


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video with its question.

    Attributes:
      scenes: what each of its frames shows; equal ones are one object.
      question: lower case.
      answer: one word.
      options: distinct plausible answers in random order, the right one among them.
    """

    scenes: tuple[Scene, ...]
    question: str
    answer: str
    options: tuple[str, ...]

    def frames(self) -> Iterator[UInt8[np.ndarray, "112 112 3"]]:
        """Its frames; each different one is drawn once."""
        drawn: dict[int, np.ndarray] = {}
        for scene in self.scenes:
            if id(scene) not in drawn:
                drawn[id(scene)] = render_array(scene)
            yield drawn[id(scene)]


def make_clip(seed: int, ability: str, index: int) -> Clip:
    """The video number `index` of an ability.

    Args:
      seed: which world; any non-negative integer.
      ability: one of `ABILITIES`.
      index: answers take turns, so that consecutive numbers have each about equally often.

    Returns:
      The same for the same arguments, on any machine.
    """
    rng = np.random.default_rng(np.random.SeedSequence([0x71DE0, ABILITIES.index(ability), seed, index]))
    return _Maker(rng, seed, index).clip(ability)


class _Maker:
    def __init__(self, rng: np.random.Generator, seed: int, index: int):
        self.rng, self.index = rng, index
        background = self.pick(SCENES[:-1])  # some of the plain ones have the color of a shape
        self.stage = Scene(
            split="mini",
            seed=seed,
            index=index,
            topic="shapes",
            background=background,
            lighting="night" if background == "space" else self.pick(LIGHTING),
            style="flat",
            quality="clear",
            backdrop=(255, 255, 255),
            outline=True,
            things=(),
            panel=None,
            texture=int(rng.integers(2**31)),
        )

    def pick(self, items: Sequence[Any]) -> Any:
        return items[int(self.rng.integers(len(items)))]

    def shuffled(self, items: Sequence[Any]) -> list[Any]:
        return [items[int(i)] for i in self.rng.permutation(len(items))]

    def showing(self, *things: Thing) -> Scene:
        return dataclasses.replace(self.stage, things=things)

    def things(self, count: int) -> list[Thing]:
        """Shapes at the center, no two of one kind or color."""
        kinds = zip(self.shuffled(SHAPES)[:count], self.shuffled(COLORS)[:count], strict=True)
        return [_thing(shape, color) for shape, color in kinds]

    def clip(self, ability: str) -> Clip:
        make: Callable[[], tuple[list[Scene], str, str, Sequence[str], dict[str, str]]] = getattr(
            self, ability
        )
        scenes, form, answer, wrong, names = make()
        options = self.shuffled([answer, *self.shuffled(wrong)[: OPTIONS - 1]])
        question = self.pick(TEMPLATES[form]).format(**names)
        return Clip(tuple(scenes), question, answer, tuple(options))

    def direction(self):
        """One shape moves through the middle, others stand in corners; the middle frame is the same either way."""
        answer = list(STEPS)[self.index % len(STEPS)]
        mover, *others = self.things(1 + int(self.rng.integers(3)))
        standing = [
            dataclasses.replace(thing, x=x, y=y)
            for thing, (x, y) in zip(others, self.shuffled(_CORNERS), strict=False)
        ]
        (x, y), reach = self.rng.uniform(0.42, 0.58, 2).tolist(), float(self.rng.uniform(0.22, 0.26))
        right, down = STEPS[answer]
        places = [2 * frame / (FRAMES - 1) - 1 for frame in range(FRAMES)]
        scenes = [
            self.showing(
                *standing,
                dataclasses.replace(
                    mover, x=round(x + reach * right * place, 4), y=round(y + reach * down * place, 4)
                ),
            )
            for place in places
        ]
        return (
            scenes,
            "direction",
            answer,
            [d for d in STEPS if d != answer],
            {"x": f"{mover.color} {mover.shape}"},
        )

    def order(self):
        """Four shapes, one after the other."""
        shown = self.things(OPTIONS)
        form = ("first", "last")[self.index % 2]
        answer = shown[0 if form == "first" else -1]
        return self.turns(shown), form, answer.shape, [t.shape for t in shown if t is not answer], {}

    def count(self):
        """One to six shapes, one after the other."""
        number = COUNTS[self.index % len(COUNTS)]
        return self.turns(self.things(int(number))), "count", number, [n for n in COUNTS if n != number], {}

    def turns(self, things: Sequence[Thing]) -> list[Scene]:
        """Each for about as long as the others, at a place of its own."""
        scenes = []
        for thing in things:
            x, y = (round(value, 4) for value in self.rng.uniform(0.2, 0.8, 2).tolist())
            scenes.append(self.showing(dataclasses.replace(thing, x=x, y=y)))
        return [scenes[frame * len(scenes) // FRAMES] for frame in range(FRAMES)]


def _thing(shape: str, color: str) -> Thing:
    w = h = _RADIUS * (0.88 if shape == "square" else 1.0)
    if shape == "rectangle":
        w, h = _RADIUS * 1.1, _RADIUS * 0.56
    return Thing("shape", color, "large", 0.5, 0.5, round(w, 4), round(h, 4), RGB[color], shape)


def write_video(file: BinaryIO, clip: Clip) -> None:
    """Writes a video as MP4 (MPEG-4 Part 2, which every FFmpeg can write and read).

    Raises:
      ModuleNotFoundError: PyAV is not installed.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(INSTALL) from error

    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(RATE))
        stream.pix_fmt = "yuv420p"
        stream.options = {"qmin": "2", "qmax": "2"}  # the quantizer of hardly any loss
        for number, pixels in enumerate(clip.frames()):
            if not number:
                stream.height, stream.width = pixels.shape[:2]
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


def write_benchmark(
    root: str | os.PathLike[str], n_per_ability: int, seed: int, progress: bool = True
) -> Path:
    """Writes the `mini_video` benchmark, unless it is there already.

    Args:
        root: folder; gets `mini_video.json` and `videos/*.mp4`.
        n_per_ability: questions for each of the three abilities.
        seed: which world.
        progress: print a line now and then.

    Returns:
        Path of `mini_video.json`: a list of {question_id, video, ability, group, question, options, answer}.

    Raises:
        ValueError: n_per_ability < 1.
        DatasetMismatchError: `root` holds a benchmark made from other parameters.
        ModuleNotFoundError: PyAV is not installed.
    """
    if n_per_ability < 1:
        raise ValueError(f"n_per_ability is {n_per_ability}; a benchmark needs at least one question")

    def records(folder: Path, keep: bool) -> Iterator[dict[str, Any]]:
        for ability in ABILITIES:
            for index in range(n_per_ability):
                clip, name = make_clip(seed, ability, index), f"{ability}_{index:05d}"
                if not (keep and (folder / f"{name}.mp4").is_file()):
                    with files.replacing(folder / f"{name}.mp4", sync=False) as file:
                        write_video(file, clip)
                yield {
                    "question_id": name,
                    "video": f"{name}.mp4",
                    "ability": ability,
                    "group": GROUP,
                    "question": clip.question,
                    "options": list(clip.options),
                    "answer": clip.answer,
                }

    parameters = {
        "n_per_ability": n_per_ability,
        "seed": seed,
        "generator": _fingerprint(),
        "look": LOOK_VERSION,
    }
    total = n_per_ability * len(ABILITIES)
    return write_dataset(root, "mini_video", parameters, records, total, progress, "videos")


def _fingerprint() -> str:
    """A digest of a few videos: it changes when the generator does."""
    digest = hashlib.sha256()
    for ability in ABILITIES:
        clip = make_clip(0, ability, 1)
        shown = [scene.to_json() for scene in (clip.scenes[0], clip.scenes[-1])]
        digest.update(json.dumps([shown, clip.question, clip.answer, clip.options], sort_keys=True).encode())
    return digest.hexdigest()[:16]
