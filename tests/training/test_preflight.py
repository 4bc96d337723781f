"""What is refused before anything is computed: a mesh on which hosts would share rows."""

import types
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from mllm_jax.config import ConfigError
from mllm_jax.training.preflight import check_rows


@pytest.mark.parametrize(
    ("axes", "shared"),
    [((2, 4, 1), None), ((1, 2, 4), None), ((4, 1, 2), None), ((1, 1, 8), "0, 1"), ((1, 1, 2), None)],
)
def test_rows_are_of_one_host(axes, shared, monkeypatch):
    """Two hosts of four devices each, or (the last one) of one host's only."""
    hosts = [types.SimpleNamespace(process_index=i // 4) for i in range(np.prod(axes))]
    mesh = mock.Mock(spec=Mesh, devices=np.array(hosts).reshape(axes), size=len(hosts))
    mesh.shape = dict(zip(("data", "fsdp", "tensor"), axes, strict=True))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    if shared is None:
        check_rows(mesh)
        return
    with pytest.raises(
        ConfigError, match=rf"'mesh\.tensor' is 8, .* hosts {shared}, .* the 4 devices .* mesh\.fsdp"
    ):
        check_rows(mesh)
