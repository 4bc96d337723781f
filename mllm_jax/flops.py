"""Counting the floating-point operations of a JAX function from its jaxpr: matrix products and convolutions.

One multiplication with one addition counts as two. Elementwise operations are left out, as is usual for MFU: they are
below two percent at the widths of real models, and do not run on the units whose peak is quoted.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

KERNELS = ("pallas_call", "custom_call", "ffi_call")  # their work cannot be seen from outside


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Operations of `function(*args)`; a scan counts as often as it runs.

    Args:
      args: arrays or shapes (`jax.ShapeDtypeStruct`); nothing is computed.

    Raises:
      ValueError: the function holds a loop of unknown length or a kernel, whose work cannot be counted.

    Example:
      >>> import jax.numpy as jnp
      >>> count_flops(lambda a, b: a @ b, jnp.zeros((2, 3)), jnp.zeros((3, 5)))
      60
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_flops(jaxpr: core.Jaxpr) -> int:
    return sum(map(_equation_flops, jaxpr.eqns))


def _equation_flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    if name in KERNELS:
        raise ValueError(f"the operations of a kernel ({name}) cannot be counted; count with attention='xla'")
    inside = [_jaxpr_flops(each) for each in _jaxprs(params)]
    if name == "scan":
        return params["length"] * sum(inside)
    if name == "while" and sum(inside):
        raise ValueError("a while loop of unknown length holds matrix products; use lax.scan to count them")
    return max(inside) if name == "cond" else sum(inside)


def _jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    found = []
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)  # of a ClosedJaxpr
            if hasattr(each, "eqns"):
                found.append(each)
    return found


def _convolution_flops(equation: Any) -> int:
    """Products with padding and with the zeros between dilated inputs are not counted, as XLA does not."""
    params = equation.params
    lhs, rhs = (variable.aval.shape for variable in equation.invars)
    out = equation.outvars[0].aval.shape
    numbers = params["dimension_numbers"]
    total = 2 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * rhs[numbers.rhs_spec[1]]
    for axis, (stride, (low, _), between, apart) in enumerate(
        zip(
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            strict=True,
        ),
        start=2,
    ):
        size = (lhs[numbers.lhs_spec[axis]] - 1) * between + 1
        places = (
            place * stride - low + tap * apart
            for place in range(out[numbers.out_spec[axis]])
            for tap in range(rhs[numbers.rhs_spec[axis]])
        )
        total *= sum(0 <= each < size and each % between == 0 for each in places)
    return total
