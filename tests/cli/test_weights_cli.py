"""`mllm-jax import`, `export` and `inspect`."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mllm_jax import interop
from mllm_jax.cli.main import main
from mllm_jax.connectors import CONNECTORS
from mllm_jax.data.video_layout import Video
from mllm_jax.interop import native, special_tokens
from mllm_jax.interop.checkpoints import load_model, save_llava_hf
from mllm_jax.interop.composite import load_extras
from mllm_jax.models import mllm
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.lora import LoRA
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.models.vit import VisionConfig

VISION = VisionConfig(
    width=12, depth=4, heads=2, mlp_width=10, patch=4, image_size=16, activation="gelu_tanh", eps=1e-6,
    class_token=False, pre_norm=False, patch_bias=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
)  # fmt: skip
LLM = DecoderConfig(vocab=29, width=8, depth=2, heads=2, kv_heads=1, head_width=4, mlp_width=12)


def make(connector="mlp2x_gelu", options=(), dtype="float32"):
    """A random model."""
    config = ModelConfig(
        vision=VISION,
        llm=LLM,
        image_size=16,
        connector=connector,
        connector_options=options,
        param_dtype=dtype,
    )
    return config, tiny.random_params(mllm.abstract_params(config))


def same(a, b):
    """Equal trees, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["orbax", "safetensors", "llava-hf"])
def test_export_then_import_is_the_identity(form, dtype, tmp_path, capsys):
    config, params = make(dtype=dtype)
    native.save_native(tmp_path / "model", config, params)
    assert (
        main(["export", "--from", str(tmp_path / "model"), "--format", form, "--to", str(tmp_path / "out")])
        == 0
    )
    assert main(["import", "--from", str(tmp_path / "out"), "--to", str(tmp_path / "back")]) == 0
    again, back, _ = load_model(tmp_path / "back")
    same(back, params)
    kept = {"dtype": again.dtype, "param_dtype": again.param_dtype}
    assert again == config or again == config.__class__(**{**vars(config), **kept})
    output = capsys.readouterr().out
    assert "written to" in output
    assert f"as `{form}` by mllm-jax" in (tmp_path / "out" / "README.md").read_text()
    # nothing is overwritten
    assert main(["import", "--from", str(tmp_path / "out"), "--to", str(tmp_path / "back")]) == 1
    assert "exists; choose another directory" in capsys.readouterr().err


def test_llavas_own_layout_names_a_tower(tmp_path, capsys):
    """Which a model directory does not record; options of a connector are refused by name, and videos' said."""
    config, params = make("dci")
    config = dataclasses.replace(config, video=Video(4, pool="none", time="mean"))
    native.save_native(tmp_path / "model", config, params, aspect="square")
    whole = tiny.random_params(mllm.abstract_params(dataclasses.replace(config, select_layer=-1)))
    interop.save_vision(tmp_path / "tower", config.vision, whole["vision"])
    export = ["export", "--from", str(tmp_path / "model"), "--to", str(tmp_path / "out"), "--format"]
    assert main([*export, "llava"]) == 1
    assert "give --tower NAME" in capsys.readouterr().err
    assert main([*export, "safetensors", "--tower", "tower"]) == 1
    assert "--tower says nothing" in capsys.readouterr().err
    assert main([*export, "llava", "--tower", str(tmp_path / "tower")]) == 0
    assert (
        "tell whoever loads it: video.frames=4, video.sampling='segments', video.pool='none', video.time='mean'"
        in (" ".join(capsys.readouterr().out.split()))
    )
    again, back, _ = load_model(tmp_path / "out")
    same(back, params)
    assert again.make_connector().request() == config.make_connector().request()
    assert load_extras(tmp_path / "out") == {"aspect": "square"}
    config, params = make("dci", (("learnable", True),))
    native.save_native(tmp_path / "learnable", config, params)
    export[2], export[4] = str(tmp_path / "learnable"), str(tmp_path / "no")
    assert main([*export, "llava", "--tower", str(tmp_path / "tower")]) == 1
    assert "cannot say model.connector.dci.learnable=True" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "no").exists()


def test_import_records_any_name_of_a_template(tmp_path, capsys):
    native.save_native(tmp_path / "model", *make())
    begin = ["import", "--from", str(tmp_path / "model"), "--to"]
    assert main([*begin, str(tmp_path / "dated"), "--template", "chat@2025-01-31"]) == 0
    assert native.load_extras(tmp_path / "dated") == {"template": "chat@2025-01-31"}
    for name, message in (("vicuna", "did you mean 'vicuna_v1'"), ("chat@soon", "'soon' is not a day")):
        with pytest.raises(SystemExit):
            main([*begin, str(tmp_path / "no"), "--template", name])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("form", ["orbax", "safetensors", "llava-hf"])
def test_a_dtype_that_is_asked_for_is_recorded(form, tmp_path):
    native.save_native(tmp_path / "model", *make())
    export = ["export", "--from", str(tmp_path / "model"), "--format", form, "--dtype", "bfloat16"]
    assert main([*export, "--to", str(tmp_path / "out")]) == 0
    assert load_model(tmp_path / "out")[0].dtype == "bfloat16"
    back = ["import", "--from", str(tmp_path / "out"), "--to", str(tmp_path / "back"), "--dtype", "float16"]
    assert main(back) == 0
    config, params, _ = load_model(tmp_path / "back")
    assert (config.dtype, config.param_dtype) == ("float16", "float16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float16"}


# mixed options: tuples, nested values, defaults
OPTIONS = {
    "average_pool": (("tokens", 4),),
    "c_abstractor": (("depth", 1), ("hidden", 8), ("tokens", 4)),
    "dci": (("edges", (0, 2, 4)),),
}


@pytest.mark.parametrize("connector", OPTIONS)
@pytest.mark.parametrize("form", ["orbax", "safetensors"])
def test_every_form_keeps_connectors_and_their_options(connector, form, tmp_path):
    assert connector in CONNECTORS
    config, params = make(connector, OPTIONS[connector])
    native.save_native(tmp_path, config, params, form)
    assert native.load_config(tmp_path) == config
    assert hash(native.load_config(tmp_path)) == hash(config)
    same(native.load_params(tmp_path), params)
    same(native.load_params(tmp_path, "connector"), params["connector"])


def test_a_model_directory_serves_as_tower_and_llm(tmp_path):
    config, params = make()
    native.save_native(tmp_path, config, params)
    assert interop.vision_config(tmp_path) == VISION
    assert interop.llm_config(tmp_path) == LLM
    same(interop.load_llm(tmp_path), params["llm"])
    same(interop.load_vision(tmp_path), params["vision"])
    shallow = interop.load_vision(tmp_path, depth=1)
    same(shallow["blocks"], jax.tree.map(lambda x: x[:1], params["vision"]["blocks"]))
    with pytest.raises(ValueError, match="4 blocks asked for, the stored tower has 3"):
        interop.load_vision(tmp_path, depth=4)
    with pytest.raises(FileExistsError):
        native.save_native(tmp_path, config, params)


def test_shardings_and_dtype_at_loading(tmp_path):
    config, params = make()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for form in ("orbax", "safetensors"):
        native.save_native(tmp_path / form, config, params, form)
        loaded = native.load_params(tmp_path / form, None, lambda path, shape: here, jnp.bfloat16)
        assert all(
            isinstance(leaf, jax.Array) and leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(loaded)
        )
        expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        same(jax.device_get(loaded), expected)


def test_a_directory_that_does_not_fit_its_description(tmp_path):
    config, params = make()
    del params["connector"]["layer_1"]["bias"]
    native.save_native(tmp_path, config, params)
    with pytest.raises(ValueError, match=r"'connector/layer_1/bias' is stored as None, but \(8,\)"):
        native.load_params(tmp_path)
    fields = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**fields, "flavour": 1}))
    with pytest.raises(ValueError, match="has no field 'flavour'"):
        native.load_config(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({**fields, "format": 2}))
    with pytest.raises(ValueError, match="format 2; this version of mllm-jax reads 1"):
        native.load_config(tmp_path)


def test_one_part_out_and_in(tmp_path, capsys):
    config, params = make()
    native.save_native(tmp_path / "model", config, params)
    for form in ("llm", "vision"):
        assert (
            main(
                ["export", "--from", str(tmp_path / "model"), "--format", form, "--to", str(tmp_path / form)]
            )
            == 0
        )
        target = tmp_path / f"{form}-16"
        code = main(["import", "--from", str(tmp_path / form), "--to", str(target), "--dtype", "bfloat16"])
        assert code == 0
    same(interop.load_llm(tmp_path / "llm"), params["llm"])
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    same(interop.load_llm(tmp_path / "llm-16"), halved["llm"])
    same(interop.load_vision(tmp_path / "vision-16"), halved["vision"])
    assert interop.llm_config(tmp_path / "llm-16") == LLM
    capsys.readouterr()


def test_inspect(tmp_path, capsys):
    config, params = make()
    native.save_native(tmp_path / "model", config, params)
    save_llava_hf(tmp_path / "hf", config, params)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    for name, what in (
        ("model", "mllm-jax model directory"),
        ("hf", "multimodal checkpoint, llava-hf (siglip"),
    ):
        assert main(["inspect", str(tmp_path / name)]) == 0
        output = capsys.readouterr().out
        assert what in output
        assert "visual_tokens_per_image 16" in output
        assert main(["inspect", str(tmp_path / name), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        extra = 2 * LLM.width if name == "hf" else 0  # the row of <image> in embedding and head
        assert found["parameters"] == total + extra
        assert found["bytes"] == 4 * (total + extra)
        assert found["geometry"].keys() == {"model", "vision", "llm"}
        rows = {module["module"]: module for module in found["modules"]}
        assert rows["vision/blocks/q"]["parameters"] == 3 * (12 * 12 + 12)
        assert rows["llm/embedding"]["dtype"] == "float32"
    assert main(["inspect", "mini"]) == 0
    output = capsys.readouterr().out
    assert "vision/blocks" in output
    assert "llm/embedding" in output
    (tmp_path / "config.json").write_text("{}")
    assert main(["inspect", str(tmp_path)]) == 1
    assert "model_type None is not supported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"), [("resample", [1]), ("size", {"shortest_edge": "x"}), ("image_mean", "x")]
)
@pytest.mark.parametrize("verb", ["import", "export", "import --part vision", "export --format vision"])
def test_a_malformed_image_processor_is_named_before_anything_is_written(verb, key, value, tmp_path, capsys):
    native.save_native(tmp_path / "native", *make())
    save_llava_hf(tmp_path / "hf", *make())
    source = tmp_path / ("native" if verb.startswith("export") else "hf")
    file = source / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert main([*verb.split(), "--from", str(source), "--to", str(tmp_path / "out")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "preprocessor_config.json" in said.replace(" ", "")
    assert f"{key}=" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("save", [native.save_native, save_llava_hf])
def test_nothing_is_written_beside_a_malformed_image_processor(save, tmp_path):
    with pytest.raises(ValueError, match="resample"):
        save(tmp_path / "out", *make(), processor={"resample": [1]})
    config, params = make()
    with pytest.raises(ValueError, match="resample"):
        interop.save_vision(tmp_path / "out", config.vision, params["vision"], processor={"resample": [1]})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("adapter", ["--dtype", "bfloat16"]),
        ("llava-hf-adapter", ["--dtype", "bfloat16"]),
        ("adapter", ["--keep-adapters"]),
        ("llm", ["--base", "x"]),
    ],
)
def test_export_refuses_options_that_it_would_ignore(form, options, tmp_path, capsys):
    native.save_native(tmp_path / "model", *make())
    where = ["--from", str(tmp_path / "model"), "--to", str(tmp_path / "out")]
    assert main(["export", *where, "--format", form, *options]) == 1
    assert f"{options[0]} says nothing for --format {form}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_messages(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    assert main(["import", "--from", str(tmp_path / "a"), "--to", str(tmp_path / "b")]) == 1
    assert "config.json is missing: not a Hugging Face checkpoint" in capsys.readouterr().err
    config, params = make("average_pool", (("tokens", 4),))
    native.save_native(tmp_path / "pool", config, params)
    assert main(["export", "--from", str(tmp_path / "pool"), "--to", str(tmp_path / "c")]) == 1
    assert "cannot compute connector 'average_pool'" in capsys.readouterr().err
    assert (
        main(["export", "--from", str(tmp_path / "pool"), "--format", "adapter", "--to", str(tmp_path / "c")])
        == 1
    )
    assert "has no LoRA adapters" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_lora_settings_survive_json():
    assert native._value("lora", LoRA | None, json.loads(json.dumps(vars(LoRA(rank=3))))) == LoRA(rank=3)


def test_no_torch_is_needed(run_script, tmp_path):
    """`run_script` runs where torch cannot be imported."""
    config, params = make()
    save_llava_hf(tmp_path / "hf", config, params)
    for command in (
        ("import", "--from", tmp_path / "hf", "--to", tmp_path / "ours"),
        ("export", "--from", tmp_path / "ours", "--to", tmp_path / "again", "--format", "llava-hf"),
    ):
        done = run_script("-m", "mllm_jax", *command)
        assert done.returncode == 0, done.stderr
    same(load_model(tmp_path / "again")[1], params)


def test_tokenizer_files_are_those_of_transformers_4_and_5(tiny_tokenizer, tmp_path):
    """Transformers 5 names a class, and a kind of list, that 4 does not know."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<extra>"]})
    special_tokens.save_tokenizer(tmp_path, tokenizer)
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(fields.get("extra_special_tokens"), list)
    again = interop.load_tokenizer(tmp_path)
    assert again("a<extra></s>").input_ids == tokenizer("a<extra></s>").input_ids
    assert "<extra>" in again.all_special_tokens
