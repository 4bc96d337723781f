"""Published models by their `config.json`: shapes and parameter counts at true size, without weights or arithmetic."""

import jax
import jax.numpy as jnp
import pytest

from mllm_jax.interop import families
from mllm_jax.interop.parts import llm_shapes, vision_shapes
from mllm_jax.models import mllm
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.models.paths import count


def _llm(model_type, vocab, width, depth, heads, kv_heads, mlp, parameters, **fields):
    sizes = {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
    }
    return model_type, sizes | fields, parameters


# The last number counts the parameters; a test below counts them in torch.
LLMS = {
    "Llama 2 7B, Vicuna 7B": _llm("llama", 32000, 4096, 32, 32, 32, 11008, 6_738_415_616),
    "Llama 2 13B, Vicuna 13B": _llm("llama", 32000, 5120, 40, 40, 40, 13824, 13_015_864_320),
    "Llama 3 8B": _llm("llama", 128256, 4096, 32, 32, 8, 14336, 8_030_261_248),
    "Llama 3 70B": _llm("llama", 128256, 8192, 80, 64, 8, 28672, 70_553_706_496),
    "Llama 3.2 1B": _llm(
        "llama", 128256, 2048, 16, 32, 8, 8192, 1_235_814_400, head_dim=64, tie_word_embeddings=True
    ),
    "Yi 34B": _llm("llama", 64000, 7168, 60, 56, 8, 20480, 34_388_917_248),
    "Mistral 7B": _llm("mistral", 32000, 4096, 32, 32, 8, 14336, 7_241_732_096),
    "Qwen2 7B, Qwen2.5 7B": _llm("qwen2", 152064, 3584, 28, 28, 4, 18944, 7_615_616_512),
    "Qwen2.5 0.5B": _llm("qwen2", 151936, 896, 24, 14, 2, 4864, 494_032_768, tie_word_embeddings=True),
    "Qwen3 8B": _llm("qwen3", 151936, 4096, 36, 32, 8, 12288, 8_190_735_360, head_dim=128),
    "Phi-2": _llm("phi", 51200, 2560, 32, 32, 32, 10240, 2_779_683_840, partial_rotary_factor=0.4),
    "Gemma 2 2B": _llm("gemma2", 256000, 2304, 26, 8, 4, 9216, 2_614_341_888, head_dim=256),
    "Gemma 2 9B": _llm("gemma2", 256000, 3584, 42, 16, 8, 14336, 9_241_705_984, head_dim=256),
}


def _tower(model_type, width, depth, heads, mlp, patch, image_size, parameters, **fields):
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "patch_size": patch,
        "image_size": image_size,
    }
    return model_type, sizes | fields, parameters


CLIP, SIGLIP, DINO, REGISTERS = "clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers"
# All of transformers' tower but what no hidden state needs: the final norm, SigLIP's pooling head, DINOv2's mask token.
TOWERS = {
    "CLIP ViT-B/32": _tower(CLIP, 768, 12, 12, 3072, 32, 224, 87_454_464),
    "CLIP ViT-B/16": _tower(CLIP, 768, 12, 12, 3072, 16, 224, 85_797_888),
    "CLIP ViT-L/14": _tower(CLIP, 1024, 24, 16, 4096, 14, 224, 303_177_728),
    "CLIP ViT-L/14-336": _tower(CLIP, 1024, 24, 16, 4096, 14, 336, 303_505_408),
    "SigLIP B/16-224": _tower(SIGLIP, 768, 12, 12, 3072, 16, 224, 85_795_584),
    "SigLIP so400m/14-384": _tower(SIGLIP, 1152, 27, 16, 4304, 14, 384, 412_984_944),
    "SigLIP 2 so400m/16-naflex": _tower(
        "siglip2_vision_model", 1152, 27, 16, 4304, 16, 256, 412_647_408, num_patches=256
    ),
    "DINOv2 B/14": _tower(DINO, 768, 12, 12, 0, 14, 518, 86_578_176, mlp_ratio=4),
    "DINOv2 L/14": _tower(DINO, 1024, 24, 16, 0, 14, 518, 304_365_568, mlp_ratio=4),
    "DINOv2 g/14": _tower(DINO, 1536, 40, 24, 0, 14, 518, 1_136_476_160, mlp_ratio=4, use_swiglu_ffn=True),
    "DINOv2 L/14 with registers": _tower(
        REGISTERS, 1024, 24, 16, 0, 14, 518, 304_369_664, mlp_ratio=4, num_register_tokens=4
    ),
}
UNUSED = r"(.*\.)?(post_layernorm|layernorm|head)\..*|(.*\.)?mask_token"


def fields_of(model_type, fields):
    """config.json of a table row (DINOv2 has no `intermediate_size`, Siglip 2 no `image_size`)."""
    left_out = {
        DINO: "intermediate_size",
        REGISTERS: "intermediate_size",
        "siglip2_vision_model": "image_size",
    }
    return {key: value for key, value in fields.items() if key != left_out.get(model_type)}


def read(table, model_type, fields):
    """Our configuration of a published one."""
    return table[model_type].config(fields_of(model_type, fields))


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


@pytest.mark.parametrize("name", [*LLMS, *TOWERS])
def test_the_same_counts_in_torch(name):
    import re

    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model_type, fields, parameters = {**LLMS, **TOWERS}[name]
    table = families.LLMS if name in LLMS else families.VISION
    config = transformers.AutoConfig.for_model(model_type, **fields_of(model_type, fields))
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


def test_llava_7b_has_7_06_billion_parameters():
    config = whole("CLIP ViT-L/14-336", "Llama 2 7B, Vicuna 7B", "mlp2x_gelu")
    tower = config.vision.width
    block = 4 * (tower + 1) * tower + 2 * tower * 4096 + 4096 + tower + 4 * tower
    unused = block + 2 * tower  # the tower's last block and its final norm, which LLaVA stores
    assert count(mllm.abstract_params(config)) + unused == 7_062_902_784
