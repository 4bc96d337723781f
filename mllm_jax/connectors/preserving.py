"""Feature-preserving connectors: one token per patch, optionally reduced by bilinear interpolation.

The reduction is the efficient variant of Dense Connector (P2 3.3): parameter-free, on the LLM-width tokens
after the MLP; 24x24 -> 12x12 is exactly the 2x2 mean.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Connector, Grid, VisionFeatures
from mllm_jax.connectors.grids import divided, resize_grid


class PreservingConnector(Connector):
    """Base of connectors whose tokens lie on the patch grid. Subclasses define `tokens`.

    Attributes:
      reduction: patches per side taken together after the MLP (2: a quarter of the tokens); must divide the
        grid.
      reduced_grid: (rows, columns) to reduce to instead, for grids that `reduction` does not divide: SigLIP's
        27x27 to (13, 13) or (14, 14). Empty: use `reduction`.

    Examples:
      >>> from mllm_jax.connectors import VisionSpec, create
      >>> linear = create("linear", VisionSpec(64, 6, 5, (12, 12)), 128, {"reduction": 2})
      >>> isinstance(linear, PreservingConnector), linear.num_tokens((12, 12)), linear.token_grid((12, 12))
      (True, 36, (6, 6))
    """

    reduction: int = 1
    reduced_grid: tuple[int, ...] = ()

    @nn.nowrap
    def output_grid(self, grid: Grid) -> Grid:
        """Rows and columns of the tokens.

        Raises:
          ValueError: the grid cannot be reduced so; the fix is named.
        """
        if not self.reduced_grid:
            try:
                return divided(grid, self.reduction, "reduction")
            except ValueError as error:
                raise ValueError(f"{error}; give reduced_grid=(rows, columns) instead") from None
        if self.reduction != 1:
            raise ValueError(f"give reduction={self.reduction} or reduced_grid={self.reduced_grid}, not both")
        if len(self.reduced_grid) != 2:
            raise ValueError(f"reduced_grid={self.reduced_grid} must be (rows, columns)")
        rows, columns = self.reduced_grid
        if not (1 <= rows <= grid[0] and 1 <= columns <= grid[1]):
            raise ValueError(
                f"reduced_grid={self.reduced_grid} is not within the {grid[0]}x{grid[1]} patch grid"
            )
        return (rows, columns)

    @nn.nowrap
    def token_grid(self, grid: Grid) -> Grid | None:
        return self.output_grid(grid)

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        rows, columns = self.output_grid(grid)
        return rows * columns

    @nn.nowrap
    def treats_patches_alone(self) -> bool:
        return self.reduction == 1 and not self.reduced_grid

    def tokens(self, features: VisionFeatures) -> Float[Array, "B N D"]:
        """One token of LLM width per patch (a compact method)."""
        raise ValueError(f"{type(self).__name__} does not define tokens")

    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        out = self.output_grid(features.grid)
        x = self.tokens(features)
        return x if out == features.grid else resize_grid(x, features.grid, out)
