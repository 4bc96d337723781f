"""What a stage trained in a llava-hf model, as PEFT writes it: names, config, and the same model again."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import tiny

from mllm_jax.cli.export import load_any
from mllm_jax.cli.main import main
from mllm_jax.data.anyres import Tiles
from mllm_jax.data.video_layout import Video
from mllm_jax.interop.checkpoints import load_model, merged_model, save_llava_hf
from mllm_jax.interop.llava_adapter import save_llava_adapter
from mllm_jax.interop.peft_export import save_model_adapter
from mllm_jax.interop.source import Source
from mllm_jax.models import lora, mllm
from mllm_jax.models.lora import LoRA
from mllm_jax.models.paths import flatten, unflatten

TARGETS = r"llm/blocks/(q|down)/kernel|vision/blocks/(q|out|fc2)/kernel"
TOWER, LLM = "base_model.model.model.vision_tower.", "base_model.model.model.language_model."
PROJECTOR = "base_model.model.model.multi_modal_projector."


def run(*arguments):
    """One command that must succeed."""
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory, tiny_data, tiny_model):
    """(a llava-hf model, a run of two steps that began with it), with its deepest block unused."""
    root = tmp_path_factory.mktemp("peft")
    model = dataclasses.replace(tiny_model, connector="mlp2x_gelu", connector_options=(), select_layer=-2)
    params = tiny.random_params(mllm.abstract_params(model))
    save_llava_hf(root / "hf", model, params, tiny.make_tokenizer(), image_token_index=259)
    save_llava_hf(root / "grown", model, params)  # with a row for an image token
    run("import", "--from", root / "hf", "--to", root / "base")
    config = tiny.recipe({"vision": root / "base", "llm": root / "base"}, tiny_data)
    config.model.connector.name, config.model.connector.path = "mlp2x_gelu", str(root / "base")
    config.model.vision.select_layer = -2
    config.data.seq_len = 160
    del config.stages["pretrain"]
    config.stage_order = ("finetune",)
    stage = config.stages.finetune
    stage.trainable = ("connector/.*", "llm/embedding")
    stage.lora.rank, stage.lora.alpha, stage.lora.dropout, stage.lora.targets = 2, 6.0, 0.25, TARGETS
    stage.steps = 2
    train.train(config, root / "run", evaluate=False)
    return root / "hf", root / "run"


def expected_tensors(params):
    """{name in PEFT's file: array}, by hand."""
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    tensors = {f"{LLM}embed_tokens.weight": flat["llm/embedding"]}
    for ours, theirs in (("layer_0", "linear_1"), ("layer_1", "linear_2")):
        tensors[f"{PROJECTOR}{theirs}.weight"] = flat[f"connector/{ours}/kernel"].T
        tensors[f"{PROJECTOR}{theirs}.bias"] = flat[f"connector/{ours}/bias"]
    for part, place, modules in (
        (
            "vision",
            f"{TOWER}encoder.layers",
            {"q": "self_attn.q_proj", "out": "self_attn.out_proj", "fc2": "mlp.fc2"},
        ),
        ("llm", f"{LLM}layers", {"q": "self_attn.q_proj", "down": "mlp.down_proj"}),
    ):
        for ours, theirs in modules.items():
            for letter in "ab":
                stack = flat[f"{part}/blocks/{ours}/lora_{letter}"]
                for i, matrix in enumerate(stack):
                    tensors[f"{place}.{i}.{theirs}.lora_{letter.upper()}.weight"] = matrix.T
    return tensors


@pytest.mark.slow
def test_a_trained_stage_as_peft_has_it_and_back(trained, tmp_path, capsys):
    base, directory = trained
    model, params, _ = load_any(str(directory))
    adapter = tmp_path / "adapter"
    run("export", "--from", directory, "--format", "llava-hf-adapter", "--base", base, "--to", adapter)
    assert sorted(path.name for path in adapter.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    source = Source(adapter, [adapter / "adapter_model.safetensors"])
    expected = expected_tensors(params)
    assert set(source) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(source.read(name), array, name)
    assert np.abs(expected[f"{TOWER}encoder.layers.0.mlp.fc2.lora_B.weight"]).max() > 0  # it was trained

    fields = json.loads((adapter / "adapter_config.json").read_text())
    assert {key: fields[key] for key in ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias")} == {
        "peft_type": "LORA", "r": 2, "lora_alpha": 6.0, "lora_dropout": 0.25, "use_rslora": False, "bias": "none",
    }  # fmt: skip
    assert fields["base_model_name_or_path"] == str(base)
    assert fields["modules_to_save"] == ["multi_modal_projector", "model.language_model.embed_tokens"]
    adapted = {
        name.removeprefix("base_model.model.").partition(".lora_")[0] for name in expected if "lora" in name
    }
    for module in adapted:
        assert re.fullmatch(fields["target_modules"], module), module
    for other in (
        "model.vision_tower.encoder.layers.1.mlp.fc2",  # not used, so not adapted
        "model.vision_tower.encoder.layers.0.mlp.fc1",
        "model.language_model.layers.0.self_attn.k_proj",
        "model.language_model.layers.10.self_attn.q_proj",
        "model.multi_modal_projector.linear_1",
        "lm_head",
    ):
        assert not re.fullmatch(fields["target_modules"], other), other

    _, merged, report = merged_model(adapter, str(base))
    wanted = jax.device_get(lora.merge(params, model.lora))
    assert flatten(merged).keys() == flatten(wanted).keys()
    for path, leaf in flatten(wanted).items():
        np.testing.assert_array_equal(flatten(merged)[path], leaf, path)
    assert set(expected) <= set(report.used)
    run("import", "--from", adapter, "--to", tmp_path / "merged")  # the base is found by its name
    for path, leaf in flatten(load_model(tmp_path / "merged")[1]).items():
        np.testing.assert_array_equal(leaf, flatten(wanted)[path], path)

    capsys.readouterr()
    assert main(["export", "--from", str(directory), "--format", "adapter", "--to", str(tmp_path / "a")]) == 1
    assert "give --format llava-hf-adapter" in capsys.readouterr().err
    grown = [
        "--format",
        "llava-hf-adapter",
        "--base",
        str(base.parent / "grown"),
        "--to",
        str(tmp_path / "a"),
    ]
    assert main(["export", "--from", str(directory), *grown]) == 1
    assert "has 261 rows" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def adapted(model, params, targets, rank=2):
    """Parameters with random adapters beside the kernels that `targets` matches."""
    flat = flatten(jax.device_get(lora.add(params, LoRA(rank, 4.0, targets=targets), jax.random.key(0))))
    rng = np.random.default_rng(1)
    return unflatten(
        {
            path: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32) if "lora" in path else leaf
            for path, leaf in flat.items()
        }
    )


def test_a_run_is_exported_before_it_is_pushed(trained, capsys):
    _, directory = trained
    run("push", directory, "me/model", "--dry-run")
    printed = capsys.readouterr().out
    listed = printed[printed.index("me/model (main):") :]
    assert all(name in listed for name in ("README.md", "model.json", "model.safetensors"))


@pytest.fixture(scope="module")
def plain(tiny_model):
    """A model that a llava-hf adapter can be of, and its parameters."""
    model = dataclasses.replace(tiny_model, connector="mlp2x_gelu", connector_options=())
    return model, tiny.random_params(mllm.abstract_params(model))


def test_what_cannot_be_an_adapter_of_a_llava_hf_model(plain, tmp_path):
    model, params = plain
    settings = LoRA(2, 4.0, targets=TARGETS)
    with pytest.raises(ValueError, match="hold no LoRA adapters"):
        save_model_adapter(tmp_path / "a", settings, model, params)
    other = dataclasses.replace(model, connector="linear")
    linear = tiny.random_params(mllm.abstract_params(other))
    with pytest.raises(ValueError, match="projector of two layers, not the one of 'linear'"):
        save_model_adapter(tmp_path / "a", settings, other, adapted(other, linear, TARGETS))
    both = adapted(model, params, r"vision/blocks/q/kernel")
    with pytest.raises(ValueError, match=r"'vision/blocks/q/.*' belongs to a layer that is adapted"):
        save_model_adapter(tmp_path / "a", settings, model, both, ["vision/blocks/q/bias"])
    assert not (tmp_path / "a").exists()


def test_modules_that_are_trained_are_written_whole(plain, tmp_path):
    """PEFT keeps a copy of every parameter of a module, the frozen ones too."""
    model, params = plain
    held = adapted(model, params, r"llm/blocks/q/kernel")
    paths = ["vision/class_token", "llm/head", "llm/blocks/norm1/scale", "llm/final_norm/scale"]
    save_model_adapter(tmp_path / "a", LoRA(2, 4.0), model, held, paths)
    names = {
        name
        for name in Source(tmp_path / "a", [tmp_path / "a" / "adapter_model.safetensors"])
        if "lora" not in name
    }
    embeddings = ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
    assert names == {
        *(f"{PROJECTOR}linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
        *(f"{TOWER}embeddings.{name}" for name in embeddings),
        *(f"{LLM}layers.{i}.input_layernorm.weight" for i in range(2)),
        f"{LLM}norm.weight",
        "base_model.model.lm_head.weight",
    }
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["modules_to_save"]
    assert sorted(saved) == [
        "lm_head", "model.language_model.layers.0.input_layernorm", "model.language_model.layers.1.input_layernorm",
        "model.language_model.norm", "model.vision_tower.embeddings", "multi_modal_projector",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize(("vision", "text"), [("CLIP", "Llama"), ("Siglip", "Qwen2")])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_transformers_and_peft_find_every_module(vision, text, rank_stabilized, tmp_path):
    """The names are those of the modules in transformers; where peft is installed, it computes the same logits."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from test_llava_parity import our_logits, torch_llava, torch_logits
    from torch_oracle import assert_close, save

    theirs = torch_llava(vision, text)
    save(theirs, tmp_path / "base")
    model, params, _ = load_model(tmp_path / "base")
    settings = LoRA(2, 4.0, 0.1, TARGETS, rank_stabilized)
    held = adapted(model, params, TARGETS)
    held["connector"] = jax.tree.map(lambda leaf: 1.5 * leaf, held["connector"])
    held["llm"]["embedding"] = 1.25 * held["llm"]["embedding"]
    trained = ["llm/embedding", "llm/final_norm/scale"]
    held["llm"]["final_norm"]["scale"] = 0.75 * held["llm"]["final_norm"]["scale"]
    save_model_adapter(tmp_path / "a", settings, model, held, trained, str(tmp_path / "base"))

    modules = dict(theirs.named_modules())
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    stored = {
        name.removeprefix("base_model.model.")
        for name in Source(tmp_path / "a", [tmp_path / "a" / "adapter_model.safetensors"])
    }
    targeted = {name for name in modules if re.fullmatch(fields["target_modules"], name)}
    assert targeted == {name.partition(".lora_")[0] for name in stored if ".lora_" in name}
    kept = {name for name, _ in theirs.named_parameters()}
    assert {name for name in stored if ".lora_" not in name} <= kept
    for name in fields["modules_to_save"]:
        assert any(module.endswith(name) for module in modules), name

    expected = our_logits(model, jax.device_get(lora.merge(held, settings)))
    assert np.abs(expected - our_logits(model, params)).max() > 1e-2
    peft = pytest.importorskip("peft")
    base = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    assert_close(expected, torch_logits(wrapped), "logits of PEFT")
    wrapped.save_pretrained(tmp_path / "again")
    files = [
        Source(tmp_path / name, [tmp_path / name / "adapter_model.safetensors"]) for name in ("a", "again")
    ]
    assert set(files[0]) == set(files[1])
    for name in files[0]:
        np.testing.assert_array_equal(files[0].read(name), files[1].read(name), name)


def test_a_trained_newline_goes_beside_the_adapter_as_in_llava(
    tiny_model, tiny_params, tiny_checkpoints, tmp_path
):
    """Connector and newline in `non_lora_trainables.bin`; read again, the same parameters."""
    changes = {
        "connector": "mlp2x_gelu",
        "connector_options": (),
        "tiles": Tiles(max_tiles=2, several="whole"),
        "video": Video(32, "linspace", "bilinear2d", newline="frame"),
    }
    model = dataclasses.replace(tiny_model, **changes)
    targets = r"llm/blocks/(q|down)/kernel"
    base = {part: tiny_params[part] for part in ("vision", "llm")}  # as in the checkpoints
    params = adapted(model, tiny.random_params(mllm.abstract_params(model)) | base, targets)
    settings, places = (
        LoRA(2, 6.0, 0.0, targets),
        {name: str(path) for name, path in tiny_checkpoints.items()},
    )
    trained = ["connector/layer_0/kernel", "separators/newline"]
    with pytest.raises(ValueError, match=r"separators/newline.*llava-adapter"):
        save_model_adapter(tmp_path / "peft", settings, model, params, trained)
    for other, message in (
        (
            dataclasses.replace(model, tiles=Tiles(rounding="round")),
            "config.json cannot say model.tiles=Tiles",
        ),
        (dataclasses.replace(model, image_size=56), "cannot say model.vision.image_size=56"),
        (
            dataclasses.replace(model, video=Video(pool="none", time="mean", newline="one_token")),
            "cannot say model.video.newline='one_token'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            save_llava_adapter(
                tmp_path / "a", settings, other, params, trained, places["vision"], places["llm"]
            )
    with pytest.raises(ValueError, match="'llm/head' was trained itself"):
        save_llava_adapter(tmp_path / "a", settings, model, params, ["llm/head"], places["vision"])
    save_llava_adapter(tmp_path / "a", settings, model, params, trained, places["vision"], places["llm"])
    beside = Source(tmp_path / "a", [tmp_path / "a" / "non_lora_trainables.bin"])
    assert {name.removeprefix("base_model.model.model.") for name in beside} == {
        "image_newline", *(f"mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
    }  # fmt: skip
    run("import", "--from", tmp_path / "a", "--to", tmp_path / "merged")
    found, again, _ = load_model(tmp_path / "merged")
    assert (found.tiles, found.video) == (model.tiles, model.video)
    wanted = jax.device_get(lora.merge(params, settings))
    for path, leaf in flatten(wanted).items():
        np.testing.assert_array_equal(flatten(again)[path], leaf, path)
