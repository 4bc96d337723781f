"""What the configuration of one vision encoder shares with that of several (`encoders.EncodersConfig`)."""

import dataclasses
from typing import Any

from mllm_jax.connectors.base import Grid
from mllm_jax.data.batch import Size


class SingleEncoder:
    """Base of the configurations of single encoders.

    Attributes:
      views: images that one image slot is seen as.
      regular: whether the tokens lie on one grid.
      mining: how fine features are mined into coarse ones; see `connectors.base.VisionSpec`.
    """

    views = 1
    regular = True
    mining = ""

    @property
    def towers(self) -> tuple[Any, ...]:
        """All encoders: this one."""
        return (self,)

    def inputs(self, slot: Size) -> tuple[tuple[Any, Size], ...]:
        """Every encoder with the height and width of its input, for image slots of `slot` pixels."""
        return ((self, slot),)

    def fine(self, slot: Size) -> tuple[int, int]:
        """Fine features of each token's cell, and their channels: there are none."""
        return (0, 0)

    def maps(self, size: Size) -> tuple[tuple[Grid, int], ...]:
        """Grid and channels of every map that its feature is made of, for inputs of this size."""
        return ((self.grid(*size), self.width),)

    def with_depth(self, depth: int) -> "SingleEncoder":
        """The encoder cut to so many blocks."""
        return dataclasses.replace(self, depth=depth)
