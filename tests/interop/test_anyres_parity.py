"""Images in tiles against torch: transformers' LLaVA-NeXT and OneVision, LLaVA-1.6's layout, Dense Connector."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import mllm_jax
from mllm_jax.cli.main import main
from mllm_jax.data.anyres import Tiles
from mllm_jax.data.video_layout import Video
from mllm_jax.inference.batching import lay_out, stack_images
from mllm_jax.inference.prompts import Prompts
from mllm_jax.interop.checkpoints import load_model, save_llava_hf
from mllm_jax.models import mllm

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch_oracle import assert_close, randomize, save  # noqa: E402

SIDE, IMAGE, VOCAB = 12, 261, 264
VISION = {
    "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 3, "num_hidden_layers": 5, "image_size": SIDE,
    "patch_size": 4,
}  # fmt: skip
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
NEXT = [[12, 24], [24, 12], [24, 24], [36, 12], [12, 36]]
ONEVISION = [[12 * rows, 12 * columns] for rows in range(1, 5) for columns in range(1, 5)]
# Height and width of the images of each row: several aspect ratios, text only, two images, one that is shrunk.
ROWS = [[(20, 31)], [], [(50, 9)], [(12, 12), (9, 33)], [(70, 90)]]
WORDS = ["what is it?", "who?", "where is the cat?", "which is larger?", "and this"]


def picture(size):
    return np.random.default_rng(size[0] * 1000 + size[1]).integers(0, 256, (*size, 3), np.uint8)


def torch_model(family):
    """A tiny random model of transformers and its image processor, without torch."""
    if family == "LlavaNext":
        kind, settings, vision, text = "llava_next", {"image_grid_pinpoints": NEXT}, "CLIP", "Llama"
        processor = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    else:
        kind, vision, text = "llava_onevision", "Siglip", "Qwen2"
        settings = {"image_grid_pinpoints": ONEVISION, "vision_aspect_ratio": "anyres_max_2"}
        processor = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    config = getattr(transformers, f"{family}Config")(
        vision_config=getattr(transformers, f"{vision}VisionConfig")(**VISION),
        text_config=getattr(transformers, f"{text}Config")(**TEXT),
        image_token_index=IMAGE,
        **settings,
    )
    module = __import__(f"transformers.models.{kind}.image_processing_pil_{kind}", fromlist=["x"])
    pil = getattr(module, f"{family}ImageProcessorPil")
    grid = {"image_grid_pinpoints": settings["image_grid_pinpoints"]}
    return randomize(getattr(transformers, f"{family}ForConditionalGeneration")(config)), pil(
        **processor, **grid
    )


def saved(theirs, processor, directory):
    save(theirs, directory)
    tiny.make_tokenizer().save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["LlavaNext", "LlavaOnevision"])
def case(request, tmp_path_factory):
    """(transformers' model, its image processor, the directory of both, ours)."""
    theirs, processor = torch_model(request.param)
    directory = saved(theirs, processor, tmp_path_factory.mktemp(request.param))
    return theirs, processor, directory, mllm_jax.load(directory, template="vicuna_v1")


def asked(model, rows=ROWS):
    images = [[picture(size) for size in sizes] or None for sizes in rows]
    return Prompts(model, images, WORDS[: len(rows)])


def their_inputs(processor, prompts, rows=ROWS):
    """One batch for transformers: rows padded on the right, images of all rows."""
    requests = [prompts.request(index) for index in range(len(rows))]
    length = max(len(request.prompt) for request in requests)
    ids, mask = np.zeros((len(rows), length), int), np.zeros((len(rows), length), int)
    for row, request in enumerate(requests):
        visual = request.prompt.image_of >= 0
        ids[row, : len(visual)] = np.where(visual, IMAGE, request.prompt.tokens)
        mask[row, : len(visual)] = 1
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    pictures = [[Image.fromarray(picture(size)) for size in sizes] for sizes in rows if sizes]
    if pictures:
        many = "Onevision" in type(processor).__name__
        found = processor(pictures if many else [one for own in pictures for one in own], return_tensors="np")
        inputs["pixel_values"] = torch.tensor(np.asarray(found["pixel_values"]))
        inputs["image_sizes"] = torch.tensor(np.asarray(found["image_sizes"]))
        if many:
            inputs["batch_num_images"] = torch.tensor(found["batch_num_images"])
    return inputs, requests


def our_logits(model, prompts, requests):
    """Logits of all rows as one batch."""
    config = model.config
    length = max(len(request.prompt) for request in requests)
    rows = lay_out([(r.prompt, 0, len(r.prompt)) for r in requests], length, len(requests))
    images = [list(map(prompts.load_image, r.images, r.prompt.layouts)) for r in requests]
    slots = max(r.prompt.num_slots for r in requests)
    pixels, mask = stack_images(images, len(requests), slots, config.slot_size)
    rows = rows.replace(images=pixels, image_mask=mask)
    return jax.jit(lambda p, b: mllm.apply(config, p, b))(model.params, rows)


def test_frames_of_a_video_are_pooled_and_end_as_in_onevision(case, tmp_path):
    """By what checkpoints say: that of transformers' class, and one in OneVision's own layout, as it is published."""
    theirs, processor, _, model = case
    if "Onevision" not in type(theirs).__name__:
        assert model.config.video is None
        pytest.skip("LLaVA-NeXT reads images alone")
    fields = {
        "model_type": "llava", "architectures": ["LlavaQwenForCausalLM"], "image_aspect_ratio": "anyres_max_2",
        "image_grid_pinpoints": [[w, h] for h, w in ONEVISION], "mm_newline_position": "one_token",
        "mm_spatial_pool_mode": "bilinear", "mm_resampler_type": None, "mm_vision_tower_lr": 2e-06,
        "pos_skipping_range": 4096, "use_pos_skipping": False,
    }  # fmt: skip
    published = original(theirs, tmp_path, **fields)
    processor.save_pretrained(tmp_path / "tower")
    published = mllm_jax.load(published, template="vicuna_v1")
    frames = np.random.default_rng(0).integers(0, 256, (9, SIDE, SIDE, 3), np.uint8)
    picked = frames[np.linspace(0, 8, 4, dtype=int)].transpose(0, 3, 1, 2)
    pixels = torch.tensor((picked / np.float32(255) - np.float32(0.5)) / np.float32(0.5))[None]
    for ours, layer in ((model, theirs.config.vision_feature_layer), (published, -2)):
        with torch.no_grad():
            found = theirs.get_video_features(
                pixels, vision_feature_layer=layer, vision_feature_select_strategy="full"
            )
        (expected,) = found.pooler_output
        assert ours.config.video == Video(32, "linspace", "bilinear2d", newline="one_token")
        states = ours.with_video(frames=4).hidden_states(video=frames, prompt="what?")
        assert len(expected) == 4 * 2 * 2 + 1
        assert_close(states.llm[0][states.image_of == 0], expected, "video")


def test_logits_of_several_aspect_ratios_and_text_in_one_batch(case):
    theirs, processor, _, model = case
    assert model.config.tiles == Tiles(
        tuple((w // SIDE, h // SIDE) for h, w in theirs.config.image_grid_pinpoints),
        rounding="round",
        max_tiles=2 if "Onevision" in type(theirs).__name__ else 0,
        several="whole" if "Onevision" in type(theirs).__name__ else "tiles",
    )
    prompts = asked(model)
    inputs, requests = their_inputs(processor, prompts)
    with torch.no_grad():
        expected = theirs(**inputs).logits
    ours = our_logits(model, prompts, requests)
    for row, request in enumerate(requests):
        here = slice(len(request.prompt))
        assert_close(ours[row, here], expected[row, here], f"logits of row {row}")
    if model.config.tiles.max_tiles:
        (layout,) = requests[-1].prompt.layouts
        assert ((layout.weights > 0).sum(axis=1) > 1).any()  # it is shrunk


def test_greedy_answers(case):
    theirs, processor, _, model = case
    prompts = asked(model)
    stops = model.stops[0]
    answers = model.generate(
        [[picture(size) for size in sizes] or None for sizes in ROWS], WORDS, max_new_tokens=8, batch_size=5
    )
    for row, sizes in enumerate(ROWS):
        only = Prompts(model, [picture(size) for size in sizes] or None, WORDS[row])
        inputs, (request,) = their_inputs(processor, only, [sizes])
        with torch.no_grad():
            found = theirs.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
        new = found[0, len(request.prompt) :].tolist()
        new = new[: next((i for i, token in enumerate(new) if token in stops), len(new))]
        assert model.tokenizer.decode(new, skip_special_tokens=True).strip() == answers[row], row
    assert len(set(answers)) > 1
    assert len(prompts.texts) == len(answers)


def test_exported_and_read_again(case, tmp_path):
    theirs, processor, directory, _ = case
    model, params, report = load_model(directory)
    assert any(name.endswith("image_newline") for name in report.used)
    save_llava_hf(tmp_path / "out", model, params, tiny.make_tokenizer())
    again, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    same, back, _ = load_model(tmp_path / "out")
    assert same == model
    jax.tree.map(np.testing.assert_array_equal, back, params)
    kept = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert kept["image_grid_pinpoints"] == theirs.config.image_grid_pinpoints
    again.config.image_token_index = again.config.image_token_id = IMAGE
    loaded = mllm_jax.load(tmp_path / "out", template="vicuna_v1")
    inputs, requests = their_inputs(processor, asked(loaded))
    with torch.no_grad():
        expected = theirs(**inputs).logits
        found = again(**inputs).logits[..., :VOCAB]
    assert_close(found, expected, "logits of the export")
    assert loaded.config == model
    assert requests


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge": "spatial"}, "tiles.merge='spatial'"),
        ({"rounding": "floor"}, "tiles.rounding='floor'"),
        ({"several": "whole"}, "tiles.several='whole'"),
    ],
)
def test_what_transformers_does_not_compute_is_not_exported(change, message, tmp_path):
    theirs, processor = torch_model("LlavaNext")
    model, params, _ = load_model(saved(theirs, processor, tmp_path / "hf"))
    tiles = dataclasses.replace(model.tiles, **change)
    with pytest.raises(ValueError, match=message):
        save_llava_hf(tmp_path / "out", dataclasses.replace(model, tiles=tiles), params)
    assert not (tmp_path / "out").exists()


def original(theirs, directory, **fields):
    """As LLaVA-1.6 is published: `model.image_newline` beside the projector, the tower elsewhere."""
    save(theirs.model.vision_tower, directory / "tower")
    state = {f"model.{k}": v for k, v in theirs.model.language_model.state_dict().items()}
    state |= {"lm_head.weight": theirs.lm_head.weight, "model.image_newline": theirs.model.image_newline}
    for index, layer in ((0, "linear_1"), (2, "linear_2")):
        for kind in ("weight", "bias"):
            value = getattr(getattr(theirs.model.multi_modal_projector, layer), kind)
            state[f"model.mm_projector.{index}.{kind}"] = value
    directory = directory / "main"
    directory.mkdir()
    torch.save(
        {name: value.detach().clone() for name, value in state.items()}, directory / "pytorch_model.bin"
    )
    config = {
        **theirs.config.text_config.to_dict(), "model_type": "llava_llama", "mm_vision_tower": "tower",
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres", "image_grid_pinpoints": [[w, h] for h, w in NEXT],
        "image_crop_resolution": 224, "image_split_resolution": 224, **fields,
    }  # fmt: skip
    for key in ("rope_parameters", "_name_or_path"):
        config.pop(key, None)
    (directory / "config.json").write_text(json.dumps(config))
    tiny.make_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("fields", "width"),
    [({"mm_hidden_size": 24}, 24), ({"mm_dense_connector_type": "dci", "mm_hidden_size": 72}, 72)],
)
def test_the_own_layout_is_written_again(fields, width, tmp_path):
    """LLaVA-1.6 and Dense Connector AnyRes: the same names, entries and bits."""
    theirs, _ = torch_model("LlavaNext")
    theirs.model.multi_modal_projector.linear_1 = randomize(torch.nn.Linear(width, 16))
    directory = original(theirs, tmp_path, **fields)
    model, params, _ = load_model(directory)
    assert main(["export", "--from", str(directory), "--format", "llava", "--to", str(tmp_path / "out")]) == 0
    again, back, report = load_model(tmp_path / "out")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert set(torch.load(directory / "pytorch_model.bin")) == {
        n for n in report.used if "vision_tower" not in n
    }
    before, after = (
        json.loads((place / "config.json").read_text()) for place in (directory, tmp_path / "out")
    )
    for key in (
        "image_aspect_ratio",
        "mm_patch_merge_type",
        "image_grid_pinpoints",
        "mm_dense_connector_type",
    ):
        assert before.get(key) == after.get(key), key


def test_llava_16_in_its_own_layout(tmp_path):
    theirs, processor = torch_model("LlavaNext")
    directory = original(theirs, tmp_path)
    model = mllm_jax.load(directory, template="vicuna_v1")
    assert (model.config.tiles.rounding, model.config.tiles.merge) == ("floor", "spatial_unpad")
    prompts = asked(model)
    inputs, requests = their_inputs(processor, prompts)
    with torch.no_grad():
        expected = theirs(**inputs).logits
    ours = our_logits(model, prompts, requests)
    for row, request in enumerate(requests):
        here = slice(len(request.prompt))
        assert_close(ours[row, here], expected[row, here], f"logits of row {row}")


def test_dense_connector_anyres(tmp_path):
    """Dense Connector's definition on torch's hidden states, then LLaVA-1.6's merging, for one image."""
    theirs, _ = torch_model("LlavaNext")
    projector = theirs.model.multi_modal_projector
    projector.linear_1 = randomize(torch.nn.Linear(3 * 24, 16))
    fields = {"mm_dense_connector_type": "dci", "mm_hidden_size": 72}
    model = mllm_jax.load(original(theirs, tmp_path, **fields), template="vicuna_v1")
    assert model.config.connector == "dci"
    size = (20, 31)
    prompts = Prompts(model, picture(size), WORDS[0])
    request = prompts.request(0)
    (layout,) = request.prompt.layouts
    pixels = model.processor.normalize(prompts.load_image(request.images[0], layout))
    with torch.no_grad():
        states = theirs.model.vision_tower(
            torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True
        ).hidden_states
        states = [state[:, 1:] for state in states]
        means = [sum(states[k] for k in group) / len(group) for group in ((0, 1), (2, 3))]
        tokens = projector(torch.cat([states[4], *means], dim=-1))
        rows, columns = layout.canvas[0] // SIDE, layout.canvas[1] // SIDE
        grid = (
            tokens[1:]
            .reshape(rows, columns, 3, 3, 16)
            .permute(0, 2, 1, 3, 4)
            .reshape(rows * 3, columns * 3, 16)
        )
        height = int(size[0] * (columns * 3 / size[1]))  # wider than the canvas
        padding = (rows * 3 - height) // 2
        assert size[1] / size[0] > columns / rows
        grid = grid[padding : rows * 3 - padding]
        newline = theirs.model.image_newline.expand(len(grid), 1, 16)
        visual = torch.cat([tokens[0], torch.cat([grid, newline], dim=1).reshape(-1, 16)])
        ids = request.prompt.tokens
        embeddings = theirs.model.language_model.embed_tokens(torch.tensor(ids)[None].long())
        embeddings[0, request.prompt.image_of >= 0] = visual
        expected = theirs.lm_head(theirs.model.language_model(inputs_embeds=embeddings).last_hidden_state)[0]
    assert len(visual) == layout.num_tokens == 9 + len(grid) * (columns * 3 + 1)
    assert math.isfinite(float(expected.sum()))
    assert_close(model.logits(picture(size), WORDS[0]), expected, "logits")


@pytest.mark.parametrize(
    ("pinpoints", "expected"),
    [
        ("(1x1),...,(2x3)", ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3))),
        ("[(12, 24), (24, 12)]", ((1, 2), (2, 1))),
        ([[36, 12]], ((3, 1),)),
    ],
)
def test_pinpoints_as_they_are_spelled(pinpoints, expected, tmp_path):
    theirs, _ = torch_model("LlavaNext")
    model, _, _ = load_model(
        original(theirs, tmp_path, image_grid_pinpoints=pinpoints, image_aspect_ratio="anyres_max_4")
    )
    assert model.tiles == Tiles(expected, max_tiles=4, several="whole")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_grid_pinpoints": [[12, 13]]}, r"image_grid_pinpoints holds \[12, 13\]"),
        ({"image_grid_pinpoints": "__import__('os')"}, "image_grid_pinpoints="),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints=None"),
        ({"image_grid_pinpoints": [[12 * 10**6, 12]]}, "MAX_IMAGE_SIDE"),
        ({"mm_patch_merge_type": "spatial_bilinear"}, "mm_patch_merge_type='spatial_bilinear'"),
        (
            {"image_aspect_ratio": "anyres_max", "mm_patch_merge_type": "flat"},
            "image_aspect_ratio='anyres_max'",
        ),
        ({"image_aspect_ratio": "highres", "mm_patch_merge_type": "flat"}, "image_aspect_ratio='highres'"),
        ({"image_aspect_ratio": "pad"}, "mm_patch_merge_type='spatial_unpad'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, message, tmp_path):
    theirs, _ = torch_model("LlavaNext")
    with pytest.raises(ValueError, match=message):
        load_model(original(theirs, tmp_path, **fields))
