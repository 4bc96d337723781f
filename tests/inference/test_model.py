"""The Python API on a tiny model: every way to load one, every form of an image, and answers that agree."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import mllm_jax
from mllm_jax.cli.main import main
from mllm_jax.config import ConfigError
from mllm_jax.connectors.base import FeatureRequest
from mllm_jax.data.conversations import SampleError
from mllm_jax.data.images import ImageError
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.tokens import SampleTooLong
from mllm_jax.inference import runs
from mllm_jax.inference.model import Model
from mllm_jax.interop import checkpoints, native, saved_params
from mllm_jax.models import mllm
from mllm_jax.models.vit import VisionTransformer
from mllm_jax.parallel.mesh import AXES, make_mesh


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny_model, tiny_params, tiny_tokenizer):
    """`tiny_model` as `mllm-jax import` writes one, with weights that make answers vary."""
    root = tmp_path_factory.mktemp("imported") / "model"
    native.save_native(root, tiny_model, jax.tree.map(lambda leaf: 2 * leaf, tiny_params))
    tiny_tokenizer.save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def model(directory):
    return mllm_jax.load(directory, template="mistral_instruct", dtype="float32", aspect="square")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for index in range(3):
        (root / f"{index}.png").write_bytes(tiny.png(index, (30, 20)))
    return [root / f"{index}.png" for index in range(3)]


SHORT = {"max_new_tokens": 6}


def test_one_prompt_several_prompts_and_none_with_an_image(model, files):
    alone = [model.generate(file, "what?", **SHORT) for file in files[:2]]
    assert all(isinstance(answer, str) for answer in alone)
    assert alone[0] != alone[1]
    text = model.generate(None, "what?", **SHORT)
    together = model.generate([*files[:2], None], ["what?"] * 3, batch_size=2, **SHORT)
    assert together == [*alone, text]
    assert model.generate(files[0], ["what?", "why?"], **SHORT)[0] == alone[0]
    assert model.generate([], [], **SHORT) == []


def test_images_stand_where_the_prompt_says(model, files):
    first = model.hidden_states(files[:2], "a <image> b <image> c")
    assert first.image_of.max() == 1
    (places,) = np.nonzero(first.image_of >= 0)
    assert (np.diff(places) > 1).sum() == 1  # text between the images
    (before,) = np.nonzero(model.hidden_states(files[:2], "what?").image_of >= 0)
    assert (np.diff(before) == 1).all()
    assert before[0] < places[0]


def test_every_form_of_an_image_is_the_same_image(model, files):
    pixels = np.asarray(Image.open(files[0]).convert("RGB"))
    forms = [
        files[0],
        str(files[0]),
        files[0].read_bytes(),
        Image.open(files[0]),
        pixels,
        jax.numpy.asarray(pixels),
    ]
    logits = [model.logits(form, "what?") for form in forms]
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])


def test_pil_images_are_treated_as_files(model, tmp_path):
    rgba = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 4), np.uint8), "RGBA")
    rgba.save(tmp_path / "a.png")
    jpeg = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 16, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg.save(tmp_path / "turned.jpg", exif=exif)
    jpeg.convert("CMYK").save(tmp_path / "cmyk.jpg")
    for name in ("a.png", "turned.jpg", "cmyk.jpg"):
        opened = model.logits(Image.open(tmp_path / name), "what?")
        np.testing.assert_array_equal(opened, model.logits(tmp_path / name, "what?"))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((4, 4, 3)), ImageError, r"image 0 is an array float64\[4, 4, 3\]"),
        (np.zeros((4, 4), np.uint8), ImageError, r"uint8\[4, 4\]"),
        (b"no image", ImageError, "image 0: not an image"),
        (7, TypeError, "image 0 is a int; give a path"),
        ("missing.png", FileNotFoundError, "missing.png"),
    ],
)
def test_what_is_no_image(model, image, error, message):
    with pytest.raises(error, match=message):
        model.generate(image, "what?", **SHORT)


def test_impossible_questions(model, files):
    with pytest.raises(SampleError, match=r"1 <image> place\(s\) for 2 image"):
        model.generate(files[:2], "what is <image>?", **SHORT)
    with pytest.raises(SampleTooLong, match="limit of 512"):
        model.generate(files[0], "what?" * 120, **SHORT)
    with pytest.raises(ValueError, match="2 prompts, but images for 3"):
        model.generate(files, ["what?", "why?"], **SHORT)
    with pytest.raises(ValueError, match="temperature=-1"):
        model.generate(files[0], "what?", temperature=-1)
    with pytest.raises(SampleError, match="lone surrogate"):
        model.generate(files[0], "what \ud83d?", **SHORT)
    with pytest.raises(ValueError, match="`answers` is a list"):
        model.likelihood(files[0], "what?", "an answer")


@pytest.mark.slow
def test_drawn_answers_belong_to_the_seed_and_the_prompts_number(model, files):
    settings = {"temperature": 2.0, "top_p": 0.95, "max_new_tokens": 8}
    prompts, images = ["what?", "why?", "what?", "how?", "what?"], [*files, None, files[0]]
    first = model.generate(images, prompts, seed=1, batch_size=2, **settings)
    assert model.generate(images, prompts, seed=1, batch_size=5, **settings) == first
    assert model.generate(images, prompts, seed=2, **settings) != first
    assert first[0] != first[4]  # the same question, drawn twice
    assert model.generate(images[0], prompts[0], seed=1, **settings) == first[0]


def test_stop_texts_end_an_answer(model, files):
    whole = model.generate(files[0], "what?", max_new_tokens=20)
    stop = whole[3:5]
    assert (
        model.generate(files[0], "what?", max_new_tokens=20, stop=stop) == whole[: whole.index(stop)].strip()
    )
    assert model.generate(files[0], "what?", max_new_tokens=20, stop=["no such text", stop]) != whole


def test_likelihoods_are_those_of_the_logits(model, files):
    answers = ["a cat", "a dog, I think"]
    found = model.likelihood(files[0], "what?", answers)
    for answer, score in zip(answers, found, strict=True):
        logits = model.logits(files[0], "what?", answer)
        tokens = model.hidden_states(files[0], "what?", answer).tokens
        start = len(model.logits(files[0], "what?"))
        logs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
        steps = np.arange(start - 1, len(tokens) - 1)
        assert score == pytest.approx(logs[steps, tokens[start:]].sum(), rel=1e-4)
    several = model.likelihood([files[0], None], ["what?", "why?"], [answers, ["so"]], batch_size=2)
    assert [len(scores) for scores in several] == [2, 1]
    np.testing.assert_allclose(several[0], found, rtol=1e-5)


def test_hidden_states_are_those_that_the_answer_is_made_of(model, files, tiny_tokenizer):
    states, config = model.hidden_states(files[:2], "what?"), model.config
    length = len(states.tokens)
    assert states.encoder.shape == (2, config.vision.depth + 1, 16, config.vision.width)
    assert states.grid == (4, 4)
    assert states.visual.shape == (2, 4, config.llm.width)
    assert states.llm.shape == (config.llm.depth + 1, length, config.llm.width)
    assert states.logits.shape == (length, config.llm.vocab)
    assert all(
        field.dtype == np.float32 for field in (states.encoder, states.visual, states.llm, states.final)
    )
    np.testing.assert_allclose(model.logits(files[:2], "what?"), states.logits, rtol=1e-5, atol=1e-5)

    for index in range(2):
        np.testing.assert_array_equal(states.llm[0][states.image_of == index], states.visual[index])
    text = states.image_of < 0
    embedding = np.asarray(model.params["llm"]["embedding"])
    np.testing.assert_array_equal(states.llm[0][text], embedding[states.tokens[text]])
    head = np.asarray(mllm.apply(config, model.params, jax.numpy.asarray(states.final), method="logits"))
    np.testing.assert_allclose(head, states.logits, rtol=1e-5, atol=1e-5)
    normed = states.llm[-1] / np.sqrt(np.mean(states.llm[-1] ** 2, axis=-1, keepdims=True) + config.llm.eps)
    np.testing.assert_allclose(
        normed * model.params["llm"]["final_norm"]["scale"], states.final, rtol=1e-4, atol=1e-5
    )

    tower = VisionTransformer(config.vision, FeatureRequest((0, 1, 2)))
    image = jax.numpy.asarray(model.image(files[1].read_bytes(), "it", config.visual_layout()))
    hidden = tower.apply({"params": model.params["vision"]}, image).hidden
    for layer in range(3):
        # Another program rounds otherwise, and sharp attention makes the most of it.
        np.testing.assert_allclose(states.encoder[1, layer], hidden[layer][0], rtol=1e-4, atol=1e-3)

    token = int(states.logits[-1].argmax())
    assert model.generate(files[:2], "what?", max_new_tokens=1) == tiny_tokenizer.decode([token]).strip()


def test_hidden_states_of_text_alone(model):
    states = model.hidden_states(None, "what?")
    assert states.encoder.shape == (0, 3, 16, 32)
    assert states.visual.shape == (0, 4, 32)
    assert (states.image_of == -1).all()


def test_answers_on_a_mesh(model, directory, files):
    mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    placed = mllm_jax.load(
        directory, template="mistral_instruct", dtype="float32", aspect="square", mesh=mesh
    )
    assert placed.generate(files[0], "what?", **SHORT) == model.generate(files[0], "what?", **SHORT)
    np.testing.assert_allclose(placed.logits(files[0], "what?"), model.logits(files[0], "what?"), rtol=1e-5)
    assert jax.sharding.get_abstract_mesh().empty


def test_a_published_checkpoint_answers_as_it_is(tiny_model, tiny_tokenizer, tmp_path, files):
    config = dataclasses.replace(tiny_model, connector="mlp2x_gelu", connector_options=())
    params = tiny.random_params(mllm.abstract_params(config))
    checkpoints.save_llava_hf(tmp_path / "hf", config, params, tiny.make_tokenizer())
    loaded = mllm_jax.load(tmp_path / "hf", template="mistral_instruct", dtype="float32", aspect="square")
    imported = [
        "--from",
        str(tmp_path / "hf"),
        "--to",
        str(tmp_path / "ours"),
        "--template",
        "mistral_instruct",
    ]
    assert main(["import", *imported]) == 0
    ours = mllm_jax.load(tmp_path / "ours", dtype="float32", aspect="square")  # which records the template
    np.testing.assert_array_equal(ours.logits(files[0], "what?"), loaded.logits(files[0], "what?"))
    processor = ImageProcessor.clip(28)
    direct = Model(config, params, tiny_tokenizer, processor, "mistral_instruct")
    np.testing.assert_allclose(
        loaded.logits(files[0], "what?"), direct.logits(files[0], "what?"), rtol=1e-4, atol=1e-4
    )


def test_a_run_records_what_it_needs(tiny_checkpoints, tiny_params, tmp_path, files, capsys):
    sources = dict.fromkeys(("captions", "instructions"), ("data.json", "images"))
    run = tiny.recipe(tiny_checkpoints, sources)
    (tmp_path / "config.json").write_text(json.dumps(run.to_dict()))
    with pytest.raises(FileNotFoundError, match=r"no parameters at .*finetune"):
        mllm_jax.load(tmp_path)
    saved_params.save_params(tmp_path / "params" / "pretrain", tiny_params)
    with pytest.raises(FileNotFoundError, match=r"no parameters at .*finetune"):
        mllm_jax.load(tmp_path)
    export = [
        "export",
        "--from",
        str(tmp_path),
        "--format",
        "safetensors",
        "--to",
        str(tmp_path / "exported"),
    ]
    assert main(export) == 0
    assert "'finetune' is not finished; the model after stage 'pretrain'" in capsys.readouterr().err
    saved_params.save_params(tmp_path / "params" / "finetune", tiny_params)
    loaded = mllm_jax.load(str(tmp_path))
    assert (loaded.template, loaded.processor.aspect) == ("mistral_instruct", "pad")
    assert isinstance(loaded.generate(files[0], "what?", **SHORT), str)
    with pytest.raises(ConfigError, match="has pretrain, finetune"):
        mllm_jax.load(tmp_path, stage="last")
    with pytest.raises(ConfigError, match=r"unknown template 'mistral'.*did you mean"):
        mllm_jax.load(tmp_path, template="mistral")
    with pytest.raises(ConfigError, match="records its dtype"):
        mllm_jax.load(tmp_path, dtype="bfloat16")


def test_an_exported_model_records_its_template(tiny_model, tiny_params, tmp_path):
    native.save_native(
        tmp_path / "model", tiny_model, tiny_params, "safetensors", template="mistral_instruct"
    )
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    assert mllm_jax.load(tmp_path / "model").template == "mistral_instruct"
    assert mllm_jax.load(tmp_path / "model", template="vicuna_v1").template == "vicuna_v1"


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *((form, "bfloat16") for form in ("safetensors", "orbax", "llava-hf")),
        *(
            pytest.param(form, "float32", marks=pytest.mark.slow)
            for form in ("safetensors", "orbax", "llava-hf")
        ),
    ],
)
def test_a_run_and_its_export_answer_alike(form, dtype, tiny_checkpoints, tmp_path, files):
    """Dtypes, template, aspect and the tower's filter are recorded; nothing has to be said again."""
    vision = tmp_path / "vision"
    shutil.copytree(tiny_checkpoints["vision"], vision)
    processor = json.loads((vision / "preprocessor_config.json").read_text())
    processor |= {"resample": 2, "size": {"shortest_edge": 32}}  # bilinear, and a margin is cut away
    (vision / "preprocessor_config.json").write_text(json.dumps(processor))
    sources = dict.fromkeys(("captions", "instructions"), ("data.json", "images"))
    run = tiny.recipe({**tiny_checkpoints, "vision": vision}, sources)
    run.model.connector.name = "mlp2x_gelu"
    run.model.dtype = run.model.frozen_dtype = dtype
    run.model.attention = "splash"  # of the machine that trained, which is not this one
    run.data.aspect = "square"
    (tmp_path / "config.json").write_text(json.dumps(run.to_dict()))
    model = runs.model_config(run)
    params = tiny.random_params(mllm.abstract_params(model))
    params = {
        name: part if name == "connector" else jax.tree.map(lambda leaf: (2 * leaf).astype(dtype), part)
        for name, part in params.items()
    }
    saved_params.save_params(tmp_path / "params" / "finetune", params)
    trained = mllm_jax.load(tmp_path)
    export = ["export", "--from", tmp_path, "--stage", "finetune", "--format", form, "--to", tmp_path / "out"]
    assert main([str(each) for each in export]) == 0
    exported = mllm_jax.load(tmp_path / "out")
    assert exported.config.dtype == dtype
    assert exported.config.attention == trained.config.attention == "xla"
    assert exported.template == trained.template
    assert exported.processor == trained.processor
    for file in files[:2]:
        layout = trained.config.visual_layout()
        np.testing.assert_array_equal(
            exported.image(file.read_bytes(), "it", layout), trained.image(file.read_bytes(), "it", layout)
        )
        np.testing.assert_array_equal(exported.logits(file, "what?"), trained.logits(file, "what?"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, "bfloat16"),
        ({"text": {"dtype": "float16"}}, "float16"),
        ({"torch_dtype": "float64"}, "float32"),  # that of the weights
        ({}, "float32"),
    ],
)
def test_a_published_checkpoint_is_computed_in_its_own_dtype(fields, expected, tiny_model, tmp_path, files):
    config = dataclasses.replace(tiny_model, connector="mlp2x_gelu", connector_options=())
    params = tiny.random_params(mllm.abstract_params(config))
    checkpoints.save_llava_hf(tmp_path, config, params, tiny.make_tokenizer())
    written = json.loads((tmp_path / "config.json").read_text())
    for part in (written, written["text_config"]):
        part.pop("torch_dtype", None)
    written.pop("mllm_jax")  # now it is somebody else's
    written["text_config"] |= fields.get("text", {})
    written |= {key: value for key, value in fields.items() if key != "text"}
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = mllm_jax.load(tmp_path, template="mistral_instruct")
    assert (loaded.config.dtype, loaded.config.param_dtype) == (expected, expected)
    assert np.isfinite(loaded.logits(files[0], "what?")).all()
    asked = mllm_jax.load(tmp_path, template="mistral_instruct", dtype="bfloat16")
    assert asked.config.dtype == "bfloat16"
    assert asked.params["llm"]["embedding"].dtype == "bfloat16"


def test_what_a_checkpoint_does_not_say_is_asked_for(directory, tmp_path):
    with pytest.raises(ConfigError, match=r"template=NAME.*vicuna_v1"):
        mllm_jax.load(directory)
    with pytest.raises(ConfigError, match=r"unknown template 'vicuna'.*did you mean"):
        mllm_jax.load(directory, template="vicuna")
    with pytest.raises(ConfigError, match="dtype='float64'; valid: float32, bfloat16, float16"):
        mllm_jax.load(directory, template="mistral_instruct", dtype="float64")
    with pytest.raises(ConfigError, match="stage='finetune' is of a run"):
        mllm_jax.load(directory, template="mistral_instruct", stage="finetune")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        mllm_jax.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no directory"):
        mllm_jax.load(tmp_path / "nothing" / "at" / "all", template="mistral_instruct")


def test_fingerprint_is_the_one_that_kept_answers_have(tiny_model, tiny_params):
    """Stored answers are reused only if this digest stays."""
    model = Model(
        tiny_model,
        tiny_params,
        tiny.make_tokenizer(),
        ImageProcessor.clip(tiny.IMAGE_SIZE),
        "mistral_instruct",
    )
    assert model.fingerprint == FINGERPRINT
    arranged = dataclasses.replace(tiny_model, remat="full", vision_remat="dots")
    assert dataclasses.replace(model, config=arranged).fingerprint == FINGERPRINT
    assert dataclasses.replace(model, template="vicuna_v1").fingerprint != FINGERPRINT


FINGERPRINT = "aff4109db29866a2"
