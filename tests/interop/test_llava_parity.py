"""Whole models against torch: LLaVA and Dense Connector forward passes, every layout in, llava-hf out."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mllm_jax.interop.checkpoints import load_connector, load_model, save_llava_hf
from mllm_jax.interop.source import Source
from mllm_jax.models import mllm
from mllm_jax.models.mllm import ModelConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from parity_cases import IMAGE, LLAVA_TEXT, LLAVA_TOKENS, LLAVA_VISION, LLAVAS, pixels  # noqa: E402
from torch_oracle import assert_close, llava_batch, randomize, save  # noqa: E402

PIXELS = pixels(12, 12)


def torch_llava(vision="CLIP", text="Llama", **changes):
    """A tiny random LlavaForConditionalGeneration."""
    config = transformers.LlavaConfig(
        vision_config=getattr(transformers, f"{vision}VisionConfig")(**LLAVA_VISION),
        text_config=getattr(transformers, f"{text}Config")(**LLAVA_TEXT),
        image_token_index=IMAGE,
        vision_feature_select_strategy="default" if vision == "CLIP" else "full",
        **changes,
    )
    return randomize(transformers.LlavaForConditionalGeneration(config))


def torch_logits(model):
    """Its logits of the test batch."""
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(LLAVA_TOKENS), pixel_values=torch.tensor(PIXELS.transpose(0, 3, 1, 2))
        ).logits


def our_logits(config: ModelConfig, params, tokens=LLAVA_TOKENS, images=PIXELS):
    """Logits of the test batch."""
    return jax.jit(lambda p, b: mllm.apply(config, p, b))(params, llava_batch(tokens, images, IMAGE))


@pytest.mark.parametrize("name", LLAVAS)
def test_whole_llava_in_and_out(name, tmp_path):
    vision, text, changes = LLAVAS[name]
    theirs = torch_llava(vision, text, **changes)
    save(theirs, tmp_path / "hf")
    model, params, report = load_model(tmp_path / "hf")
    expected = torch_logits(theirs)
    assert_close(our_logits(model, params), expected, "logits")
    layers = changes.get("vision_feature_layer", -2)
    layers = layers if isinstance(layers, list) else [layers]
    deepest = max(model.vision.resolve_layer(layer) for layer in layers)
    assert jax.tree.leaves(params["vision"]["blocks"])[0].shape[0] == deepest
    ignored = [name for name, why in report.ignored.items() if "deeper" in why]
    assert len(ignored) == (5 - deepest) * 16
    assert len(report.used) + len(report.ignored) == len(set(report.used) | set(report.ignored))

    save_llava_hf(tmp_path / "export", model, params)
    again, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    again.config.image_token_index = again.config.image_token_id = IMAGE  # the export added its own
    assert_close(torch_logits(again)[..., :43], expected, "logits of the export")
    same, back, _ = load_model(tmp_path / "export")
    assert same == model
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("Gemma2", {"head_dim": 6, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}),
        ("Phi", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    ],
)
def test_llava_hf_has_a_plain_head_whatever_the_llm_has(text, changes, tmp_path):
    """No soft cap and no bias on its logits, as transformers' class computes them."""
    config = torch_llava().config
    config.text_config = getattr(transformers, f"{text}Config")(**{**LLAVA_TEXT, **changes})
    theirs = randomize(transformers.LlavaForConditionalGeneration(config))
    save(theirs, tmp_path / "hf")
    model, params, _ = load_model(tmp_path / "hf")
    expected = torch_logits(theirs)
    if cap := changes.get("final_logit_softcapping"):
        assert expected.abs().max() > cap
    assert_close(our_logits(model, params), expected, "logits")


def test_export_at_another_resolution_bakes_the_position_table(tmp_path):
    save(torch_llava(), tmp_path / "hf")
    model, params, _ = load_model(tmp_path / "hf")
    larger = dataclasses.replace(model, image_size=16)
    save_llava_hf(tmp_path / "export", larger, params)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "export")
    tokens = np.array([[3, *[IMAGE] * 16, 5]])
    images = pixels(16, 16, batch=1)
    again.config.image_token_index = again.config.image_token_id = IMAGE
    with torch.no_grad():
        expected = again(
            input_ids=torch.tensor(tokens), pixel_values=torch.tensor(images.transpose(0, 3, 1, 2))
        ).logits
    assert_close(our_logits(larger, params, tokens=tokens, images=images), expected[..., :43], "logits")


def llava_layout(theirs, directory, tower_inside, **fields):
    """Saves a torch LLaVA as haotian-liu/LLaVA does: `.bin` shards, the tower beside (or inside)."""
    tower, main = directory / "tower", directory / "main"
    save(theirs.model.vision_tower, tower)
    main.mkdir()
    state = {f"model.{k}": v for k, v in theirs.model.language_model.state_dict().items()}
    state["lm_head.weight"] = theirs.lm_head.weight
    for index, layer in ((0, "linear_1"), (2, "linear_2")):
        for kind in ("weight", "bias"):
            value = getattr(getattr(theirs.model.multi_modal_projector, layer), kind)
            state[f"model.mm_projector.{index}.{kind}"] = value.detach()
    if tower_inside:
        prefix = "model.vision_tower.vision_tower.vision_model."
        state |= {prefix + k: v for k, v in theirs.model.vision_tower.state_dict().items()}
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({name: state[name].detach().clone() for name in part}, main / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (main / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = {
        **theirs.config.text_config.to_dict(),
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "rope_theta": 10000.0,
        "mm_vision_tower": str(tower),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": LLAVA_VISION["hidden_size"],
        "mm_use_im_start_end": False,
        **fields,
    }
    for key in ("rope_parameters", "_name_or_path"):
        config.pop(key, None)
    (main / "config.json").write_text(json.dumps(config))
    return main


@pytest.mark.parametrize("tower_inside", [False, True])
def test_original_llava_layout(tower_inside, tmp_path):
    theirs = torch_llava()
    main = llava_layout(theirs, tmp_path, tower_inside)
    save(theirs, tmp_path / "hf")
    model, params, report = load_model(main)
    expected_model, expected, _ = load_model(tmp_path / "hf")
    assert model == expected_model
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert any(name.startswith("model.mm_projector") for name in report.used)


@pytest.mark.parametrize("kind", ["dci", "sci", "sti"])
def test_dense_connector_checkpoint(kind, tmp_path):
    theirs = torch_llava()
    width = 24 * (1 if kind == "sti" else 3)
    projector = theirs.model.multi_modal_projector
    projector.linear_1 = randomize(torch.nn.Linear(width, 16))
    fields = {"mm_dense_connector_type": kind, "mm_hidden_size": width}
    main = llava_layout(theirs, tmp_path, False, **fields)
    model, params, _ = load_model(main)
    assert model.connector == kind

    # The definition, on torch's hidden states of a 5-block tower: F = hs[4].
    with torch.no_grad():
        images = torch.tensor(PIXELS.transpose(0, 3, 1, 2))
        states = theirs.model.vision_tower(images, output_hidden_states=True).hidden_states
        states = [state[:, 1:] for state in states]
        extra = model.make_connector()
        if kind == "dci":
            groups = [(0, 1), (2, 3)]
            means = [sum(states[k] for k in group) / len(group) for group in groups]
            features = torch.cat([states[4], *means], dim=-1)
        elif kind == "sci":
            a, b = extra.channel_layers()[1:]
            features = torch.cat([states[4], states[a], states[b]], dim=-1)
        else:
            pool = torch.nn.AvgPool1d(8, 8)
            pooled = [
                pool(states[k].transpose(1, 2)).transpose(1, 2) for k in extra.request().hidden if k != 4
            ]
            features = torch.cat([states[4], *pooled], dim=1)
        visual = projector(features)
        count = visual.shape[1]
        tokens = np.array([[3, *[IMAGE] * count, 5, 8], [*[IMAGE] * count, 2, 4, 6]])
        embeddings = theirs.model.language_model.embed_tokens(
            torch.tensor(np.where(tokens == IMAGE, 0, tokens))
        )
        embeddings[torch.tensor(tokens == IMAGE)] = visual.reshape(-1, 16)
        hidden = theirs.model.language_model(inputs_embeds=embeddings).last_hidden_state
        expected = theirs.lm_head(hidden)
    assert_close(our_logits(model, params, tokens=tokens), expected, f"{kind} logits")


def test_a_connector_alone(tmp_path):
    theirs = torch_llava()
    main = llava_layout(theirs, tmp_path, True)
    model, params, _ = load_model(main)
    state = {k: torch.tensor(Source(main).read(k)) for k in Source(main) if "mm_projector" in k}
    torch.save(state, tmp_path / "mm_projector.bin")  # LLaVA's stage 1
    save(theirs, tmp_path / "hf")
    for place in (tmp_path / "mm_projector.bin", main, tmp_path / "hf"):
        connector = load_connector(place, model)
        jax.tree.map(np.testing.assert_array_equal, connector, params["connector"])
    linear = dataclasses.replace(model, connector="linear")
    with pytest.raises(ValueError, match=r"holds no connector 'linear': .*'mm_projector.weight'"):
        load_connector(tmp_path / "mm_projector.bin", linear)


def test_what_llava_hf_cannot_express_is_refused(tmp_path):
    save(torch_llava(), tmp_path / "hf")
    model, params, _ = load_model(tmp_path / "hf")
    pooled = dataclasses.replace(model, connector="average_pool", connector_options=(("tokens", 4),))
    with pytest.raises(ValueError, match=r"cannot compute connector 'average_pool'.*safetensors or Orbax"):
        save_llava_hf(tmp_path / "export", pooled, params)
    for field, value in (("logit_softcap", 3.0), ("head_bias", True)):
        gemma_or_phi = dataclasses.replace(model, llm=dataclasses.replace(model.llm, **{field: value}))
        with pytest.raises(ValueError, match=r"would leave out the LLM's (soft cap|bias)"):
            save_llava_hf(tmp_path / "export", gemma_or_phi, params)
    with pytest.raises(FileExistsError, match="exists; choose another"):
        save_llava_hf(tmp_path / "hf", model, params)


def test_a_missing_a_surplus_and_a_misshapen_tensor_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    save(torch_llava(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    with pytest.raises(
        ValueError, match=r"holds no tensor 'model.layers.1.mlp.up_proj.weight' \(parameter 'llm/"
    ):
        load_model(tmp_path)
    save_file({**tensors, "language_model.model.layers.0.extra": tensors[name].clone()}, file)
    with pytest.raises(ValueError, match=r"no parameter takes tensor 'language_model.model.layers.0.extra'"):
        load_model(tmp_path)
    save_file({**tensors, name: tensors[name][:3].clone()}, file)
    with pytest.raises(ValueError, match=r"'llm/blocks/up/kernel' needs shape \(16, 28\)"):
        load_model(tmp_path)
