"""Checkpoints of every published layout through `mllm-jax import`, `export` and `inspect`, bit for bit."""

import json
import re

import jax
import numpy as np
import pytest

from mllm_jax import interop
from mllm_jax.cli.main import main
from mllm_jax.interop.checkpoints import load_model
from mllm_jax.interop.composite import read_composite
from mllm_jax.models.paths import count, flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from parity_cases import IMAGE, TOWER_SIZE  # noqa: E402
from test_honeybee import honeybee_checkpoint  # noqa: E402
from test_llava_parity import llava_layout, torch_llava, torch_logits  # noqa: E402
from test_peft import SETTINGS, adapt, torch_llm  # noqa: E402
from torch_oracle import assert_close, randomize, save  # noqa: E402


def run(*arguments):
    """One command that must succeed."""
    assert main([str(argument) for argument in arguments]) == 0


def same(a, b):
    """Equal trees, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for path, x in flatten(a).items():
        y = flatten(b)[path]
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8), path)


def inspected(source, capsys):
    """What `inspect --json` says."""
    capsys.readouterr()
    run("inspect", source, "--json")
    return json.loads(capsys.readouterr().out)


def bytes_tokenizer(vocab):
    """A tokenizer of `vocab` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<unk>", "<s>", "</s>", *(chr(97 + i) for i in range(26))]
    names += [f"t{i}" for i in range(vocab - len(names))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def loads_in_transformers(directory, expected):
    """An export loads with every tensor, and computes the original's logits."""
    again, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    again.config.image_token_index = again.config.image_token_id = IMAGE  # the export added its own
    assert_close(torch_logits(again.eval())[..., :43], expected, "logits of the export")


def test_original_llava(tmp_path, capsys):
    """`.bin` shards with the tower beside them -> ours, both forms -> llava-hf -> transformers, and back."""
    theirs = torch_llava()
    main_directory = llava_layout(theirs, tmp_path, False)
    bytes_tokenizer(43).save_pretrained(main_directory)
    _, params, _ = load_model(main_directory)
    found = inspected(main_directory, capsys)
    assert "llava (clip_vision_model, mlp2x_gelu, llama); vision tower beside it" in found["what"]
    assert found["parameters"] == count(params)
    for form in ("safetensors", "orbax"):
        ours = tmp_path / form
        run("import", "--from", main_directory, "--to", ours, "--form", form)
        assert (ours / "tokenizer.json").exists()
        same(load_model(ours)[1], params)
        assert inspected(ours, capsys)["parameters"] == count(params)
        again = tmp_path / f"{form}-again"
        run("export", "--from", ours, "--to", again, "--format", form)
        same(load_model(again)[1], params)
    exported = tmp_path / "exported"
    run("export", "--from", tmp_path / "safetensors", "--to", exported, "--format", "llava-hf")
    loads_in_transformers(exported, torch_logits(theirs))
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    fields = json.loads((exported / "config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<image>") == fields["image_token_index"] == 43
    assert "llava-hf" in inspected(exported, capsys)["what"]
    run("import", "--from", exported, "--to", tmp_path / "back")
    same(load_model(tmp_path / "back")[1], params)
    assert load_model(tmp_path / "back")[0] == load_model(tmp_path / "safetensors")[0]


def test_the_tower_can_be_named(tmp_path, capsys):
    main_directory = llava_layout(torch_llava(), tmp_path, False, mm_vision_tower="nowhere/to-be-found")
    code = main(
        [
            "import",
            "--from",
            str(main_directory),
            "--tower",
            str(tmp_path / "tower"),
            "--to",
            str(tmp_path / "a"),
            "--verbose",
        ]
    )
    assert code == 0
    said = capsys.readouterr().out
    assert re.search(r"encoder\.layers\.4\.mlp\.fc1\.weight.*block 4 is deeper than the deepest", said), said
    assert load_model(tmp_path / "a")[1]["vision"].keys() >= {"blocks", "pos_embed"}


def test_dense_connector(tmp_path, capsys):
    """SCI goes on to transformers with the same logits; DCI, which that cannot compute, is refused there."""
    plain = torch_llava()
    directory = llava_layout(plain, tmp_path, False, mm_dense_connector_type="sci")
    layers = read_composite(directory).model.make_connector().channel_layers()
    theirs = torch_llava(vision_feature_layer=list(layers))  # the same weights but for a wider projector
    (tmp_path / "sci").mkdir()
    directory = llava_layout(theirs, tmp_path / "sci", False, mm_dense_connector_type="sci")
    found = inspected(directory, capsys)
    assert "llava (clip_vision_model, sci, llama)" in found["what"]
    run("import", "--from", directory, "--to", tmp_path / "ours")
    run("export", "--from", tmp_path / "ours", "--to", tmp_path / "exported")  # llava-hf is the default
    loads_in_transformers(tmp_path / "exported", torch_logits(theirs))
    run("import", "--from", tmp_path / "exported", "--to", tmp_path / "back")
    same(load_model(tmp_path / "back")[1], load_model(directory)[1])

    (tmp_path / "dci").mkdir()
    directory = llava_layout(theirs, tmp_path / "dci", False, mm_dense_connector_type="dci")
    run("import", "--from", directory, "--to", tmp_path / "dense")
    assert inspected(tmp_path / "dense", capsys)["geometry"]["model"]["connector"] == "dci"
    assert main(["export", "--from", str(tmp_path / "dense"), "--to", str(tmp_path / "no")]) == 1
    assert "cannot compute connector 'dci'" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    run("export", "--from", tmp_path / "dense", "--to", tmp_path / "again", "--format", "safetensors")
    same(load_model(tmp_path / "again")[1], load_model(directory)[1])


def test_honeybee(tmp_path, capsys):
    tensors = honeybee_checkpoint(tmp_path / "theirs")
    assert (
        "honeybee (clip_vision_model, c_abstractor, llama)" in inspected(tmp_path / "theirs", capsys)["what"]
    )
    run("import", "--from", tmp_path / "theirs", "--to", tmp_path / "ours")
    assert f"{len(tensors)} tensors used, 0 ignored" in capsys.readouterr().out
    model, params, _ = load_model(tmp_path / "ours")
    assert model.connector == "c_abstractor"
    assert count(params) == sum(tensor.size for tensor in tensors.values())
    kernel = params["connector"]["layer_0"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["abstractor.readout.0.weight"].T)
    run("export", "--from", tmp_path / "ours", "--to", tmp_path / "orbax", "--format", "orbax")
    same(load_model(tmp_path / "orbax")[1], params)


# How the tensors of tower, connector, LLM and head are named: on the hub, and in the classes of transformers 5. What
# `save_pretrained` of transformers 5 writes is a mixture.
PARTS = (
    r"(?:model\.)?vision_tower\.(?:vision_model\.)?",
    r"(?:model\.)?multi_modal_projector\.",
    r"language_model\.model\.|model\.language_model\.",
    r"(?:language_model\.)?lm_head\.",
)
SPELLINGS = {
    "hub": (
        "vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.",
    ),
    "classes": ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head."),
}  # fmt: skip


def spelled(name, spelling):
    """A tensor's name in another spelling."""
    for part, prefix in zip(PARTS, SPELLINGS[spelling], strict=True):
        if found := re.match(part, name):
            return prefix + name[found.end() :]
    raise AssertionError(name)


@pytest.mark.parametrize("spelling", [*SPELLINGS, "shards"])
def test_llava_hf_in_every_spelling(spelling, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    theirs = torch_llava()
    save(theirs, tmp_path / "one")
    params = load_model(tmp_path / "one")[1]
    place = tmp_path / "theirs"
    theirs.save_pretrained(place, max_shard_size="20KB" if spelling == "shards" else "1GB")
    if spelling == "shards":
        assert len(list(place.glob("model-*-of-*.safetensors"))) > 2
    else:
        stored = load_file(place / "model.safetensors")
        renamed = {spelled(name, spelling): tensor for name, tensor in stored.items()}
        assert renamed.keys() != stored.keys()
        assert len(renamed) == len(stored)
        save_file(renamed, place / "model.safetensors", {"format": "pt"})
    run("import", "--from", place, "--to", tmp_path / "ours")
    same(load_model(tmp_path / "ours")[1], params)
    found = inspected(place, capsys)
    assert found["parameters"] == count(params)
    assert found["bytes"] == 4 * count(params)


def test_tied_embeddings(tmp_path):
    """Stored once, and tied again in transformers."""
    config = torch_llava().config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    theirs = randomize(transformers.LlavaForConditionalGeneration(config))
    theirs.tie_weights()
    expected = torch_logits(theirs)
    save(theirs, tmp_path / "theirs")
    run("import", "--from", tmp_path / "theirs", "--to", tmp_path / "ours")
    model, params, _ = load_model(tmp_path / "ours")
    assert model.llm.tied
    assert "head" not in params["llm"]
    run("export", "--from", tmp_path / "ours", "--to", tmp_path / "exported")
    loads_in_transformers(tmp_path / "exported", expected)


def test_an_llm_published_as_bin(tmp_path, capsys):
    """lmsys/vicuna-7b-v1.5: a `.bin` and a SentencePiece model."""
    theirs = torch_llm()
    save(theirs, tmp_path / "hf")
    place = tmp_path / "vicuna"
    place.mkdir()
    (place / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    torch.save(theirs.state_dict(), place / "pytorch_model.bin")
    (place / "tokenizer.model").write_bytes(b"a model")
    assert "LLM (llama)" in inspected(place, capsys)["what"]
    run("import", "--from", place, "--to", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"a model"
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    same(interop.load_llm(tmp_path / "out"), interop.load_llm(tmp_path / "hf"))


def test_adapters_of_a_multimodal_model(tmp_path, capsys):
    """PEFT on LlavaForConditionalGeneration: merged, the vision tower and connector untouched."""
    theirs = torch_llava()
    save(theirs, tmp_path / "base")
    before = load_model(tmp_path / "base")[1]
    language = torch.nn.Module()  # so that modules have the names that PEFT sees
    language.model = torch.nn.Module()
    language.model.language_model = theirs.model.language_model
    tensors = adapt(language, ("q_proj", "down_proj"))
    assert next(iter(tensors)).startswith("base_model.model.model.language_model.layers.0")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_config.json").write_text(
        json.dumps({**SETTINGS, "base_model_name_or_path": str(tmp_path / "base")})
    )
    assert inspected(adapter, capsys)["what"] == "LoRA adapter (PEFT)"
    run("import", "--from", adapter, "--to", tmp_path / "ours")
    assert "model with the adapter merged" in capsys.readouterr().out
    after = load_model(tmp_path / "ours")[1]
    same(after["vision"], before["vision"])
    same(after["connector"], before["connector"])
    expected = {
        "q": ("self_attn.q_proj", True), "down": ("mlp.down_proj", True), "up": ("mlp.up_proj", False),
    }  # fmt: skip
    for ours, (name, changed) in expected.items():
        for i in range(2):
            merged = theirs.model.language_model.get_submodule(f"layers.{i}.{name}").weight.detach().numpy().T
            np.testing.assert_allclose(after["llm"]["blocks"][ours]["kernel"][i], merged, atol=1e-6)
            assert changed != np.array_equal(merged, before["llm"]["blocks"][ours]["kernel"][i])


@pytest.mark.parametrize("kind", ["CLIPVision", "SiglipVision"])
def test_a_lone_tower_keeps_its_bits_and_states(kind, tmp_path, capsys):
    theirs = randomize(
        getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**TOWER_SIZE))
    )
    save(theirs, tmp_path / "theirs")
    assert "vision tower" in inspected(tmp_path / "theirs", capsys)["what"]
    run("import", "--from", tmp_path / "theirs", "--to", tmp_path / "ours")
    same(interop.load_vision(tmp_path / "ours"), interop.load_vision(tmp_path / "theirs"))
    pair = f"{tmp_path / 'theirs'}+{tmp_path / 'ours'}"
    found = inspected(pair, capsys)
    assert found["what"] == "fused vision towers"
    assert found["parameters"] == 2 * inspected(tmp_path / "theirs", capsys)["parameters"]
    assert {"vision/tower_0/blocks/q", "vision/tower_1/blocks/q"} <= {m["module"] for m in found["modules"]}
