"""The efficient variant: where it composes, its values, its errors."""

import jax.numpy as jnp
import numpy as np
import pytest
from connector_testing import Case

from mllm_jax import connectors
from mllm_jax.connectors.grids import resize_grid


def test_halving_24x24_gives_the_reference_value_and_the_block_mean():
    x = np.arange(576, dtype=np.float32).reshape(1, 576, 1)
    out = np.asarray(resize_grid(jnp.asarray(x), (24, 24), (12, 12)))
    assert out[0, 0, 0] == 12.5
    np.testing.assert_allclose(out.reshape(12, 12), x.reshape(12, 2, 12, 2).mean((1, 3)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "sci", "dci"])
def test_composes_with_every_preserving_connector(name):
    case = Case(name, {"reduction": 2}, depth=24, select=23)
    assert case.create((24, 24)).num_tokens((24, 24)) == 144
    siglip = Case(name, {"reduced_grid": (13, 13)}, depth=27, select=26)
    assert siglip.create((27, 27)).num_tokens((27, 27)) == 169


@pytest.mark.parametrize("name", ["sti", "average_pool", "q_former", "ldp", "token_packer"])
def test_other_connectors_refuse_it_and_name_those_that_have_it(name):
    with pytest.raises(
        ValueError, match=rf"'{name}' has no option 'reduction'.*linear, mlp1x_gelu.*dci have it"
    ):
        connectors.create(name, connectors.VisionSpec(8, 6, 5, (24, 24)), 12, {"reduction": 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 2}, r"reduction=2 does not divide the 27x27 patch grid; give reduced_grid="),
        ({"reduction": 3, "reduced_grid": (9, 9)}, "not both"),
        ({"reduced_grid": (13,)}, r"must be \(rows, columns\)"),
        ({"reduced_grid": (28, 13)}, "not within the 27x27"),
        ({"reduced_grid": (0, 13)}, "not within the 27x27"),
    ],
)
def test_impossible_reductions_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        Case("mlp2x_gelu", options).create((27, 27))
