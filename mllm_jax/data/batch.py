"""The batch contract: what a model reads of some rows, as one struct that pipeline, training and inference share.

Shapes are static: every row has `T` positions and `I` image slots, whatever stands in them. A row holds one sample or
several (`segment_ids`); a sample has any number of images, and an image fills one slot or more. Slots that are not
filled are empty, so that a row without images runs the same program as one with many.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, UInt8

Size = tuple[int, int]  # height, width in pixels

# In place of the index of a visual token: the learned separator, such as the newline between rows.
SEPARATOR = -2


@dataclasses.dataclass(frozen=True)
class Combination:
    """How every visual token of a model is made of the tokens of its slots.

    Attributes:
      taps: K, how many of them it is made of.
      kind: "sum" (weighted) or "max" (of each channel).
    """

    taps: int = 1
    kind: str = "sum"

    @property
    def weighted(self) -> bool:
        """Whether batches hold weights."""
        return self.taps > 1 and self.kind == "sum"


SELECT = Combination()  # a visual token is one of the slots' tokens


def _field(dtype: Any, *axes: str, empty: int = 0, optional: bool = False) -> Any:
    """A field of `Batch`.

    Args:
      dtype: of its array; None for one that is only known at run time.
      axes: logical names of the leading axes behind the rows; the mesh gives them their meaning.
      empty: value where a row holds nothing.
      optional: whether batches may lack it.
    """
    metadata = {"dtype": dtype, "axes": ("batch", *axes), "empty": empty}
    return dataclasses.field(metadata=metadata, **({"default": None} if optional else {}))


@flax.struct.dataclass
class Batch:
    """Rows of `T` positions and `I` image slots; NumPy or JAX arrays, their shapes (`spec`) or their shardings.

    `*b` is `B` rows, nothing for a single row, or micro-batches of rows. `M` is the number of tokens that the connector
    makes of one slot.

    Attributes:
      tokens: token ids; 0 at padding and at visual tokens.
      positions: within the sample, from 0; 0 at padding.
      segment_ids: 1, 2, ... per sample of the row, 0 at padding. Positions attend within their segment only.
      visual_index: which of the row's `I * M` slot tokens (slot after slot) stands at a position as a visual token; -1
        for text, `SEPARATOR` for the learned separator.
      visual_taps: where visual tokens are combinations of K slot tokens, which; `visual_index` is the first.
      visual_weights: of these K, where they are summed.
      loss_weights: weight of predicting `tokens[t]` from what is before it; None where nothing is learned.
      image_mask: slots that hold an image; None in rows without slots.
      images: pixels before normalisation, 0 in empty slots; None in rows of features and in rows without slots.
      grids: rows and columns of patches of every slot, 0 in empty ones, where slots hold the patches of images at their
        own aspect ratio (`data.naflex`).
      features: in place of `images`, what the vision encoder gave for them, an array for every grid
        (`data.feature_cache`).
    """

    # JAX builds instances from placeholders, shapes and shardings too, so construction is not checked under pytest.
    __no_type_check__ = True

    tokens: Int32[Any, "*b T"] = _field(np.int32, "length")
    positions: Int32[Any, "*b T"] = _field(np.int32, "length")
    segment_ids: Int32[Any, "*b T"] = _field(np.int32, "length")
    visual_index: Int32[Any, "*b T"] = _field(np.int32, "length", empty=-1)
    loss_weights: Float32[Any, "*b T"] | None = _field(np.float32, "length", optional=True)
    visual_taps: Int32[Any, "*b T K"] | None = _field(np.int32, "length", optional=True)
    visual_weights: Float32[Any, "*b T K"] | None = _field(np.float32, "length", optional=True)
    image_mask: Bool[Any, "*b I"] | None = _field(np.bool_, "slots", optional=True)
    images: UInt8[Any, "*b I H W 3"] | None = _field(np.uint8, "slots", optional=True)
    grids: Int32[Any, "*b I 2"] | None = _field(np.int32, "slots", optional=True)
    features: tuple[Float[Any, "*b I _ _ _"], ...] | None = _field(None, "slots", optional=True)

    @classmethod
    def spec(
        cls,
        *rows: int,
        length: int,
        slots: int = 0,
        image_size: Size | None = None,
        features: Sequence[jax.ShapeDtypeStruct] | None = None,
        labels: bool = True,
        grids: bool = False,
        combination: Combination = SELECT,
    ) -> "Batch":
        """Shapes and dtypes (`jax.ShapeDtypeStruct`) of a batch.

            Batch.spec(16, length=2048, slots=1, image_size=(336, 336))

        Args:
          rows: `B`; nothing for a single row.
          length: `T`.
          slots: `I`; 0 for rows without images.
          image_size: `H, W`; None for rows of features.
          features: shape `[F, N, C]` and dtype of each array of a slot's features.
          labels: whether there are `loss_weights`.
          grids: whether there are `grids` (`Slot.native`).
          combination: of the model (`LayoutRule.combination`).
        """
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("tokens", "positions", "segment_ids", "visual_index"), (length,)
        )
        if labels:
            shapes["loss_weights"] = (length,)
        if combination.taps > 1:
            shapes["visual_taps"] = (length, combination.taps)
        if combination.weighted:
            shapes["visual_weights"] = (length, combination.taps)
        if slots:
            shapes["image_mask"] = (slots,)
            if image_size is not None:
                shapes["images"] = (slots, *image_size, 3)
            if grids:
                shapes["grids"] = (slots, 2)
        spec = cls(
            **{
                field.name: jax.ShapeDtypeStruct((*rows, *shapes[field.name]), field.metadata["dtype"])
                for field in dataclasses.fields(cls)
                if field.name in shapes
            }
        )
        if not slots or features is None:
            return spec
        return spec.replace(
            features=tuple(jax.ShapeDtypeStruct((*rows, slots, *x.shape), x.dtype) for x in features)
        )

    def empty(self) -> "Batch":
        """Rows of these shapes that hold nothing, as NumPy arrays: segment 0, no weight, no image."""
        return self.map(lambda leaf, field: np.full(leaf.shape, field["empty"], leaf.dtype))

    def map(self, function: Any) -> "Batch":
        """`function(leaf, metadata)` of every field that is there; `metadata` has `dtype`, `axes` and `empty`."""
        there = {
            field.name: (getattr(self, field.name), field.metadata) for field in dataclasses.fields(self)
        }
        return Batch(
            **{
                name: jax.tree.map(lambda leaf, metadata=metadata: function(leaf, metadata), value)
                for name, (value, metadata) in there.items()
            }
        )
