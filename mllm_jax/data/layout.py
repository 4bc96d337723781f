"""How images and videos become visual tokens: slots, what is made of their tokens, and how many visual tokens that are.

A `VisualLayout` is plain Python, known before anything is traced or decoded. Whatever needs a count (row layout,
lengths, prompts, validation) asks it, and nothing multiplies images by a number of tokens. A `LayoutRule` is the part
of a recipe that gives the layout of an image of any size.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

from mllm_jax.data.batch import SELECT, SEPARATOR, Combination, Size
from mllm_jax.data.conversations import SampleError


@dataclasses.dataclass(frozen=True)
class Slot:
    """An image slot of a row; the same for all slots, as shapes are static.

    Attributes:
      num_tokens: M, visual tokens that the connector makes of one slot.
      size: height and width of the vision encoder's input in pixels; None where only tokens are counted.
      native: it holds the patches of an image at its own aspect ratio (`data.naflex`).

    Raises:
      ValueError: no token.

    Examples:
      >>> Slot(576, size=(336, 336)).num_tokens
      576
    """

    num_tokens: int
    size: Size | None = None
    native: bool = False

    def __post_init__(self):
        if self.num_tokens < 1:
            raise ValueError(f"an image slot needs at least one visual token, got {self.num_tokens}")


@dataclasses.dataclass(frozen=True, eq=False)
class VisualLayout:
    """The visual tokens of one image or video.

    Attributes:
      slots: those that it fills, in order.
      kept: the visual tokens in the order in which the LLM reads them, as indices into the tokens of all the image's
        slots, slot after slot. Slot tokens that are not named are dropped; `SEPARATOR` is the learned separator. Where
        visual tokens are combinations of K slot tokens (`LayoutRule.combination`), K indices each. Any sequence of
        whole numbers may be given.
      weights: of the K, where they are summed.
      canvas: height and width to which the image is brought before it is cut into slots, row by row; the first slot
        holds the whole image if there is one more than the canvas has. None: a single slot holds the whole image, or
        each slot one frame of a video.
      grid: rows and columns of patches, where slots hold images at their own aspect ratio (`data.naflex`).

    Raises:
      ValueError: no token is kept, or one that the slots do not have.

    Examples:
      Two slots of 4 tokens each, of which the LLM reads the first whole and the second's corners, then a separator:

      >>> layout = VisualLayout((Slot(4), Slot(4)), kept=(0, 1, 2, 3, 4, 7, SEPARATOR))
      >>> layout.num_tokens, layout.slot_tokens
      (7, 8)
    """

    slots: tuple[Slot, ...]
    kept: Int32[np.ndarray, " n"] | Int32[np.ndarray, "n K"]
    weights: Float32[np.ndarray, "n K"] | None = None
    canvas: Size | None = None
    grid: tuple[int, int] | None = None

    # `kept` may be given as a range or a tuple, so construction is not checked under pytest.
    __no_type_check__ = True

    def __post_init__(self):
        kept: Any = np.asarray(self.kept, np.int32)
        object.__setattr__(self, "kept", kept)
        if not kept.size:
            raise ValueError("an image needs at least one visual token")
        if ((kept < 0) & (kept != SEPARATOR)).any() or kept.max() >= self.slot_tokens:
            raise ValueError(f"a visual token is outside the {self.slot_tokens} tokens of the image's slots")

    @property
    def num_tokens(self) -> int:
        """Visual tokens that the LLM reads."""
        return len(self.kept)

    @property
    def slot_tokens(self) -> int:
        """Tokens of all the image's slots, kept or not."""
        return sum(slot.num_tokens for slot in self.slots)


@runtime_checkable
class LayoutRule(Protocol):
    """From an image's size to its layout.

    Attributes:
      slot: every slot of the rows.
      combination: how a visual token is made of slot tokens.
      separated: whether layouts hold the learned separator.
      most_slots, most_tokens: slots and visual tokens of the largest layout.

    Examples:
      >>> isinstance(WholeImage(Slot(576)), LayoutRule)
      True
    """

    slot: Slot
    combination: Combination
    separated: bool
    most_slots: int
    most_tokens: int

    def __call__(self, read_size: Callable[[], Size], images: int = 1, /) -> VisualLayout:
        """The layout of one image.

        Args:
          read_size: reads the image's height and width; called only where they matter, for it may open a file.
          images: how many images its sample has.
        """
        ...


@runtime_checkable
class VideoRule(LayoutRule, Protocol):
    """A rule of videos, too."""

    def of_video(self, frames: int) -> VisualLayout:
        """The layout of a video of so many frames."""
        ...


Shown = (
    Callable[[], Size] | int
)  # an image by what reads its height and width, a video by its number of frames


def layouts(rule: LayoutRule, shown: Sequence[Shown], *, sample: str = "?") -> list[VisualLayout]:
    """The layouts of the images and videos of one sample.

    Args:
      shown: of an image what reads its height and width, of a video its number of frames.
      sample: its id, for the message.

    Raises:
      SampleError: a video, and the model takes none.

    Examples:
      >>> sizes = [lambda: (480, 640), lambda: (32, 32)]
      >>> [layout.num_tokens for layout in layouts(WholeImage(Slot(576)), sizes)]
      [576, 576]
    """
    if any(isinstance(each, int) for each in shown) and not isinstance(rule, VideoRule):
        raise SampleError(
            sample,
            "shows a video, and model.video.frames is 0; set it to the frames that are picked of a video (validate: "
            "--video-frames)",
        )
    return [rule.of_video(each) if isinstance(each, int) else rule(each, len(shown)) for each in shown]


@dataclasses.dataclass(frozen=True)
class WholeImage:
    """The rule of LLaVA-1.5 and of most recipes: one slot holds the whole image, and all its tokens are kept.

    Examples:
      >>> rule = WholeImage(Slot(576, size=(336, 336)))
      >>> rule(lambda: (480, 640)).num_tokens
      576
    """

    slot: Slot
    combination = SELECT
    separated = False
    most_slots = 1

    @property
    def most_tokens(self) -> int:
        """Those of every image."""
        return self.slot.num_tokens

    @functools.cached_property
    def _layout(self) -> VisualLayout:
        return VisualLayout((self.slot,), np.arange(self.slot.num_tokens))

    def __call__(self, read_size: Callable[[], Size] | None = None, images: int = 1, /) -> VisualLayout:
        """The layout of any image."""
        return self._layout
