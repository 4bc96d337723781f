"""Parameter and token counts at true sizes, by shapes alone: nothing is allocated."""

import pytest
from connector_testing import abstract_params, count

from mllm_jax import connectors


def clip(side=24):
    return connectors.VisionSpec(1024, 24, 23, (side, side))


SIGLIP = connectors.VisionSpec(1152, 27, 26, (27, 27))


def parameters_of(name, vision, llm, options=None):
    return count(abstract_params(connectors.create(name, vision, llm, options), vision.grid))


# Reference 2.8: linear 1024, mlp2 1024, mlp2 1152, mlp2 3072, mlp2 3456.
@pytest.mark.parametrize(
    ("llm", "expected"),
    [
        (2560, (2_624_000, 9_180_160, 9_507_840, 14_423_040, 15_406_080)),
        (4096, (4_198_400, 20_979_712, 21_504_000, 29_368_320, 30_941_184)),
        (5120, (5_248_000, 31_467_520, 32_122_880, 41_953_280, 43_919_360)),
        (7168, (7_347_200, 58_734_592, 59_652_096, 73_414_656, 76_167_168)),
        (8192, (8_396_800, 75_513_856, 76_562_432, 92_291_072, 95_436_800)),
    ],
)
def test_token_wise_projectors(llm, expected):
    rows = [
        ("linear", clip()),
        ("mlp2x_gelu", clip()),
        ("mlp2x_gelu", SIGLIP),
        ("sci", clip()),
        ("dci", SIGLIP),
    ]
    assert tuple(parameters_of(name, vision, llm) for name, vision in rows) == expected
    assert parameters_of("dci", clip(), llm) == expected[3]
    assert parameters_of("sci", SIGLIP, llm) == expected[4]
    for name in ("sti", "average_pool"):
        assert parameters_of(name, clip(), llm) == expected[1]
    assert parameters_of("mlp2x_gelu", clip(), llm, {"reduction": 2}) == expected[1]


@pytest.mark.parametrize(("tokens", "expected"), [(64, 104_796_160), (144, 104_857_600)])
def test_q_former(tokens, expected):
    assert parameters_of("q_former", clip(), 4096, {"tokens": tokens}) == expected
    next_norms, mlp2 = 2 * 1024 + 2 * 768, 768 * 4096 + 4096 + 4096 * 4096 + 4096
    bert = expected - (768 * 4096 + 4096)
    assert (
        parameters_of("q_former", clip(), 4096, {"tokens": tokens, "variant": "next"})
        == bert + next_norms + mlp2
    )


@pytest.mark.parametrize(("llm", "expected"), [(4096, 36_808_192), (5120, 47_296_000)])
def test_c_abstractor(llm, expected):
    assert parameters_of("c_abstractor", clip(), llm, {"position_table": False}) == expected
    for side, table in ((16, 262_144), (24, 589_824), (32, 1_048_576)):
        assert parameters_of("c_abstractor", clip(side), llm) == expected + table


def test_c_abstractor_on_siglip_has_one_shortcut_and_a_wider_squeeze():
    block = 2_638_080  # 1024 -> 1024
    first = 1152 * 1024 + 9 * 1024 + (1024 * 288 + 288) + (288 * 1024 + 1024) + 1024 * 1024 + 3 * 2048
    first += 1152 * 1024 + 2048
    readout = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    expected = first + 5 * block + readout
    assert parameters_of("c_abstractor", SIGLIP, 4096, {"position_table": False}) == expected


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("sti", {"learnable": True}, 20_979_712 + 8 * 1024 * 1024 + 1024),
        ("sci", {"learnable": True}, 29_368_320 + 9 * 1024 * 1024 + 1024),
        ("dci", {"learnable": True}, 29_368_320 + 1024 * 1024 + 3 * 1024),
        ("dci", {"groups": 3}, 4 * 1024 * 4096 + 4096 + 4096 * 4096 + 4096),
        ("resampler", {}, 106_077_184 + 64 * 1024),
        # Linear to D, latents, 3 x (2 + 1 LayerNorms, q, k, v, out of width 512, MLP 4 D), final LayerNorm
        (
            "perceiver",
            {},
            4_198_400 + 128 * 4096 + 3 * (6 * 4096 + 4 * 512 * 4096 + 8 * 4096 * 4096) + 2 * 4096,
        ),
        (
            "perceiver",
            {"variant": "next", "tokens": 32},
            32 * 1024 + 3 * (6 * 1024 + 4 * 512 * 1024 + 8 * 1024 * 1024) + 2 * 1024 + 20_979_712,
        ),
        # 6 layers of self-attention (4), value and output (2), offsets, weights, MLP (2), 3 LayerNorms
        (
            "d_abstractor",
            {},
            6 * (8 * (1024 * 1024 + 1024) + (1024 * 64 + 64) + (1024 * 32 + 32) + 6 * 1024)
            + (576 + 144) * 1024
            + 144 * 2
            + (1024 * 4096 + 4096),
        ),
        ("pixel_shuffle", {}, 2 * 4096 + 2 * (4096 * 4096 + 4096)),
        ("pixel_shuffle", {"variant": "idefics3"}, 4 * 1024 * 4096),
        # per block: depthwise, two LayerNorms, squeeze and excite by 1024, 1x1
        (
            "ldp",
            {},
            20_979_712 + 2 * (9 * 4096 + 4 * 4096 + 2 * 4096 * 1024 + 1024 + 4096 + 4096 * 4096),
        ),
        ("ldpv2", {}, 20_979_712 + 9 * 4096 + 4096),
        (
            "token_packer",
            {},
            1024 * 1024
            + 2 * (4096 * 1024 + 1024 + 1024 * 1024 + 1024)
            + 3 * 2048
            + 4 * (1024 * 1024 + 1024)
            + 20_979_712,
        ),
    ],
)
def test_others_from_their_definitions(name, options, expected):
    assert parameters_of(name, clip(), 4096, options) == expected


def test_token_counts_at_224_336_448():
    expected = {
        "linear": (256, 576, 1024),
        "mlp2x_gelu": (256, 576, 1024),
        "sti": (320, 720, 1280),
        "sci": (256, 576, 1024),
        "dci": (256, 576, 1024),
        "average_pool": (144, 144, 144),
        "q_former": (144, 144, 144),
        "resampler": (64, 64, 64),
        "perceiver": (128, 128, 128),
        "c_abstractor": (144, 144, 144),
        "d_abstractor": (144, 144, 144),
        "pixel_shuffle": (64, 144, 256),
        "ldp": (64, 144, 256),
        "ldpv2": (144, 144, 144),
        "token_packer": (64, 144, 256),
    }
    for name, counts in expected.items():
        grids = [(side, side) for side in (16, 24, 32)]
        found = tuple(connectors.create(name, clip(g[0]), 4096).num_tokens(g) for g in grids)
        assert found == counts, name
