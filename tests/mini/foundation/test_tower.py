"""How the mini tower's training starts."""

import jax
import numpy as np

from mllm_jax.mini.foundation import pictures, tower
from mllm_jax.models.vit import VisionConfig

GRID = 12


def test_the_first_blocks_start_by_looking_at_one_neighbor_each():
    positions = tower.position_waves((GRID, GRID), 128)
    for offset in (pair for heads in tower.NEIGHBORS for pair in heads):
        query, key = tower.neighbor_kernels(128, 32, GRID, offset)
        scores = (positions @ query) @ (positions @ key).T
        at = np.arange(GRID * GRID).reshape(GRID, GRID)
        inner = at[3:-3, 3:-3]
        np.testing.assert_array_equal(
            scores[inner.ravel()].argmax(1), (inner + GRID * offset[0] + offset[1]).ravel()
        )


def test_a_new_tower_attends_locally_in_its_first_blocks_alone():
    vision = VisionConfig(width=64, depth=4, heads=4, mlp_width=64, patch=7, image_size=84)
    params = tower.init_tower(vision, 0)["tower"]
    np.testing.assert_allclose(
        params["pos_embed"][-GRID * GRID :],
        tower.POSITION_SCALE * tower.position_waves((GRID, GRID), 64),
        rtol=1e-6,
    )
    positions = tower.position_waves((GRID, GRID), 64)
    middle, distances = 6 * GRID + 6, []
    for depth in range(4):
        blocks = jax.tree.map(lambda leaf, depth=depth: np.asarray(leaf[depth]), params["blocks"])
        query, key = (positions @ blocks[name]["kernel"] for name in "qk")
        for head in range(4):
            columns = slice(16 * head, 16 * head + 16)
            best = int((query[middle, columns] @ key[:, columns].T).argmax())
            distances.append(max(abs(best // GRID - 6), abs(best % GRID - 6)))
    assert distances[:12] == [1] * 8 + [2] * 4
    assert max(distances[12:]) > 2


def test_emphasis_goes_in_straight_lines_and_is_one_where_nothing_is_said():
    points = {"digit": ((10, 1), (20, 4))}
    for step, expected in ((0, 1), (10, 1), (15, 2.5), (20, 4), (99, 4)):
        weights = pictures.emphasis(points, step)
        assert weights.pop("digit") == expected
        assert set(weights.values()) == {1}
