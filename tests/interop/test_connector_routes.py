"""Every connector goes out and comes back, under our names and under those of the models that publish it."""

import json
import re

import jax
import numpy as np
import pytest
import tiny

from mllm_jax.cli.main import main
from mllm_jax.connectors import CONNECTORS
from mllm_jax.interop import native
from mllm_jax.interop.checkpoints import load_connector, load_model
from mllm_jax.interop.composite import read_composite
from mllm_jax.interop.connector_names import connector_part
from mllm_jax.interop.source import Source
from mllm_jax.models import mllm
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.models.vit import VisionConfig

VISION = VisionConfig(width=12, depth=4, heads=2, mlp_width=10, patch=4, image_size=16)
LLM = DecoderConfig(vocab=29, width=8, depth=1, heads=2, kv_heads=1, head_width=4, mlp_width=12)
STACK = {"tokens": 4, "hidden": 8, "depth": 2, "heads": 2, "mlp": 8}
OPTIONS = {
    "average_pool": {"tokens": 4},
    "spatial_pool": {"mode": "conv"},
    "sti": {"learnable": True},
    "q_former": STACK,
    "resampler": STACK,
    "perceiver": {"tokens": 4, "depth": 2, "heads": 2, "head_width": 4},
    "c_abstractor": {"tokens": 4, "hidden": 8, "depth": 1},
    "d_abstractor": STACK,
    "ldpv2": {"tokens": 4},
    "token_packer": {"hidden": 8, "heads": 2, "layers": (1, 2)},
}
# Names of a tensor in the layout that a connector alone is written in.
PUBLISHED = {
    "linear": "model.mm_projector.weight",
    "mlp1x_gelu": "model.mm_projector.0.weight",
    "mlp2x_gelu": "model.mm_projector.2.weight",
    "mlp3x_gelu": "model.mm_projector.4.weight",
    "sti": "connector/conv/kernel",  # the learnable ablation is published nowhere
    "sci": "model.mm_projector.2.weight",
    "dci": "model.mm_projector.2.weight",
    "average_pool": "model.mm_projector.2.weight",
    "spatial_pool": "model.vision_resampler.pool.weight",
    "q_former": "connector/block_0/cross_k/kernel",
    "resampler": "abstractor.encoder.layers.0.crossattention.attention.key.weight",
    "perceiver": "connector/block_0/k/kernel",
    "c_abstractor": "abstractor.net.0.b1.conv1.conv.weight",
    "d_abstractor": "abstractor.layers.0.encoder_attn.value_proj.weight",
    "pixel_shuffle": "mlp1.1.weight",
    "ldp": "model.mm_projector.model.mb_block.2.block.1.fc1.weight",
    "ldpv2": "model.mm_projector.peg.peg.0.weight",
    "token_packer": "model.mm_projector.clip_attn.in_proj_weight",
}


def make(connector, **options):
    """A random model."""
    options = tuple(sorted((OPTIONS.get(connector, {}) | options).items()))
    config = ModelConfig(VISION, LLM, 16, connector=connector, connector_options=options)
    return config, tiny.random_params(mllm.abstract_params(config))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_connector_is_here():
    assert PUBLISHED.keys() == CONNECTORS.keys()


@pytest.mark.parametrize("name", CONNECTORS)
def test_out_and_back(name, tmp_path, capsys):
    config, params = make(name)
    native.save_native(tmp_path / "model", config, params, "safetensors")
    here = ["export", "--from", str(tmp_path / "model"), "--to"]
    assert main([*here, str(tmp_path / "out"), "--format", "safetensors"]) == 0
    assert main(["import", "--from", str(tmp_path / "out"), "--to", str(tmp_path / "back")]) == 0
    again, back, _ = load_model(tmp_path / "back")
    assert again.make_connector() == config.make_connector()  # which compute the same of the same parameters
    same(back, params)
    # The connector alone, which training starts from.
    assert main([*here, str(tmp_path / "alone"), "--format", "connector"]) == 0
    assert PUBLISHED[name] in Source(tmp_path / "alone")
    same(load_connector(tmp_path / "alone", config), params["connector"])
    assert "connector.path" in (tmp_path / "alone" / "README.md").read_text()
    other, _ = make("linear" if name == "mlp2x_gelu" else "mlp2x_gelu")
    with pytest.raises(ValueError, match="trained as another model"):
        load_connector(tmp_path / "alone", other)


def test_mobilevlm_is_imported_as_a_whole(tmp_path):
    """Its config.json names the connectors in its own words."""
    for theirs, ours in (("ldpnet", "ldp"), ("ldpnetv2", "ldpv2")):
        fields = {"model_type": "mobilevlm", "mm_vision_tower": "mini", "mm_projector_type": theirs}
        fields |= {"vocab_size": 29, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        fields |= {"intermediate_size": 12, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert read_composite(tmp_path).model.connector == ours


def state_of(layout, config):
    """Names and shapes that our table gives to a connector in a layout."""
    part = connector_part(config, layout)
    shapes = {rule.path: part.shapes[rule.path] for rule in part.rules if rule.path in part.shapes}
    zeros = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    return {rule.name: rule.transform.write(zeros[rule.path]).shape for rule in part.rules}


def test_names_are_those_of_transformers():
    """Tensor names and shapes equal those of transformers' own modules."""
    pytest.importorskip("torch")
    from transformers import Blip2QFormerConfig, Idefics3Config, InternVLConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

    def shapes(module):
        return {name: tuple(value.shape) for name, value in module.state_dict().items()}

    shuffle = InternVLConfig(
        vision_config={"hidden_size": 12},
        text_config={
            "model_type": "qwen2",
            "hidden_size": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
    )
    config, _ = make("pixel_shuffle")
    assert state_of("internvl-hf", config) == shapes(InternVLMultiModalProjector(shuffle))
    assert [*state_of("internvl", config).values()] == [*state_of("internvl-hf", config).values()]
    three = Idefics3Config(
        vision_config={"hidden_size": 12},
        text_config={
            "model_type": "llama",
            "hidden_size": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
    )
    config, _ = make("pixel_shuffle", variant="idefics3")
    assert state_of("idefics3", config) == shapes(Idefics3Connector(three))

    config, _ = make("q_former", variant="next", layers=1)
    former = Blip2QFormerConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, encoder_hidden_size=12
    )
    ours = state_of("blip2", config)
    theirs = {f"qformer.{name}": shape for name, shape in shapes(Blip2QFormerModel(former)).items()}
    assert {name: shape for name, shape in ours.items() if name.startswith("qformer.")} == theirs
    rest = {name: shape for name, shape in ours.items() if not re.match(r"qformer\.", name)}
    assert rest == {
        "query_tokens": (1, 4, 8),
        "vision_model.post_layernorm.weight": (12,),
        "vision_model.post_layernorm.bias": (12,),
        "language_projection.weight": (8, 8),
        "language_projection.bias": (8,),
    }
