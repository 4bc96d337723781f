"""Finding and reading checkpoints: hub, directories, every float type, damaged files, both spellings of configs."""

import json
import re

import huggingface_hub
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from parity_cases import random_tensor
from safetensors.numpy import load_file, save_file

from mllm_jax import interop
from mllm_jax.interop import families
from mllm_jax.interop.composite import read_composite
from mllm_jax.interop.families import convnext
from mllm_jax.interop.rules import SAME, Rule, patch_kernel
from mllm_jax.interop.safetensors_io import SafetensorsFile, write_safetensors, write_sharded
from mllm_jax.interop.source import Source

FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("name", FLOATS)
def test_every_float_type_reads_and_writes_as_the_reference_does(name, tmp_path):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    arrays = {
        "a": random_tensor("a", (3, 5)).astype(dtype),
        "empty": np.zeros((0, 2), dtype),
        "one": np.ones((), dtype),
    }
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_safetensors(ours, [(k, v.dtype, v.shape, lambda v=v: v) for k, v in arrays.items()])
    file = SafetensorsFile(ours)
    for key, value in arrays.items():
        assert file.tensors[key] == (dtype, value.shape)
        np.testing.assert_array_equal(file.read(key), value)
    if not name.startswith("float8"):  # the NumPy side of the reference does not write those
        save_file(arrays, theirs)
        for key, value in SafetensorsFile(theirs).tensors.items():
            assert value == file.tensors[key]
            np.testing.assert_array_equal(SafetensorsFile(theirs).read(key), arrays[key])
        loaded = load_file(ours)
        assert all(
            (loaded[key] == value).all() and loaded[key].dtype == dtype for key, value in arrays.items()
        )


def header(entries, data=b"", length=None):
    """A file from a header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "claims 0 bytes of a 0-byte file"),
        (b"\x10", "1-byte file"),
        (header({}, length=1 << 40), "claims"),
        (header(b"[1]"), "not an object"),
        (header(b"{no}"), "not JSON"),
        (header({"x": ENTRY}, b"1234"), r"'x' of shape \(2,\) does not fit its 8 bytes"),
        (header({"x": {**ENTRY, "shape": [3]}}, b"12345678"), "does not fit its 8 bytes"),
        (header({"x": {**ENTRY, "dtype": "Q4"}}, b"12345678"), "'x' has dtype 'Q4'"),
        (header({"x": {**ENTRY, "data_offsets": [8, 0]}}, b"12345678"), "does not fit"),
        (header({"x": {"dtype": "F32"}}, b"12345678"), "entry 'x' is malformed"),
        (header({"x": {**ENTRY, "shape": ["a"]}}, b"12345678"), "entry 'x' is malformed"),
    ],
)
def test_damaged_safetensors_are_named(content, message, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"model.safetensors is not a valid safetensors file: .*{message}"):
        SafetensorsFile(path)


def test_a_failed_write_leaves_no_file(tmp_path):
    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_safetensors(tmp_path / "model.safetensors", [("x", np.dtype(np.float32), (2,), fail)])
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(ValueError, match="announced as"):
        write_safetensors(
            tmp_path / "y.safetensors", [("x", np.dtype(np.float32), (2,), lambda: np.zeros(3, np.float32))]
        )


def test_shards_and_their_index(tmp_path):
    tensors = [(f"t{i}", np.dtype(np.float32), (4,), lambda i=i: np.full(4, i, np.float32)) for i in range(5)]
    write_sharded(tmp_path, tensors, limit=33)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    source = Source(tmp_path)
    assert [float(source.read(f"t{i}")[0]) for i in range(5)] == [0, 1, 2, 3, 4]
    (tmp_path / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"names {names[1]}, which is not there \(1 missing\)"):
        Source(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["t0"] = "../secret.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not a file beside it"):
        Source(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"x": np.zeros(2, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"'x' is in both a.safetensors and b.safetensors"):
        Source(tmp_path)


def test_blocks_of_mixed_dtypes_are_stacked_without_loss(tmp_path):
    from mllm_jax.interop.assemble import plan, read_tree

    save_file(
        {"b.0": np.array([1.5], np.float16), "b.1": np.array([1e-30], np.float32)}, tmp_path / "m.safetensors"
    )
    source = Source(tmp_path)
    placements, _ = plan(source, [Rule("b", "b.{i}")], {"b": (2, 1)}, lambda name: [name])
    tree = read_tree(source, placements, {"b": (2, 1)})
    assert tree["b"].dtype == np.float32
    np.testing.assert_array_equal(tree["b"][:, 0], np.array([1.5, 1e-30], np.float32))


def test_a_parameter_is_set_exactly_once(tmp_path):
    from mllm_jax.interop.assemble import plan

    names = ("b.0", "x.b.0", "y.mask")
    save_file({name: np.zeros(2, np.float32) for name in names}, tmp_path / "m.safetensors")
    source, rules, shapes = Source(tmp_path), [Rule("b", "b.{i}")], {"b": (1, 2)}
    mask = [(r"y\..*", "only pretraining uses it")]
    with pytest.raises(ValueError, match=r"'b.0' and 'x.b.0' both set 'b'"):
        plan(source, rules, shapes, lambda name: [name.removeprefix("x.")], mask)
    other = [(r"x\..*", "of another part")]
    with pytest.raises(ValueError, match=r"no row for parameter 'c'"):
        plan(source, rules, {**shapes, "c": (2,)}, lambda name: [name], mask, other)
    placements, report = plan(source, rules, shapes, lambda name: [name], mask, other)
    assert [placement.name for placement in placements] == list(report.used) == ["b.0"]
    assert report.ignored == {"x.b.0": "of another part", "y.mask": "only pretraining uses it"}


def test_transforms_are_their_own_inverse():
    for transform, shape in ((SAME, (3,)), (patch_kernel(4), (7, 3, 4, 4))):
        array = random_tensor("t", shape)
        np.testing.assert_array_equal(transform.write(transform.read(array)), array)
    # row, column, channel of a patch, in this order
    kernel = patch_kernel(2).read(np.arange(12).reshape(1, 3, 2, 2))[:, 0]
    np.testing.assert_array_equal(kernel[:6], [0, 4, 8, 1, 5, 9])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A pretended hub: records what is asked for and gives `tmp_path / "snapshot"`."""
    asked = []
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()

    def download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        if "*.bin" in allow_patterns:
            (snapshot / "pytorch_model.bin").write_bytes(b"")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked, snapshot


def test_bin_files_are_fetched_only_where_there_is_nothing_else(hub):
    asked, snapshot = hub
    assert interop.resolve_path("someone/model") == snapshot
    assert [("*.bin" in patterns) for _, patterns in asked] == [False, True]
    assert not any(pattern in patterns for _, patterns in asked for pattern in ("*.py", "*", "*.pkl"))
    (snapshot / "model.safetensors").write_bytes(b"")
    asked.clear()
    interop.resolve_path("someone/model")
    assert len(asked) == 1


def test_offline_says_the_way_out(monkeypatch, tmp_path):
    def offline(repository, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network and not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"'someone/model' is not a directory .*hf download someone/model"
    ):
        interop.resolve_path("someone/model")
    with pytest.raises(FileNotFoundError, match="is missing: not a Hugging Face checkpoint directory"):
        interop.llm_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        interop.llm_config(tmp_path)


def published(**fields):
    """What an older transformers wrote for Llama 3.1."""
    return {
        "model_type": "llama",
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        **fields,
    }


def test_both_spellings_of_rope_settings(tmp_path):
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }  # fmt: skip
    configs = []
    for fields in (
        {"rope_theta": 500000.0, "rope_scaling": scaling, "max_position_embeddings": 4096},
        {"rope_parameters": {**scaling, "rope_theta": 500000.0}, "max_position_embeddings": 4096},
    ):
        (tmp_path / "config.json").write_text(json.dumps(published(**fields)))
        configs.append(interop.llm_config(tmp_path))
    assert configs[0] == configs[1]
    assert configs[0].rope_theta == 5e5
    assert dict(configs[0].rope_scaling) == scaling


def test_the_published_llava_config_with_its_omissions(tmp_path):
    """llava-hf/llava-1.5-7b-hf leaves out whatever equals a default of transformers."""
    fields = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    composite = read_composite(tmp_path)
    model = composite.model
    assert (model.llm.width, model.llm.depth, model.llm.mlp_width, model.llm.eps) == (4096, 32, 11008, 1e-5)
    assert (model.vision.width, model.vision.depth, model.vision.activation) == (1024, 24, "quick_gelu")
    assert (model.connector, model.visual_layout.slot.num_tokens) == ("mlp2x_gelu", 576)
    assert model.make_connector().request().deepest == 23
    assert composite.vocab == 32064


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "keeps the class token"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias=False"),
        ({"text_config": {"model_type": "mamba"}}, "'mamba' is not supported"),
        ({"vision_config": {"model_type": "pixtral"}}, "'pixtral' is not supported"),
    ],
)
def test_llava_settings_that_we_do_not_compute_are_refused(change, message, tmp_path):
    fields = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {}, **change}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        read_composite(tmp_path)


VISION = {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature='cls_patch'"),
        (
            {"mm_dense_connector_type": "dci", "mm_projector_type": "linear"},
            "with mm_projector_type='linear'",
        ),
    ],
)
def test_settings_of_the_original_layout_that_we_do_not_compute_are_refused(change, message, tmp_path):
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text(json.dumps(VISION))
    fields = {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False}
    fields["mm_vision_tower"] = str(tmp_path / "tower")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_composite(tmp_path).model.connector == "mlp2x_gelu"
    (tmp_path / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(ValueError, match=message):
        read_composite(tmp_path)


@pytest.mark.parametrize(("theirs", "ours"), [("query", "query"), ("tgt", "target"), ("none", "none")])
def test_honeybees_words_for_what_is_pooled(theirs, ours, tmp_path):
    projector = {"projector_type": "d-abs", "num_query_tokens": 4, "pooled_v_target": theirs}
    fields = {"lm_config": {}, "text_config": {"model_type": "llama"}, "vision_config": VISION}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"projector_config": projector}))
    model = read_composite(tmp_path).model
    assert dict(model.connector_options)["pooled"] == ours
    assert model.visual_layout.slot.num_tokens == 4
    projector["num_feature_levels"] = 2
    (tmp_path / "config.json").write_text(json.dumps(fields | {"projector_config": projector}))
    with pytest.raises(ValueError, match="num_feature_levels=2"):
        read_composite(tmp_path)


def test_families_are_found_by_what_they_can_express():
    for table in (families.VISION, families.LLMS):
        for family in table.values():
            needed = {"architecture": "convnext_tiny", "pretrained_cfg": {"input_size": [3, 224, 224]}}
            config = family.config(needed if family is convnext.FAMILY else {})
            assert families.for_config(table, config) is family
    llama = families.LLMS["llama"]
    odd = interop.llm_config("mini").__class__(
        vocab=9, width=8, depth=1, heads=2, kv_heads=2, head_width=4, mlp_width=8, parallel=True
    )
    with pytest.raises(ValueError, match=r"no Hugging Face family \(llama, mistral"):
        families.for_config(families.LLMS, odd)
    assert llama.model_type == "llama"


def test_the_shipped_towers_load():
    config, params = interop.vision_config("mini"), interop.load_vision("mini")
    assert params["pos_embed"].shape == (144, config.width)
    assert interop.load_llm("mini", dtype=jnp.bfloat16)["embedding"].dtype == jnp.bfloat16
    assert len(interop.load_tokenizer("mini")) <= interop.llm_config("mini").vocab
    assert re.fullmatch(r".*mini_vit", str(interop.resolve_path("mini", "mini_vit")))


def test_a_sentencepiece_tokenizer_without_the_package_says_so(monkeypatch, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        OSError, match=r"tokenizer.model is a SentencePiece tokenizer: `pip install sentencepiece`"
    ):
        interop.load_tokenizer(tmp_path)
