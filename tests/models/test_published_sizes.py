"""Published models by their `config.json`: shapes and parameter counts at true size, without weights or arithmetic."""

import jax
import jax.numpy as jnp
import pytest

from mllm_jax import interop
from mllm_jax.interop import families
from mllm_jax.interop.hub import local_only
from mllm_jax.interop.parts import llm_shapes, vision_shapes
from mllm_jax.interop.published import published, shipped_geometry
from mllm_jax.models import mllm
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.models.paths import count


def shipped(part):
    """{name: (model type, the other fields of config.json, parameters)}; a test below counts the last in torch."""
    rows = {}
    for model in published(part):
        fields = dict(model["config"])
        rows[model["name"]] = (fields.pop("model_type"), fields, model["parameters"])
    return rows


LLMS = shipped("llms")
# All of transformers' tower but what no hidden state needs: the final norm, SigLIP's pooling head, DINOv2's mask token.
TOWERS = shipped("vision")
UNUSED = r"(.*\.)?(post_layernorm|layernorm|head)\..*|(.*\.)?mask_token"


def read(table, model_type, fields):
    """Our configuration of a published one."""
    return table[model_type].config(fields)


def size(shapes):
    """Numbers in {path: shape}."""
    return count({path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in shapes.items()})


@pytest.mark.parametrize("name", LLMS)
def test_llms(name):
    model_type, fields, parameters = LLMS[name]
    assert size(llm_shapes(read(families.LLMS, model_type, fields))) == parameters


@pytest.mark.parametrize("name", TOWERS)
def test_towers(name):
    model_type, fields, parameters = TOWERS[name]
    assert size(vision_shapes(read(families.VISION, model_type, fields))) == parameters


# test_mini_gemini.py computes timm's ConvNeXt, which transformers has not.
IN_TORCH = [*LLMS, *(name for name, (kind, _, _) in TOWERS.items() if kind != "timm_convnext")]


@pytest.mark.parametrize("name", IN_TORCH)
def test_the_same_counts_in_torch(name):
    import re

    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model_type, fields, parameters = {**LLMS, **TOWERS}[name]
    table = families.LLMS if name in LLMS else families.VISION
    config = transformers.AutoConfig.for_model(model_type, **fields)
    with torch.device("meta"):
        model = getattr(transformers, table[model_type].architecture)(config)
    named = dict(model.named_parameters())  # shared ones once
    assert sum(p.numel() for key, p in named.items() if not re.fullmatch(UNUSED, key)) == parameters


def whole(tower, llm, connector, **options):
    """A multimodal model of published parts."""
    vision = read(families.VISION, *TOWERS[tower][:2])
    return ModelConfig(
        vision=vision,
        llm=read(families.LLMS, *LLMS[llm][:2]),
        image_size=vision.image_size,
        connector=connector,
        connector_options=tuple(sorted(options.items())),
        dtype="bfloat16",
        param_dtype="bfloat16",
    )


# tower, LLM, connector, visual tokens, connector's parameters (connectors.md 2.8)
WHOLES = {
    "LLaVA-1.5 7B": ("CLIP ViT-L/14-336", "Llama 2 7B, Vicuna 7B", "mlp2x_gelu", 576, 20_979_712),
    "LLaVA-1.5 13B": ("CLIP ViT-L/14-336", "Llama 2 13B, Vicuna 13B", "mlp2x_gelu", 576, 31_467_520),
    "Dense Connector 7B": ("CLIP ViT-L/14-336", "Llama 2 7B, Vicuna 7B", "dci", 576, 29_368_320),
    "Dense Connector, SigLIP, Llama 3 8B": ("SigLIP so400m/14-384", "Llama 3 8B", "dci", 729, 30_941_184),
    "Dense Connector, Yi 34B": ("SigLIP so400m/14-384", "Yi 34B", "sci", 729, 76_167_168),
    "STI, Phi-2": ("SigLIP so400m/14-384", "Phi-2", "sti", 911, 9_507_840),
}


@pytest.mark.parametrize("name", WHOLES)
def test_whole_models(name):
    tower, llm, connector, tokens, parameters = WHOLES[name]
    config = whole(tower, llm, connector)
    params = mllm.abstract_params(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert count(params["llm"]) == LLMS[llm][2]
    assert count(params["connector"]) == parameters
    assert config.visual_layout.slot.num_tokens == tokens
    blocks = config.make_connector().request().deepest
    block = count(params["vision"]["blocks"]) // blocks
    assert blocks == config.vision.depth - 1  # the last block is neither built nor read
    assert count(params["vision"]) + block == TOWERS[tower][2]
    batch = mllm.batch_spec(config, 1, length=tokens + 64)
    logits = jax.eval_shape(lambda p, b: mllm.apply(config, p, b), params, batch)
    assert logits.shape == (1, tokens + 64, config.llm.vocab)


def test_hub_ids_give_the_shipped_geometry_without_a_download(tmp_path):
    names = [name for part in ("vision", "llms") for model in published(part) for name in model["ids"]]
    assert len(names) == len(set(names))
    with pytest.raises(FileNotFoundError), local_only():  # only planning knows them
        interop.llm_config("lmsys/vicuna-7b-v1.5")
    with shipped_geometry():
        assert interop.llm_config("lmsys/vicuna-7b-v1.5") == read(
            families.LLMS, *LLMS["Llama 2 7B, Vicuna 7B"][:2]
        )
        fused = interop.vision_config("google/siglip-so400m-patch14-384+facebook/dinov2-large")
        assert [tower.width for tower in fused.towers] == [1152, 1024]
        with pytest.raises(FileNotFoundError, match="nobody/nothing"):
            interop.llm_config("nobody/nothing")


def test_llava_7b_has_7_06_billion_parameters():
    config = whole("CLIP ViT-L/14-336", "Llama 2 7B, Vicuna 7B", "mlp2x_gelu")
    tower = config.vision.width
    block = 4 * (tower + 1) * tower + 2 * tower * 4096 + 4096 + tower + 4 * tower
    unused = block + 2 * tower  # the tower's last block and its final norm, which LLaVA stores
    assert count(mllm.abstract_params(config)) + unused == 7_062_902_784
