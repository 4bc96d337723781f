"""How many tokens the samples of a data set have, and how full rows of them would be: known before training."""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int

from mllm_jax.data.packing import RowLimits, lay_out
from mllm_jax.data.rows import row_needs
from mllm_jax.data.tokens import EncodedSample

Count = tuple[int, ...]  # of one sample: `packing.RESOURCES`, images, visual tokens


def count_sample(encoded: EncodedSample) -> Count:
    """What a sample needs of each of `packing.RESOURCES`, its images (videos too), and the visual tokens of these."""
    visual = sum(layout.num_tokens for layout in encoded.layouts)
    return (*row_needs(encoded), len(encoded.layouts), visual)


@dataclasses.dataclass(frozen=True, eq=False)
class Counts:
    """The counts of a data set's samples, in their order.

    Attributes:
      needs: int32, of each of `packing.RESOURCES`, as `measure.sizes` stores them for training.
      images: of each sample, videos among them.
      visual: visual tokens of each sample.
    """

    needs: Int[np.ndarray, "N 4"]
    images: Int[np.ndarray, " N"]
    visual: Int[np.ndarray, " N"]

    @classmethod
    def of(cls, found: Iterable[Count]) -> "Counts":
        """The counts of samples as `count_sample` gives them."""
        table = np.array(list(found), np.int32).reshape(-1, 6)
        return cls(table[:, :4], table[:, 4], table[:, 5])

    def __len__(self) -> int:
        return len(self.needs)

    @property
    def tokens(self) -> Int[np.ndarray, " N"]:
        """Tokens of each sample, visual tokens included."""
        return self.needs[:, 0]

    @property
    def supervised(self) -> Int[np.ndarray, " N"]:
        """Supervised tokens of each sample."""
        return self.needs[:, 2]


def summary(counts: Counts, limits: RowLimits) -> dict[str, Any]:
    """What a data set makes of rows.

    Args:
      counts: of at least one sample.
      limits: of a row, `samples` being the most that may share one.

    Returns:
      JSON values: `over_row`, samples that no row can hold; `useful_alone` and `useful_packed`, the share of the rows'
      positions that hold tokens, with one sample a row and with packing (of the samples that fit); `rows_packed`;
      `by_images`, samples and tokens by number of images.
    """
    fits = (counts.needs <= limits.array).all(axis=1)
    left = counts.needs[fits]
    found: dict[str, Any] = {
        "row_length": limits.tokens,
        "over_row": int((~fits).sum()),
        "useful_alone": 0.0,
        "useful_packed": 0.0,
        "rows_packed": 0,
    }
    if len(left):
        rows = len(lay_out(left, limits).ends)
        total = int(left[:, 0].sum(dtype=np.int64))
        found["useful_alone"] = total / (len(left) * limits.tokens)
        found["useful_packed"] = total / (rows * limits.tokens)
        found["rows_packed"] = rows
    groups = collections.Counter(counts.images.tolist())
    found["by_images"] = [
        {
            "images": images,
            "samples": samples,
            "tokens": int(counts.tokens[counts.images == images].sum(dtype=np.int64)),
            "visual_tokens": int(counts.visual[counts.images == images].sum(dtype=np.int64)),
            "supervised_tokens": int(counts.supervised[counts.images == images].sum(dtype=np.int64)),
        }
        for images, samples in sorted(groups.items())
    ]
    return found
