"""Every key of a config.json that changes the computation is read, or refused by name: no key is ignored in silence."""

import dataclasses
import json

import pytest

from mllm_jax import interop
from mllm_jax.data.video_layout import Video
from mllm_jax.interop import families, llava_fields, video_fields
from mllm_jax.interop.composite import LLAVA_HF, read_composite
from mllm_jax.interop.families import convnext
from mllm_jax.interop.families.base import INERT, OFF, _defaults
from mllm_jax.limits import LimitError

# timm's ConvNeXt has no class in transformers; test_mini_gemini.py has its keys.
TABLES = {k: family for k, family in {**families.VISION, **families.LLMS}.items() if k != convnext.MODEL_TYPE}
# Values for keys whose meaning hangs on others, or that a change by type alone would leave invalid.
CHANGES = {
    "sliding_window": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0},
    "layer_types": {"layer_types": ["chunked_attention"]},
    "rope_parameters": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "mlp_ratio": {"mlp_ratio": 2},
    "num_patches": {"num_patches": 64},
    "attn_logit_softcapping": {"attn_logit_softcapping": 3.0},
    "qkv_bias": {"qkv_bias": False},
}


def other(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2
    if isinstance(value, str):
        return "gelu" if value != "gelu" else "silu"
    return 1 if value is None else value


def keys():
    return [
        pytest.param(model_type, key, id=f"{model_type}-{key}")
        for model_type in TABLES
        for key in sorted(_defaults(model_type).keys() - INERT)
    ]


@pytest.mark.parametrize(("model_type", "key"), keys())
def test_no_key_of_transformers_class_is_ignored(model_type, key):
    family, default = TABLES[model_type], _defaults(model_type)[key]
    change = CHANGES.get(key, {key: other(default)})
    if key == "layer_types":
        change = {"layer_types": change["layer_types"] * len(default)}
    before = family.config({})
    try:
        after = family.config(change)
    except ValueError as error:
        assert key in str(error) or "fit each other" in str(error), error  # noqa: PT017
        return
    assert after != before, f"{key}={change[key]!r} changes nothing"


@pytest.mark.parametrize("key", sorted(OFF))
def test_what_no_family_here_has_is_refused(key):
    with pytest.raises(ValueError, match=rf"{key}=.* is not supported"):
        families.LLMS["llama"].config({key: {"bits": 4} if key == "quantization_config" else 7})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type 'dynamic'",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1]}},
            "mrope_section",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"num_hidden_layers": 10**9}, "MLLM_JAX_MAX_LAYERS"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers='many' must be a whole number"),
        ({"hidden_size": -4}, "hidden_size=-4 must be positive"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"vocab_size": 10**12}, "MLLM_JAX_MAX_VOCABULARY"),
        ({"num_attention_heads": 8, "num_key_value_heads": 5, "head_dim": 4}, "do not fit each other"),
        ({"rms_norm_eps": float("nan")}, "eps=nan is not a number"),
        ({"rms_norm_eps": 7.0}, "eps is 7.0"),
        ({"rope_theta": 1e308}, "rope_theta=1e.308 is not a number"),
        ({"num_labels": 10**9, "hidden_act": "x"}, "hidden_act='x'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}}, "rope_parameters"),
        ({"hidden_act": "relu6"}, "hidden_act='relu6'"),
    ],
)
def test_settings_of_llms_that_we_do_not_compute(change, message):
    with pytest.raises(ValueError, match=message):
        families.LLMS["llama"].config(change)


@pytest.mark.parametrize("value", [["llama"], {}, 3, None])
def test_a_type_that_is_no_name_gives_a_message(value, tmp_path):
    with pytest.raises(ValueError, match="model_type"):
        llava_hf(tmp_path, text_config={**TEXT, "model_type": value or "no"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": value}))
    with pytest.raises(ValueError, match="model_type"):
        interop.llm_config(tmp_path)


def test_an_image_of_a_billion_pixels_is_refused_and_the_limit_can_be_raised(monkeypatch):
    fields = {"image_size": 32768, "patch_size": 16384}
    with pytest.raises(
        LimitError, match=r"image_size: 32,768 pixels per side .* MLLM_JAX_MAX_IMAGE_SIDE=32768"
    ):
        families.VISION["clip_vision_model"].config(fields)
    monkeypatch.setenv("MLLM_JAX_MAX_IMAGE_SIDE", "32768")
    assert families.VISION["clip_vision_model"].config(fields).image_size == 32768


VISION = {
    "model_type": "clip_vision_model", "image_size": 56, "patch_size": 14, "hidden_size": 8, "num_attention_heads": 2,
    "num_hidden_layers": 4, "intermediate_size": 8,
}  # fmt: skip
TEXT = {
    "model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 8, "vocab_size": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("table", "fields"), [(families.VISION, VISION), (families.LLMS, TEXT)], ids=["vision", "llm"]
)
def test_a_billion_layers_are_refused_and_the_limit_can_be_raised(table, fields, monkeypatch):
    family = table[fields["model_type"]]
    with pytest.raises(LimitError, match=r"1,000,000,000 layers .* MLLM_JAX_MAX_LAYERS=1000000000"):
        family.config(fields | {"num_hidden_layers": 10**9})
    monkeypatch.setenv("MLLM_JAX_MAX_LAYERS", "2000")
    assert family.config(fields | {"num_hidden_layers": 2000}).depth == 2000


def llava_hf(directory, **changes):
    """A llava-hf config.json, read."""
    fields = {"model_type": "llava", "vision_config": VISION, "text_config": TEXT, **changes}
    (directory / "config.json").write_text(json.dumps(fields))
    return read_composite(directory).model


BAD_LLAVA_HF = {
    "multimodal_projector_bias": False,
    "projector_hidden_act": "relu",
    "vision_feature_select_strategy": "full",
    "vision_feature_layer": "last",
    "quantization_config": {"bits": 4},
    "image_grid_pinpoints": [[336, 672]],
    "use_image_newline_parameter": True,
    "vision_aspect_ratio": "anyres_max_9",
    "spatial_merge_size": 2,
}


@pytest.mark.parametrize("key", BAD_LLAVA_HF)
def test_llava_hf_keys_are_refused_by_name(key, tmp_path):
    llava_hf(tmp_path)
    with pytest.raises(ValueError, match=key):
        llava_hf(tmp_path, **{key: BAD_LLAVA_HF[key]})


@pytest.mark.parametrize(
    ("kind", "name"), [("llava", "Llava"), ("llava_next", "LlavaNext"), ("llava_onevision", "LlavaOnevision")]
)
def test_every_key_of_transformers_llava_is_classified(kind, name):
    transformers = pytest.importorskip("transformers")
    parts = {"vision_config", "text_config"}
    tokens = {
        "image_token_index",
        "image_seq_length",
        "video_token_index",
    }  # of the tokenizer: see special_tokens
    read = {"vision_feature_select_strategy", "vision_feature_layer", "tie_word_embeddings"}
    if kind != "llava":
        read |= {"image_grid_pinpoints", "vision_aspect_ratio"}
    known = INERT | parts | tokens | read | LLAVA_HF[kind].keys()
    assert not getattr(transformers, f"{name}Config")().to_dict().keys() - known
    assert LLAVA_HF["llava"].keys() <= BAD_LLAVA_HF.keys()


BAD_TILES = {
    ("llava_next", "vision_aspect_ratio"): "anyres_max_9",
    ("llava_next", "use_image_newline_parameter"): False,
    ("llava_next", "image_grid_pinpoints"): [[336, 600]],  # no multiples of this tower's 56 pixels
    ("llava_next", "multimodal_projector_bias"): False,
    ("llava_onevision", "vision_aspect_ratio"): "pad",
    ("llava_onevision", "image_grid_pinpoints"): 7,
    ("llava_onevision", "quantization_config"): {"bits": 4},
}


@pytest.mark.parametrize(("kind", "key"), BAD_TILES)
def test_keys_of_tiles_are_refused_by_name(kind, key, tmp_path):
    strategy = {
        "model_type": kind,
        "vision_feature_select_strategy": "default",
        "image_grid_pinpoints": [[56, 112]],
    }
    assert llava_hf(tmp_path, **strategy).tiles.pinpoints == ((2, 1),)
    with pytest.raises(ValueError, match=key):
        llava_hf(tmp_path, **{**strategy, key: BAD_TILES[kind, key]})


def test_llava_hf_keys_that_are_read(tmp_path):
    base = llava_hf(tmp_path)
    assert llava_hf(tmp_path, vision_feature_layer=-1) == dataclasses.replace(base, select_layer=-1)
    assert llava_hf(tmp_path, vision_feature_layer=[-2, 1]).connector == "sci"
    assert llava_hf(tmp_path, tie_word_embeddings=True).llm.tied
    assert llava_hf(tmp_path, text_config={**TEXT, "tie_word_embeddings": True}).llm.tied


def llava(directory, **changes):
    """A config.json in LLaVA's own layout, read."""
    (directory / "tower").mkdir(exist_ok=True)
    (directory / "tower" / "config.json").write_text(json.dumps(VISION))
    fields = {
        **TEXT,
        "model_type": "llava_llama",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "somewhere/else/tower",  # beside the checkpoint, whatever the path says
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": [[336, 672]],
        "mm_projector_lr": None,
        "mm_hidden_size": 8,
        "tune_mm_mlp_adapter": False,
        "mm_patch_merge_type": "flat",
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(fields))
    return read_composite(directory).model


BAD_LLAVA = {
    "mm_vision_select_feature": "cls_patch",
    "mm_use_im_start_end": True,
    "mm_use_im_patch_token": True,
    "mm_resampler_type": "spatial_pool",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_spatial_pool_mode": "conv",
    "mm_spatial_pool_stride": 0,
    "mm_newline_position": "row",
    "image_aspect_ratio": "highres",
    "s2": True,
    "s2_scales": "336,672",
    "add_faster_video": True,
    "use_pos_skipping": True,
    "mm_vision_tower_aux": 7,
    "image_size_aux": 768,
    "image_grid": 2,
    "image_global": True,
    "mm_dense_connector_type": "DCI",
    "mm_vision_select_layer": [-2, -5],
    "mm_of_tomorrow": "new",
}


@pytest.mark.parametrize("key", BAD_LLAVA)
def test_llava_keys_are_refused_by_name(key, tmp_path):
    assert llava(tmp_path).connector == "mlp2x_gelu"
    with pytest.raises(ValueError, match=key):
        llava(tmp_path, **{key: BAD_LLAVA[key]})


@pytest.mark.parametrize("value", [0, 0.0])
def test_zero_is_not_off(value, tmp_path):
    with pytest.raises(ValueError, match="mm_of_tomorrow"):
        llava(tmp_path, mm_of_tomorrow=value)


def test_every_llava_key_has_its_case():
    assert llava_fields.SUPPORTED.keys() | set(video_fields.KEYS) <= BAD_LLAVA.keys()


def test_llava_keys_that_are_read(tmp_path):
    assert llava(tmp_path, mm_dense_connector_type="dci").connector == "dci"
    assert llava(tmp_path, mm_dense_connector_type="none").connector == "mlp2x_gelu"
    assert llava(tmp_path, mm_projector_type=None).connector == "linear"
    assert llava(tmp_path, mm_vision_select_layer=-1).select_layer == -1


ANYRES = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[56, 112]],
}
POOL, STRIDE, NEWLINE = video_fields.KEYS


@pytest.mark.parametrize(
    ("fields", "video"),
    [
        ({}, None),
        ({STRIDE: 2, NEWLINE: "one_token"}, None),  # LLaVA-NeXT cannot read videos without a pool either
        ({**ANYRES, POOL: "bilinear"}, Video(32, "linspace", "bilinear2d", newline="one_token")),
        ({POOL: "bilinear", NEWLINE: "one_token"}, Video(32, "linspace", "bilinear2d")),  # it has no newline
        (ANYRES | {POOL: "average", STRIDE: 3, NEWLINE: "grid"}, Video(32, "linspace", "average2d", 3, newline="grid")),
        ({POOL: "max", STRIDE: 1, NEWLINE: "no_token"}, Video(32, "linspace", "none")),
    ],
)  # fmt: skip
def test_how_llava_next_reads_videos(fields, video, tmp_path):
    model = llava(tmp_path, **fields)
    assert model.video == video
    if video is not None:
        again = dict.fromkeys(video_fields.KEYS) | video_fields.write_llava(video)
        assert llava(tmp_path, **fields | again).video == video
    assert video_fields.unsaid(video, model.video) == {}
    assert video_fields.unsaid(Video(32, "linspace", "max1d"), model.video).get("pool") == "max1d"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({POOL: "average", NEWLINE: "grid"}, f"{NEWLINE}='grid' needs the learned newline"),
        ({**ANYRES, POOL: "max", "image_aspect_ratio": "anyres_max_9"}, f"{POOL}='max': video.pool takes the max"),
        ({POOL: "max", STRIDE: 9}, f"{POOL}='max': video.window=9 is wider"),
    ],
)  # fmt: skip
def test_videos_of_llava_next_that_cannot_be(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        llava(tmp_path, **fields)


def test_what_pools_videos_before_the_projector_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"llava_next_video.*spatial_pool_mode='average'.*before the projector.*--part"
    ):
        llava_hf(tmp_path, model_type="llava_next_video")


def test_the_class_says_which_llm_a_llava_has(tmp_path):
    """As OneVision's own config.json, whose model_type is just "llava"."""
    assert not llava(tmp_path, model_type="llava", architectures=["LlavaLlamaForCausalLM"]).llm.qkv_bias
    assert llava(tmp_path, model_type="llava", architectures=["LlavaQwenForCausalLM"]).llm.qkv_bias
    with pytest.raises(ValueError, match=r"architectures=.*Mixtral"):
        llava(tmp_path, model_type="llava", architectures=["LlavaMixtralForCausalLM"])


@pytest.mark.parametrize("value", [None, 3, ["a"], ""])
def test_a_tower_that_is_no_name(value, tmp_path):
    with pytest.raises(ValueError, match=r"mm_vision_tower=.* must be the name"):
        llava(tmp_path, mm_vision_tower=value)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (
            {"image_mean": [0.5, 0.5], "image_std": [1, 1, 1]},
            r"image_mean=\[0.5, 0.5\] must be three numbers",
        ),
        ({"image_mean": [0.5] * 3, "image_std": [1, 0, 1]}, "image_std=.* must not be zero"),
        ({"image_mean": [0.5] * 3, "image_std": "none"}, "image_std='none'"),
        ({"image_mean": [0.5] * 3}, "image_std=None"),
    ],
)
def test_an_image_processor_that_cannot_be_right(processor, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match=message):
        llava_hf(tmp_path)
