"""PEFT adapters in and out, checked by the definition in torch and by peft itself where it is installed."""

import json

import jax
import numpy as np
import pytest

from mllm_jax import interop
from mllm_jax.interop import peft as adapters
from mllm_jax.interop import peft_export
from mllm_jax.interop.checkpoints import load_llava_lora, load_model, merged_llm, merged_model
from mllm_jax.models import lora

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from parity_cases import LLAVA_TEXT, LLM_SIZE, random_tensor, tokens  # noqa: E402
from torch_oracle import assert_close, decoder_states, randomize, save  # noqa: E402

SETTINGS = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.05, "peft_type": "LORA", "bias": "none"}


def torch_llm(**changes):
    """A tiny random Llama."""
    return randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLM_SIZE, **changes})))


def adapt(model, modules, settings=SETTINGS):
    """Adapter tensors by PEFT's names, and the merged torch model's weights by the definition W + s B A."""
    tensors = {}
    rank, scale = settings["r"], settings["lora_alpha"] / settings["r"]
    for name, layer in model.named_modules():
        if name.rsplit(".", 1)[-1] in modules:
            a = torch.tensor(random_tensor(f"{name}.A", (rank, layer.in_features)))
            b = torch.tensor(random_tensor(f"{name}.B", (layer.out_features, rank)))
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
            with torch.no_grad():
                layer.weight += scale * b @ a
    return tensors


@pytest.mark.parametrize(
    ("file", "modules"),
    [("safetensors", ("q_proj", "v_proj")), ("bin", ("down_proj", "o_proj", "gate_proj"))],
)
def test_adapter_in_merge_and_out(file, modules, tmp_path):
    from safetensors.torch import load_file, save_file

    theirs = torch_llm()
    save(theirs, tmp_path / "base")
    tensors = adapt(theirs, modules)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**SETTINGS, "target_modules": list(modules)})
    )
    if file == "bin":
        torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")
    else:
        save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")

    config, merged, report = merged_llm(tmp_path / "adapter", str(tmp_path / "base"))
    assert sorted(report.used) == sorted(tensors)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens(7))).logits  # its weights were merged by the definition
    assert_close(decoder_states(config, merged, tokens(7))[1], expected, "merged logits")

    settings, tree, _ = adapters.load_adapter(tmp_path / "adapter", config)
    assert (settings.rank, settings.alpha, settings.dropout) == (3, 5.0, 0.05)
    base = adapters.add_adapter(interop.load_llm(tmp_path / "base"), tree)
    assert {p.split("/")[2] for p in lora.target_paths({"llm": base}, settings)} == set(tree["blocks"])
    peft_export.save_adapter(tmp_path / "out", settings, config, base)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == sorted(
        modules
    )


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_against_peft_itself(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = torch_llm(attention_bias=True)
    save(theirs, tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["k_proj", "up_proj"], use_rslora=True)
    wrapped = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.tensor(random_tensor(name, parameter.shape)))
        expected = wrapped.eval()(torch.tensor(tokens(7))).logits
    wrapped.save_pretrained(tmp_path / "adapter")
    ours, merged, _ = merged_llm(tmp_path / "adapter", str(tmp_path / "base"))
    assert_close(decoder_states(ours, merged, tokens(7))[1], expected, "merged logits")
    settings, tree, _ = adapters.load_adapter(tmp_path / "adapter", ours)
    assert settings.scale == 3  # 6 / sqrt(4)
    peft_export.save_adapter(tmp_path / "out", settings, ours, tree, base=str(tmp_path / "base"))
    assert peft.PeftConfig.from_pretrained(tmp_path / "out").base_model_name_or_path == str(tmp_path / "base")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "out").eval()
    with torch.no_grad():
        assert_close(again(torch.tensor(tokens(7))).logits, expected, "exported adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"of_tomorrow": {"x": 1}}, "of_tomorrow"),
        ({"r": 0}, "r=0 must be"),
        ({"lora_alpha": "many"}, "lora_alpha=.many. must be"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' goes with a changed base"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
    ],
)
def test_settings_that_change_the_computation_are_refused(change, message, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({**SETTINGS, **change}))
    with pytest.raises(ValueError, match=message):
        adapters.read_lora(tmp_path)


def test_an_adapter_of_some_layers_only_is_named(tmp_path):
    theirs = torch_llm()
    save(theirs, tmp_path / "base")
    tensors = adapt(theirs, ("q_proj",))
    missing = "base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(SETTINGS))
    torch.save({k: v for k, v in tensors.items() if k != missing}, tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"holds no tensor 'model.layers.2.self_attn.q_proj.lora_B.weight'"):
        merged_llm(tmp_path / "a", str(tmp_path / "base"))
    with pytest.raises(ValueError, match="Give --base"):
        merged_llm(tmp_path / "a", "")


def test_llava_trained_with_lora(tmp_path):
    from test_llava_parity import llava_layout, torch_llava

    theirs = torch_llava()
    base = transformers.LlamaForCausalLM(theirs.config.text_config)
    base.model.load_state_dict(theirs.model.language_model.state_dict())
    base.lm_head.load_state_dict(theirs.lm_head.state_dict())
    save(base, tmp_path / "base")
    tensors = adapt(base, ("q_proj", "up_proj"))
    theirs.model.language_model.load_state_dict(base.model.state_dict())  # now the merged weights
    main = llava_layout(theirs, tmp_path, False)
    _, expected, _ = load_model(main)

    lora_dir = tmp_path / "lora"
    lora_dir.mkdir()
    (lora_dir / "config.json").write_text((main / "config.json").read_text())
    (lora_dir / "adapter_config.json").write_text(json.dumps(SETTINGS))
    torch.save(tensors, lora_dir / "adapter_model.bin")
    projector = {
        f"base_model.model.model.mm_projector.{i}.{kind}": getattr(
            getattr(theirs.model.multi_modal_projector, layer), kind
        )
        .detach()
        .clone()
        for i, layer in ((0, "linear_1"), (2, "linear_2"))
        for kind in ("weight", "bias")
    }
    torch.save(projector, lora_dir / "non_lora_trainables.bin")
    model, params, _ = load_llava_lora(lora_dir, str(tmp_path / "base"))
    assert model.llm.width == LLAVA_TEXT["hidden_size"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, expected)


@pytest.mark.parametrize("spelling", ["transformers 4", "transformers 5"])
def test_an_adapter_of_every_part_of_a_llava(spelling, tmp_path):
    """LoRA on tower, projector and LLM, the projector's second layer and the head trained as a whole."""
    from test_llava_parity import torch_llava

    theirs = torch_llava()
    save(theirs, tmp_path / "base")
    tensors = adapt(theirs, ("q_proj", "linear_1", "fc2"))
    saved = {"model.multi_modal_projector.linear_2": theirs.model.multi_modal_projector.linear_2,
             "lm_head": theirs.lm_head}  # fmt: skip
    for name, module in saved.items():
        for kind, parameter in module.named_parameters():
            with torch.no_grad():
                parameter.copy_(torch.tensor(random_tensor(f"{name}.trained", parameter.shape)))
            tensors[f"base_model.model.{name}.{kind}"] = parameter.detach().clone()
    if spelling == "transformers 4":
        renamed = {
            "base_model.model.model.vision_tower.": "base_model.model.vision_tower.vision_model.",
            "base_model.model.model.multi_modal_projector.": "base_model.model.multi_modal_projector.",
            "base_model.model.model.language_model.": "base_model.model.language_model.model.",
            "base_model.model.lm_head.": "base_model.model.language_model.lm_head.",
        }
        for ours, old in renamed.items():
            tensors = {
                old + name.removeprefix(ours) if name.startswith(ours) else name: tensor
                for name, tensor in tensors.items()
            }
    (tmp_path / "a").mkdir()
    fields = {**SETTINGS, "modules_to_save": ["linear_2", "lm_head"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(fields))
    torch.save(tensors, tmp_path / "a" / "adapter_model.bin")
    _, params, report = merged_model(tmp_path / "a", str(tmp_path / "base"))
    save(theirs, tmp_path / "merged")  # its weights were changed by the definition
    _, expected, _ = load_model(tmp_path / "merged")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, expected)
    unused = {name for name in tensors if ".layers.4." in name and "vision_tower" in name}
    assert set(tensors) - set(report.used) == unused  # the tower's last block is not used
    assert unused <= report.ignored.keys()

    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps({**fields, "modules_to_save": ["classifier"]})
    )
    with pytest.raises(ValueError, match="modules_to_save has 'classifier', but no tensor of it"):
        merged_model(tmp_path / "a", str(tmp_path / "base"))
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(fields))
    half = {name: tensor for name, tensor in tensors.items() if not name.endswith("linear_1.lora_B.weight")}
    torch.save(half, tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"'layer_0/lora_a' is there without 'layer_0/lora_b'"):
        merged_model(tmp_path / "a", str(tmp_path / "base"))
