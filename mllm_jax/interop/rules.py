"""Weight-name tables: rows that tie a parameter to their tensor (one per block), read both ways."""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """An invertible change of layout; no arithmetic, so that a round trip is exact bit for bit.

    A stored shape that `write(read(x))` does not give back is refused, so that nothing is cut off.

    Attributes:
      read: their array -> ours. Raises ValueError for a layout that it does not know.
      write: ours -> theirs.
      leaves_out: why `read` may take only a part of their array; "" = it never does.
    """

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    leaves_out: str = ""


SAME = Transform(lambda x: x, lambda x: x)
TRANSPOSE = Transform(lambda x: x.T, lambda x: x.T)  # torch Linear [out, in] <-> kernel [in, out]


CONVOLUTION = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


def patch_kernel(patch: int, channels: int = 3) -> Transform:
    """A patch convolution [C, c, p, p] <-> a matrix [p * p * c, C] over (row, column, channel)."""
    return Transform(
        lambda x: x.transpose(2, 3, 1, 0).reshape(patch * patch * channels, -1),
        lambda x: x.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1),
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a table.

    Attributes:
      path: our parameter, "blocks/q/kernel".
      name: their tensor in the table's canonical spelling. With "{i}" there is one tensor per block and ours
        is their stack on axis 0.
      transform: layout of one tensor.
      blocks: how many blocks there are by config.json, read or not; None = any number.
      share: (k, n): ours is the k-th of n equal parts of their tensor, cut on axis 0; (0, 1) = all of it. The
        transform is of that part. All n rows of a tensor stand in the table.
    """

    path: str
    name: str
    transform: Transform = SAME
    blocks: int | None = None
    share: tuple[int, int] = (0, 1)

    def part(self, tensor: np.ndarray) -> np.ndarray:
        """What of their tensor is ours.

        Raises:
          ValueError: it cannot be cut into so many equal parts.
        """
        which, count = self.share
        return tensor if count == 1 else np.split(tensor, count)[which]

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """Our parameter, or one block of it, from their tensor."""
        return self.transform.read(self.part(tensor))

    @property
    def stacked(self) -> bool:
        """One tensor per block."""
        return "{i}" in self.name

    def index(self, name: str) -> int | None:
        """Block number if `name` is a tensor of this row (0 when not stacked), else None."""
        if not self.stacked:
            return 0 if name == self.name else None
        head, tail = self.name.split("{i}")
        found = re.fullmatch(re.escape(head) + r"(\d{1,9})" + re.escape(tail), name)
        if not found or (self.blocks is not None and int(found[1]) >= self.blocks):
            return None
        return int(found[1])


def linear(path: str, name: str, bias: bool = True) -> tuple[Rule, ...]:
    """Rows of a torch Linear and our Dense."""
    rules = (Rule(f"{path}/kernel", f"{name}.weight", TRANSPOSE),)
    return (*rules, Rule(f"{path}/bias", f"{name}.bias")) if bias else rules


def norm(path: str, name: str, bias: bool = True) -> tuple[Rule, ...]:
    """Rows of a LayerNorm, or of an RMSNorm (no bias)."""
    rules = (Rule(f"{path}/scale", f"{name}.weight"),)
    return (*rules, Rule(f"{path}/bias", f"{name}.bias")) if bias else rules


def attention_inputs(paths: Sequence[str], name: str) -> tuple[Rule, ...]:
    """Rows of our Dense layers of queries, keys and values, which torch's nn.MultiheadAttention keeps in one."""
    return tuple(
        Rule(f"{path}/{leaf}", f"{name}.in_proj_{theirs}", transform, share=(i, len(paths)))
        for leaf, theirs, transform in (("kernel", "weight", TRANSPOSE), ("bias", "bias", SAME))
        for i, path in enumerate(paths)
    )
