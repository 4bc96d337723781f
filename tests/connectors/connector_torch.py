"""Pieces of the torch oracles and the comparison itself; parameters are read in this package's layout."""

from collections.abc import Callable
from typing import Any

import connector_testing
import jax
import numpy as np
import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def linear(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """torch's Linear."""
    return F.linear(x, p["kernel"].T, p.get("bias"))


def norm(x: Tensor, p: dict[str, Tensor] | None, eps: float = 1e-5) -> Tensor:
    """torch's LayerNorm."""
    return F.layer_norm(x, x.shape[-1:], p and p["scale"], p and p["bias"], eps)


def image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, N, C] row-major tokens to [B, C, rows, columns]."""
    return x.transpose(1, 2).unflatten(2, grid)


def tokens(x: Tensor) -> Tensor:
    """[B, C, rows, columns] to [B, N, C]."""
    return x.flatten(2).transpose(1, 2)


def conv2d(x: Tensor, p: dict[str, Tensor], stride: int = 1, groups: int = 1) -> Tensor:
    """torch's 3x3 or 1x1 convolution on channels-first images."""
    kernel = p["kernel"]
    kernel = kernel.T[:, :, None, None] if kernel.ndim == 2 else kernel.permute(3, 2, 0, 1)
    return F.conv2d(x, kernel, p.get("bias"), stride, kernel.shape[-1] // 2, groups=groups)


def norm2d(x: Tensor, p: dict[str, Tensor], eps: float = 1e-5) -> Tensor:
    """LayerNorm over the channels of channels-first images."""
    return norm(x.permute(0, 2, 3, 1), p, eps).permute(0, 3, 1, 2)


def mlp(x: Tensor, p: dict[str, Any], layers: int = 2) -> Tensor:
    """LLaVA's mlp{n}x_gelu."""
    for i in range(layers):
        x = linear(F.gelu(x) if i else x, p[f"layer_{i}"])
    return x


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """torch's scaled dot product attention on projected q, k, v."""
    q, k, v = (a.unflatten(-1, (heads, -1)).transpose(-3, -2) for a in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)


Oracle = Callable[[Any, dict[str, Any], list[Tensor], tuple[int, int]], Tensor]


@torch.no_grad()
def oracle_output(case: connector_testing.Case, oracle: Oracle, grid: tuple[int, int]) -> np.ndarray:
    """What the definition gives in torch; in double precision, so that only our own rounding is measured."""
    connector = case.create(grid)

    def double(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).double()

    params = jax.tree.map(double, connector_testing.parameters(connector, grid))
    torch.set_default_dtype(torch.float64)
    try:
        return oracle(connector, params, [double(s) for s in case.states(grid)], grid).numpy()
    finally:
        torch.set_default_dtype(torch.float32)


def check(case: connector_testing.Case, oracle: Oracle, grid: tuple[int, int]) -> None:
    """Asserts parity, and the token count that was promised without computing."""
    connector = case.create(grid)
    ours = connector_testing.run(
        connector, connector_testing.parameters(connector, grid), case.states(grid), grid
    )
    theirs = oracle_output(case, oracle, grid)
    assert ours.shape == theirs.shape == (2, connector.num_tokens(grid), case.llm)
    assert np.std(theirs) > 0.05  # values of order one, so that an absolute tolerance means something
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=connector_testing.TOLERANCE)
