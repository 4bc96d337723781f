"""How an image becomes visual tokens: slots, which of their tokens are kept, and how many that are.

A `VisualLayout` is plain Python, known before anything is traced or decoded. Whatever needs a count (row layout,
lengths, prompts, validation) asks it, and nothing multiplies images by a number of tokens. A `LayoutRule` is the part
of a recipe that gives the layout of an image of any size.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from mllm_jax.data.batch import Size


@dataclasses.dataclass(frozen=True)
class Slot:
    """An image slot of a row; the same for all slots, as shapes are static.

    Attributes:
      num_tokens: M, visual tokens that the connector makes of one slot.
      size: height and width of the vision encoder's input in pixels; None where only tokens are counted.
    """

    num_tokens: int
    size: Size | None = None

    def __post_init__(self):
        if self.num_tokens < 1:
            raise ValueError(f"an image slot needs at least one visual token, got {self.num_tokens}")


@dataclasses.dataclass(frozen=True)
class VisualLayout:
    """The visual tokens of one image.

    Attributes:
      slots: those that the image fills, in order.
      kept: the visual tokens in the order in which the LLM reads them, as indices into the tokens of all the image's
        slots, slot after slot. Tokens that are not named are dropped.
    """

    slots: tuple[Slot, ...]
    kept: range | tuple[int, ...]

    def __post_init__(self):
        if not self.kept:
            raise ValueError("an image needs at least one visual token")
        if min(self.kept) < 0 or max(self.kept) >= self.slot_tokens:
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
    """

    slot: Slot

    def __call__(self, read_size: Callable[[], Size], /) -> VisualLayout:
        """The layout of one image.

        Args:
          read_size: reads the image's height and width; called only where they matter, for it may open a file.
        """
        ...


@dataclasses.dataclass(frozen=True)
class WholeImage:
    """The rule of LLaVA-1.5 and of most recipes: one slot holds the whole image, and all its tokens are kept.

    >>> rule = WholeImage(Slot(576, size=(336, 336)))
    >>> rule(lambda: (480, 640)).num_tokens
    576
    """

    slot: Slot

    def __call__(self, read_size: Callable[[], Size] | None = None, /) -> VisualLayout:
        """The layout of any image."""
        return VisualLayout((self.slot,), range(self.slot.num_tokens))
