"""Foreign checkpoints are read whole or refused; what is written is what was trained; limits come before allocation."""

import dataclasses
import json
import pickle
import zipfile

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from mllm_jax import interop
from mllm_jax.cli.main import main
from mllm_jax.interop import hub, native
from mllm_jax.interop.checkpoints import load_connector, load_model, save_llava_hf
from mllm_jax.interop.connector_names import connector_part
from mllm_jax.interop.parts import plan_parts
from mllm_jax.interop.safetensors_io import SafetensorsFile
from mllm_jax.interop.source import Source
from mllm_jax.interop.special_tokens import generation
from mllm_jax.interop.torch_pickle import TorchFile
from mllm_jax.limits import LimitError
from mllm_jax.models import mllm
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.models.vit import VisionConfig

VISION = VisionConfig(width=12, depth=3, heads=2, mlp_width=16, patch=4, image_size=16)
LLM = DecoderConfig(vocab=29, width=8, depth=2, heads=2, kv_heads=1, head_width=4, mlp_width=12)


def model(connector="mlp2x_gelu", llm=LLM, **options):
    """A model on a 4x4 grid."""
    return ModelConfig(VISION, llm, 16, connector=connector, connector_options=tuple(sorted(options.items())))


def parameters(config):
    """Random parameters on the host."""
    return tiny.random_params(mllm.abstract_params(config))


def tensors_of(config, layout):
    """A connector's tensors as a layout stores them."""
    part = connector_part(config, layout)
    prefix = {"llava": "model.", "honeybee": "abstractor."}[layout]
    found = {}
    for rule in part.rules:
        value = np.random.RandomState(len(found)).randn(*part.shapes[rule.path]).astype(np.float32)
        found[prefix + rule.name] = np.ascontiguousarray(rule.transform.write(value))
    return found


def write(directory, tensors, **config):
    """A folder with these tensors, and a config.json if there is anything to say."""
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    if config:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


# ------------------------------------------------------------------------------------------ surplus and cut tensors


@pytest.mark.parametrize("wanted", ["mlp2x_gelu", "mlp1x_gelu", "average_pool", "spatial_pool"])
def test_a_deeper_projector_is_not_cut(wanted, tmp_path):
    place = write(tmp_path / "x", tensors_of(model("mlp3x_gelu"), "llava"))
    load_connector(place, model("mlp3x_gelu"))
    with pytest.raises(
        ValueError, match=r"no parameter takes tensor 'model.mm_projector.[24].(weight|bias)'"
    ):
        load_connector(place, model(wanted, **({"tokens": 4} if wanted == "average_pool" else {})))


ABSTRACTOR = {"tokens": 4, "depth": 1, "hidden": 8}


@pytest.mark.parametrize(
    ("held", "name"),
    [
        ({"position_table": True}, "pos_emb"),
        ({"prenorm": True}, "prenorm"),
        ({"end_tokens": 1}, "eos_tokens"),
        ({"mlp_depth": 3}, "readout.4"),
        ({"depth": 2}, "net.[02].b2"),
    ],
)
def test_an_abstractor_with_more_than_is_asked_for_is_refused(held, name, tmp_path):
    plain = {**ABSTRACTOR, "position_table": False}
    place = write(tmp_path / "x", tensors_of(model("c_abstractor", **{**plain, **held}), "honeybee"))
    load_connector(place, model("c_abstractor", **{**plain, **held}))
    with pytest.raises(ValueError, match=rf"no parameter takes tensor 'abstractor.{name}"):
        load_connector(place, model("c_abstractor", **plain))


def test_another_module_beside_the_projector_is_refused(tmp_path):
    tensors = tensors_of(model(), "llava") | {
        "model.vision_resampler.pool.weight": np.zeros((12, 12, 2, 2), np.float32)
    }
    with pytest.raises(ValueError, match=r"no parameter takes tensor 'model.vision_resampler.pool.weight'"):
        load_connector(write(tmp_path / "x", tensors), model())


@pytest.mark.parametrize(
    ("connector", "options", "name", "change"),
    [
        (
            "resampler",
            {"tokens": 3, "hidden": 8, "depth": 1, "heads": 2, "mlp": 8},
            "query_tokens",
            (2, 3, 8),
        ),
        ("c_abstractor", ABSTRACTOR, "pos_emb", (3, 16, 12)),
        ("c_abstractor", {**ABSTRACTOR, "end_tokens": 1}, "eos_tokens", (2, 1, 8)),
        ("c_abstractor", ABSTRACTOR, "net.0.b1.conv1.conv.weight", (8, 12, 3, 3)),
        ("c_abstractor", ABSTRACTOR, "net.0.b1.se.fc1.weight", (3, 8, 3, 3)),
    ],
)
def test_nothing_is_cut_from_a_tensor(connector, options, name, change, tmp_path):
    config = model(connector, **options)
    tensors = tensors_of(config, "honeybee")
    load_connector(write(tmp_path / "x", tensors), config)
    tensors[f"abstractor.{name}"] = np.zeros(change, np.float32)
    with pytest.raises(ValueError, match=rf"'abstractor.{name}' gives"):
        load_connector(write(tmp_path / "x", tensors), config)


def test_a_row_that_is_left_out_is_told(tmp_path):
    config = model("c_abstractor", **ABSTRACTOR)
    tensors = tensors_of(config, "honeybee")
    table = tensors["abstractor.pos_emb"]
    tensors["abstractor.pos_emb"] = np.concatenate([table[:, :1] * 0, table], axis=1)
    source = Source(write(tmp_path / "x", tensors))
    _, _, report = plan_parts(source, [connector_part(config, "honeybee")])
    assert report.ignored == {
        "abstractor.pos_emb (in part)": "its first row is a class token's, which is no patch"
    }


def test_blocks_beyond_the_config_are_refused(tmp_path):
    params = parameters(model())
    interop.save_llm(tmp_path / "llm", LLM, params["llm"])
    interop.save_vision(tmp_path / "vision", VISION, params["vision"])
    for name, load in (("llm", interop.load_llm), ("vision", interop.load_vision)):
        fields = json.loads((tmp_path / name / "config.json").read_text())
        fields["num_hidden_layers"] -= 1
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=r"no parameter takes tensor '.*layers.[12]\."):
            load(tmp_path / name)


def test_a_tied_head_must_be_the_embedding(tmp_path):
    config = dataclasses.replace(LLM, tied=True)
    interop.save_llm(tmp_path / "llm", config, parameters(model(llm=config))["llm"])
    tensors = load_file(tmp_path / "llm" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "llm" / "model.safetensors")
    interop.load_llm(tmp_path / "llm")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "llm" / "model.safetensors")
    with pytest.raises(ValueError, match=r"tie_word_embeddings, but 'lm_head.weight' differs"):
        interop.load_llm(tmp_path / "llm")


# ---------------------------------------------------------------------------------------------- parts and towers


def test_a_type_that_is_not_supported_is_not_half_imported(tmp_path, capsys):
    config = model()
    save_llava_hf(tmp_path / "hf", config, parameters(config))
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    fields = {**fields, "model_type": "llava_next_video", "image_grid_pinpoints": [[16, 32]]}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(fields))
    arguments = ["import", "--from", str(tmp_path / "hf"), "--to"]
    assert main([*arguments, str(tmp_path / "a")]) == 1
    assert "model_type='llava_next_video' is not supported" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "a").exists()
    for part in ("vision", "llm"):  # asked for, it is told what is left out
        assert main([*arguments, str(tmp_path / part), "--part", part]) == 0
        assert "belongs to another part of the checkpoint" in " ".join(capsys.readouterr().out.split())
    assert interop.load_vision(tmp_path / "vision")["pos_embed"].shape == (17, 12)


@pytest.mark.parametrize("form", ["native", "llava-hf"])
def test_a_tower_that_would_be_ignored_is_refused(form, tmp_path, capsys):
    config = model()
    if form == "native":
        native.save_native(tmp_path / "x", config, parameters(config))
    else:
        save_llava_hf(tmp_path / "x", config, parameters(config))
    code = main(["import", "--from", str(tmp_path / "x"), "--tower", "mini", "--to", str(tmp_path / "y")])
    assert code == 1
    assert "own vision tower, so none can be named" in " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------------------------ what was trained


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (
            lambda c: dataclasses.replace(c, connector="mlp2x_gelu", connector_options=()),
            "model.connector.name",
        ),
        (lambda c: dataclasses.replace(c, image_size=32), "model.vision.image_size"),
        (lambda c: dataclasses.replace(c, select_layer=-1), "model.vision.select_layer"),
        (
            lambda c: dataclasses.replace(c, connector_options=(("tokens", 9),)),
            "model.connector.average_pool.tokens: 4 there, 9 here",
        ),
        (
            lambda c: dataclasses.replace(c, vision=dataclasses.replace(VISION, activation="gelu")),
            "vision tower 0: activation",
        ),
        (
            lambda c: dataclasses.replace(c, llm=dataclasses.replace(LLM, depth=3)),
            "LLM: depth: 2 there, 3 here",
        ),
    ],
)
def test_a_connector_of_another_model_is_refused_although_shapes_agree(change, key, tmp_path):
    trained = model("average_pool", tokens=4)
    native.save_native(tmp_path, trained, parameters(trained))
    load_connector(tmp_path, trained)
    with pytest.raises(ValueError, match=key.replace(".", r"\.")) as raised:
        load_connector(tmp_path, change(trained))
    assert "allow_mismatch=True" in str(raised.value)
    load_connector(tmp_path, change(trained), allow_mismatch=True)


def test_a_connector_that_is_not_installed_here_is_named(tmp_path):
    native.save_native(tmp_path, model(), parameters(model()))
    fields = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(
        json.dumps({**fields, "connector": "top_norm", "connector_options": []})
    )
    with pytest.raises(ValueError, match=r"model.connector.name: 'top_norm' there, 'mlp2x_gelu' here"):
        load_connector(tmp_path, model())


def test_the_template_is_recorded_and_compared(tmp_path):
    native.save_native(tmp_path, model(), parameters(model()), template="v1")
    load_connector(tmp_path, model(), template="v1")
    load_connector(tmp_path, model(), template="vicuna_v1")  # the same under its other name
    with pytest.raises(ValueError, match=r"eval.template: 'v1' there, 'llama_3' here"):
        load_connector(tmp_path, model(), template="llama_3")


def test_llavas_stage_1_says_which_connector_it_is(tmp_path):
    fields = {"mm_vision_tower": "not/here", "mm_projector_type": "mlp2x_gelu", "model_type": "llava_llama"}
    place = write(tmp_path / "x", tensors_of(model(), "llava"), **fields)
    load_connector(place / "model.safetensors", model())
    pooled = model("average_pool", tokens=4)
    with pytest.raises(ValueError, match=r"name: 'mlp2x_gelu' there, 'average_pool' here"):
        load_connector(place / "model.safetensors", pooled)
    taken = load_connector(place, pooled, allow_mismatch=True)
    jax.tree.map(np.testing.assert_array_equal, taken, load_connector(place, model()))
    (place / "config.json").write_text(json.dumps({**fields, "mm_vision_select_layer": -1}))
    with pytest.raises(ValueError, match=r"select_layer: 3 there, 2 here"):
        load_connector(place, model())


def test_every_pooling_of_llava_next_takes_its_projector(tmp_path):
    projector = tensors_of(model(), "llava")
    for mode in ("average", "max", "bilinear"):
        for position in ("before", "after"):
            load_connector(
                write(tmp_path / "x", projector), model("spatial_pool", mode=mode, position=position)
            )
    conv = model("spatial_pool", mode="conv")
    with pytest.raises(ValueError, match=r"holds no tensor 'vision_resampler.pool.(weight|bias)'"):
        load_connector(write(tmp_path / "x", projector), conv)
    tensors = tensors_of(conv, "llava")
    taken = load_connector(write(tmp_path / "x", tensors), conv)
    kernel = tensors["model.vision_resampler.pool.weight"]
    assert kernel.shape == (12, 12, 2, 2)  # torch's: out, in, rows, columns
    np.testing.assert_array_equal(taken["conv"]["kernel"], kernel.transpose(2, 3, 1, 0))


# -------------------------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize("part", ["llm", "vision"])
def test_nothing_is_written_beside_old_shards(part, tmp_path):
    params = parameters(model())
    save = {"llm": lambda: interop.save_llm(tmp_path, LLM, params["llm"]),
            "vision": lambda: interop.save_vision(tmp_path, VISION, params["vision"])}[part]  # fmt: skip
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"index.json exists; choose another directory"):
        save()
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / ".index")  # hidden files are left alone
    save()
    with pytest.raises(FileExistsError):
        save()


def source_with_ids(directory, tokens):
    """A llava-hf checkpoint whose image token is among the vocabulary."""
    config = model()
    save_llava_hf(directory, config, parameters(config))
    fields = json.loads((directory / "config.json").read_text())
    del fields["mllm_jax"]
    fields["image_token_index"] = 27
    fields["text_config"] |= tokens
    (directory / "config.json").write_text(json.dumps(fields))
    (directory / "generation_config.json").unlink(missing_ok=True)


def test_ids_survive_import_and_export(tmp_path):
    source_with_ids(tmp_path / "hf", {"bos_token_id": 1, "eos_token_id": [2, 5]})
    assert main(["import", "--from", str(tmp_path / "hf"), "--to", str(tmp_path / "ours")]) == 0
    assert main(["export", "--from", str(tmp_path / "ours"), "--to", str(tmp_path / "out")]) == 0
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["image_token_index"] == 27
    assert fields["text_config"]["vocab_size"] == load_model(tmp_path / "hf")[0].llm.vocab
    expected = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 2}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == expected
    assert {key: fields["text_config"][key] for key in expected} == expected
    assert (
        main(["export", "--from", str(tmp_path / "ours"), "--format", "llm", "--to", str(tmp_path / "llm")])
        == 0
    )
    fields = json.loads((tmp_path / "llm" / "config.json").read_text())
    assert {key: fields[key] for key in expected} == expected


def test_ids_come_from_the_tokenizer_and_the_template_too(tmp_path):
    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = 1, 2, None

    assert generation(None, Tokenizer(), [7]) == {
        "bos_token_id": 1,
        "eos_token_id": [2, 7],
        "pad_token_id": 2,
    }
    assert generation(None, None) == {}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9, "temperature": 0.6}')
    found = generation(tmp_path, Tokenizer())
    assert found == {"eos_token_id": [9, 2], "temperature": 0.6, "bos_token_id": 1, "pad_token_id": 9}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(ValueError, match=r"eos_token_id=.* is no token id"):
        generation(tmp_path, Tokenizer())


def test_transformers_generation_stops_at_the_exported_ids(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = model()
    params = parameters(config)
    params["llm"]["head"] = np.zeros_like(params["llm"]["head"])  # all logits equal: it always answers id 0
    save_llava_hf(tmp_path / "never", config, params, generation={})
    save_llava_hf(tmp_path / "stops", config, params, generation={"eos_token_id": 0, "pad_token_id": 0})
    lengths = {}
    for name in ("never", "stops"):
        theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / name)
        ids = theirs.generate(torch.tensor([[3, 4]]), max_new_tokens=5, do_sample=False)
        lengths[name] = ids.shape[1]
    assert lengths == {"never": 7, "stops": 3}


# ----------------------------------------------------------------------------------- missing parts, paths, the hub


def test_a_missing_head_is_found_in_the_headers(tmp_path):
    interop.save_llm(tmp_path / "llm", dataclasses.replace(LLM, tied=True),
                     parameters(model(llm=dataclasses.replace(LLM, tied=True)))["llm"])  # fmt: skip
    interop.check_llm(tmp_path / "llm")
    fields = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"holds no tensor 'lm_head.weight'"):
        interop.check_llm(tmp_path / "llm")
    (tmp_path / "llm" / "config.json").write_text(json.dumps({**fields, "vocab_size": 27}))
    with pytest.raises(ValueError, match=r"'embedding' needs shape \(27, 8\)"):
        interop.check_llm(tmp_path / "llm")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("models/lama", "did you mean 'models/llama'"),
        ("models/llama/config.json", "is a file; give the directory"),
        ("./nothing", "there is no directory './nothing'"),
        ("/no/such/place", "there is no directory '/no/such/place'"),
        ("~/no-such-place", "there is no directory"),
        ("a/b/c", "there is no directory 'a/b/c'"),
    ],
)
def test_a_mistyped_path_is_no_error_of_the_hub(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub")
    )
    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "models" / "llama" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=message):
        hub.resolve_path(path)


def test_inspect_fetches_nothing_without_being_asked(tmp_path, monkeypatch, capsys):
    asked = []

    def download(repository, local_files_only=False, **_):
        asked.append((repository, local_files_only))
        raise FileNotFoundError("not cached")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    fields = {"model_type": "llava_llama", "mm_vision_tower": "some/tower", "mm_projector_type": "mlp2x_gelu",
              "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert main(["inspect", str(tmp_path)]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert (
        "'some/tower' is neither a directory nor in the Hugging Face cache; all of it would be fetched"
        in told
    )
    assert "give --fetch" in told
    assert asked == [("some/tower", True)]
    assert main(["inspect", str(tmp_path), "--fetch"]) == 1
    assert asked[1] == ("some/tower", False)


# ---------------------------------------------------------------------------------------------------------- limits


class Tensor:
    """Pickles as PyTorch pickles a view of a storage."""

    def __init__(self, shape, stride, count, key="0"):
        self.parts = (shape, stride, count, key)


def _number(n):
    return b"\x8a\x08" + int(n).to_bytes(8, "little")


def _tuple(values):
    return b"(" + b"".join(map(_number, values)) + b"t"


def _word(text):
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def torch_bin(path, tensors, storages, compression=zipfile.ZIP_STORED, body=None):
    """A `.bin` file, written without torch."""
    text = [b"\x80\x02}"]
    for name, tensor in tensors.items():
        shape, stride, count, key = tensor.parts
        storage = (
            b"(" + _word("storage") + b"ctorch\nFloatStorage\n" + _word(key) + _word("cpu") + _number(count)
        )
        rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ" + _number(0)
        rebuilt += _tuple(shape) + _tuple(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
        text.append(_word(name) + rebuilt + b"s")
    payload = b"".join(text) + b"." if body is None else body
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", payload)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)


def test_the_helper_writes_what_the_reader_reads(tmp_path):
    torch_bin(
        tmp_path / "x.bin", {"a": Tensor((2, 3), (3, 1), 6)}, {"0": np.arange(6, dtype=np.float32).tobytes()}
    )
    np.testing.assert_array_equal(TorchFile(tmp_path / "x.bin").read("a"), np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    ("tensors", "storages"),
    [
        ({"a": Tensor((10**9,), (0,), 1)}, {"0": bytes(4)}),  # one number, repeated
        (
            {f"t{i}": Tensor((1 << 20,), (1,), 1 << 20) for i in range(40)},
            {"0": bytes(4 << 20)},
        ),  # one storage shared
        ({"a": Tensor((1 << 24,), (1,), 1 << 24)}, {"0": bytes(64 << 20)}),  # compressed 1000 times
    ],
)
def test_small_files_with_large_tensors_are_refused(tensors, storages, tmp_path):
    torch_bin(tmp_path / "x.bin", tensors, storages, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "x.bin").stat().st_size < 1 << 20
    with pytest.raises(LimitError, match=r"x.bin: tensors of .* bytes: .* MLLM_JAX_MAX_UNPACK_RATIO"):
        TorchFile(tmp_path / "x.bin")


def test_a_pickle_of_millions_of_objects_is_refused(tmp_path, monkeypatch):
    torch_bin(tmp_path / "x.bin", {}, {}, zipfile.ZIP_DEFLATED, b"\x80\x02(" + b"}" * (3 << 20) + b"l.")
    with pytest.raises(LimitError, match=r"x.bin.* MLLM_JAX_MAX_PICKLE_STEPS=1048577"):
        TorchFile(tmp_path / "x.bin")
    torch_bin(tmp_path / "x.bin", {}, {}, zipfile.ZIP_DEFLATED, b"\x80\x02" + b"N" * (17 << 20) + b".")
    with pytest.raises(LimitError, match="MLLM_JAX_MAX_PICKLE_BYTES"):
        TorchFile(tmp_path / "x.bin")
    monkeypatch.setenv("MLLM_JAX_MAX_PICKLE_BYTES", "many")
    with pytest.raises(LimitError, match="must be a positive whole number"):
        TorchFile(tmp_path / "x.bin")
    assert pickle.loads(b"\x80\x02N.") is None


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": {**ENTRY, "shape": [True, 2]}}, "entry 'x' is malformed"),
        ({"x": {**ENTRY, "shape": [2.0]}}, "entry 'x' is malformed"),
        ({"x": {**ENTRY, "shape": ["2"]}}, "entry 'x' is malformed"),
        ({"x": {**ENTRY, "shape": [-2, -1]}}, "entry 'x' is malformed"),
        ({"x": {**ENTRY, "shape": 2}}, "entry 'x' is malformed"),
        ({"x": {**ENTRY, "shape": [1] * 40 + [2]}}, "entry 'x' is malformed"),
        ({"x": {**ENTRY, "data_offsets": [0, 4, 8]}}, "entry 'x' is malformed"),
        ({"x": {**ENTRY, "dtype": ["F32"]}}, "'x' has dtype"),
        ({"x": {**ENTRY, "dtype": None}}, "'x' has dtype None"),
        ({"x": None}, "entry 'x' is malformed"),
        ({"x": [ENTRY]}, "entry 'x' is malformed"),
        ({"x": ENTRY, "y": ENTRY}, "tensors 'x' and 'y' share bytes"),
        (f'{{"x": {json.dumps(ENTRY)}, "x": {json.dumps(ENTRY)}}}', "a name is there twice"),
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 50_000, "not JSON"),
    ],
)  # fmt: skip
def test_odd_safetensors_headers_give_messages(header, message, tmp_path):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=rf"x.safetensors is not a valid safetensors file: .*{message}"):
        SafetensorsFile(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "index",
    [{}, [], {"weight_map": []}, {"weight_map": {"x": 3}}, {"weight_map": {"x": ["a"]}}, {"weight_map": {"x": ".."}},
     {"weight_map": {"x": "a\0b"}}, {"weight_map": {"x": ""}}, {"weight_map": {"x": None}}],
)  # fmt: skip
def test_odd_index_files_give_messages(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=r"index.json"):
        Source(tmp_path)


def test_a_config_as_deep_as_it_is_long_gives_a_message(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        interop.llm_config(tmp_path)
    monkeypatch.setenv("MLLM_JAX_MAX_JSON_BYTES", "1000")
    with pytest.raises(LimitError, match="MLLM_JAX_MAX_JSON_BYTES"):
        interop.llm_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 10**9}, "MLLM_JAX_MAX_IMAGE_SIDE"),
        ({"image_size": "16"}, "image_size='16' must be int"),
        ({"llm": {**dataclasses.asdict(LLM), "depth": 10**9}}, "MLLM_JAX_MAX_LAYERS"),
        ({"llm": {**dataclasses.asdict(LLM), "width": None}}, "width=None must be int"),
        ({"llm": {**dataclasses.asdict(LLM), "kv_heads": 0}}, "kv_heads=0 must be positive"),
        ({"llm": {"vocab": 3}}, "DecoderConfig lacks 'width'"),
        ({"llm": 3}, "llm=3 must be DecoderConfig"),
        ({"vision": [1]}, "vision=.1. must be"),
        ({"connector_options": [["tokens"]]}, "connector_options=.'tokens'. must be"),
        ({"template": 3}, "template=3 must be str"),
    ],
)
def test_odd_model_files_give_messages(change, message, tmp_path):
    native.save_native(tmp_path, model(), parameters(model()))
    fields = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**fields, **change}))
    with pytest.raises(ValueError, match=message):
        native.load_config(tmp_path)


BPE = '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": 3}', "", BPE])
def test_a_damaged_tokenizer_gives_a_message(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(OSError, match=r"the tokenizer in .* cannot be read"):
        interop.load_tokenizer(tmp_path)
