"""Training from a feature cache: the same numbers, without running the tower; filled once, resumed, refused."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny

from mllm_jax.config import ConfigError
from mllm_jax.data.anyres import Tiles
from mllm_jax.data.feature_cache import FeatureCache, FeatureCacheError, digest, digests
from mllm_jax.data.images import ImageError
from mllm_jax.data.naflex import NaFlexProcessor
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.rows import ImageReader, RowEncoder, stack_rows
from mllm_jax.data.samples import Sample
from mllm_jax.evaluation.report.losses import read_metrics
from mllm_jax.inference import runs
from mllm_jax.interop import load_tokenizer
from mllm_jax.models import mllm, paths
from mllm_jax.models.convnext import ConvNextConfig
from mllm_jax.models.encoders import EncodersConfig
from mllm_jax.models.vit import VisionConfig, VisionTransformer
from mllm_jax.parallel.mesh import make_mesh
from mllm_jax.parallel.processes import OtherProcessError
from mllm_jax.training import features, preflight
from mllm_jax.training.step import loss_and_grads

STEPS = 3


@pytest.fixture
def reader(tiny_config):
    return ImageReader(runs.image_processor(tiny_config))


def source(count=5, copies=2, first=0):
    """`count` pictures, each in `copies` samples, with a second picture that all share; and one without."""
    turns = ({"from": "human", "value": "<image><image>q"}, {"from": "gpt", "value": "ok"})
    made = [
        Sample(f"s{i}_{j}", (tiny.png(first + i), tiny.png(99)), turns)
        for j in range(copies)
        for i in range(count)
    ]
    return [*made, Sample("text", (), ({"from": "human", "value": "q"}, turns[1]))]


def open_and_fill(tmp_path, model, params, reader, sources, **options):
    cache = features.open_cache(tmp_path, model, params["vision"], reader, "float32")
    return cache, features.fill(cache, sources, model, params["vision"], reader, **options)


def test_every_picture_is_encoded_once_and_as_the_model_does(
    tmp_path, tiny_model, tiny_params, reader, capsys
):
    data = {"a": source(), "b": source(first=3)}  # pictures 0-4, 3-7, and 99
    cache, count = open_and_fill(tmp_path, tiny_model, tiny_params, reader, data)
    assert count == len(cache) == 9
    said = capsys.readouterr().out
    assert "9 images of 1 x 16 x 32 float32 take 18.4 kB in" in said
    assert "free)" in said
    layout = tiny_model.visual_layout()
    images = np.concatenate([reader(sample, 0, layout) for sample in data["a"][:5]])
    (expected,) = jax.jit(lambda p, x: mllm.apply(tiny_model, p, x, method="features"))(tiny_params, images)
    for sample, one in zip(data["a"][:5], expected, strict=True):
        np.testing.assert_allclose(cache.read(digest(sample.images[0]))[0], one, atol=1e-5)
    again, count = open_and_fill(tmp_path, tiny_model, tiny_params, reader, data)
    assert (len(again), count) == (9, 0)
    assert "take" not in capsys.readouterr().out


def test_tiles_are_kept_slot_by_slot(tmp_path, tiny_model, tiny_params, reader):
    model = dataclasses.replace(tiny_model, tiles=Tiles())
    sizes = [(28, 28), (30, 75), (56, 56)]
    turns = ({"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "ok"})
    data = [Sample(f"s{i}", (tiny.png(i, size),), turns) for i, size in enumerate(sizes)]
    cache, count = open_and_fill(tmp_path, model, tiny_params, reader, {"a": data})
    layouts = [model.visual_layout(lambda size=size: size) for size in sizes]
    assert count == len(cache) == sum(len(layout.slots) for layout in layouts) == 3 + 4 + 5
    encode = jax.jit(lambda p, x: mllm.apply(model, p, x, method="features"))
    for sample, layout in zip(data, layouts, strict=True):
        (expected,) = encode(tiny_params, reader(sample, 0, layout))
        for one, found in zip(expected, digests(sample.images[0], layout), strict=True):
            np.testing.assert_allclose(cache.read(found)[0], one, atol=1e-5)
    assert open_and_fill(tmp_path, model, tiny_params, reader, {"a": data})[1] == 0


NAFLEX = VisionConfig(
    width=12, depth=2, heads=2, mlp_width=10, patch=4, image_size=12, class_token=False, pre_norm=False,
    patch_bias=True, interpolation="bilinear_antialias",
)  # fmt: skip
MINED = (VisionConfig(12, 2, 2, 10, 7, 14), ConvNextConfig((6, 10), (1, 1), 32))
SEVERAL_GRIDS = {
    "mining": ({"vision": EncodersConfig(MINED, (28, 32), "mining"), "image_size": 32}, 3),
    "views": (
        {"vision": EncodersConfig(MINED, (14, 64), "mining_all", 2, True), "image_size": 64},
        3,
    ),
    "own aspect ratio": ({"vision": NAFLEX, "max_patches": 20}, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEVERAL_GRIDS)
def test_several_grids_train_from_the_cache_as_from_images(kind, tmp_path, tiny_model, tiny_tokenizer):
    """Mined maps, views of a slot, and images of grids of their own: one loss and one gradient of the connector."""
    changes, grids = SEVERAL_GRIDS[kind]
    model = dataclasses.replace(tiny_model, connector="dci", connector_options=(("groups", 1),), **changes)
    assert len(model.features_spec) == grids
    params = tiny.random_params(mllm.abstract_params(model))
    processor = NaFlexProcessor.of(model) if model.max_patches else ImageProcessor.clip(model.image_size)
    turns = ({"from": "human", "value": "<image><image>q"}, {"from": "gpt", "value": "ok"})
    data = [Sample(f"s{i}", (tiny.png(i, (40, 25)), tiny.png(9, (20, 60))), turns) for i in range(2)]
    reader = ImageReader(processor)
    cache, count = open_and_fill(tmp_path, model, params, reader, {"a": data})
    assert count == 3

    def trained(features):
        encoder = RowEncoder(
            reader, model.visual_layout, tiny_tokenizer, "plain", seq_len=96, image_slots=3, features=features
        )
        batch = stack_rows([encoder([sample]) for sample in data]).arrays
        assert (batch.images is None) == (features is not None)

        def run(connector, frozen, batch):
            return loss_and_grads(model, {"connector": connector}, frozen, batch, 16, 1, jax.random.key(0))[
                :2
            ]

        frozen = {part: tree for part, tree in params.items() if part != "connector"}
        return jax.jit(run)(params["connector"], frozen, batch)

    (loss, grads), (cached_loss, cached_grads) = trained(None), trained(cache)
    np.testing.assert_allclose(cached_loss, loss, rtol=1e-6)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6), grads, cached_grads)


def test_a_stopped_run_goes_on_with_the_shards_that_it_has(
    tmp_path, tiny_model, tiny_params, reader, monkeypatch
):
    data = {"a": source(count=4, copies=1)}
    write, written = FeatureCache.write, []

    def killed(cache, pictures, values):
        if written:
            raise KeyboardInterrupt
        written.extend(pictures)
        write(cache, pictures, values)

    monkeypatch.setattr(features, "PER_DEVICE", 2)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            open_and_fill(tmp_path, tiny_model, tiny_params, reader, data, shard_bytes=1)
    cache, count = open_and_fill(tmp_path, tiny_model, tiny_params, reader, data)
    assert len(written) == 2
    assert (count, len(cache)) == (3, 5)


@pytest.mark.slow
def test_two_processes_share_the_work_and_read_the_same(tmp_path, run_two_processes):
    """Each encodes half for a common disk, and all of it for a disk of its own; one of them comes late every time."""
    script = pathlib.Path(__file__).parent / "two_processes_features.py"
    said = run_two_processes(script, tmp_path)
    (first, again, own), late = (json.loads(lines[-1]) for lines in said)
    assert [row[:3] for row in (first, again, own)] == [[9, 5, 5], [0, 0, 0], [9, 9, 9]]
    assert [row[:3] for row in late] == [[9, 4, 4], [0, 0, 0], [9, 9, 9]]
    # The same bits, whoever wrote and read them.
    assert len({row[3] for row in (first, again, own, *late)}) == 1


def test_bad_pictures_and_full_disks_are_found_before_training(
    tmp_path, tiny_model, tiny_params, reader, monkeypatch
):
    turns = source()[0].conversations
    bad = {"a": [Sample("junk", (b"no image", tiny.png(1)), turns, ("junk.png", "1.png"))]}
    with pytest.raises(ImageError, match=r"sample 'junk', junk\.png: not an image"):
        open_and_fill(tmp_path, tiny_model, tiny_params, reader, bad)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        FeatureCacheError, match=r"2 images' features take 4\.1 kB, and the disk has 1 kB free"
    ):
        open_and_fill(tmp_path, tiny_model, tiny_params, reader, {"a": source(1, 1)})


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize(
    ("owner", "part"), [(features, "_missing"), (features, "_compute"), (FeatureCache, "refresh")]
)
def test_a_failure_of_one_process_ends_the_others_too(
    owner, part, broken, as_processes, tmp_path, tiny_model, tiny_params, reader, monkeypatch
):
    """Wherever it is: in the search, in a process's share of the work, or when the shards of others are taken up."""
    done, opened = getattr(owner, part), []

    def work(index):
        cache = features.open_cache(tmp_path, tiny_model, tiny_params["vision"], reader, "float32")
        opened.append(index)
        return features.fill(cache, {"a": source()}, tiny_model, tiny_params["vision"], reader)

    def fail(*arguments, **options):
        if jax.process_index() == broken and (owner is features or broken in opened):
            raise OSError("disk full")
        return done(*arguments, **options)

    monkeypatch.setattr(owner, part, fail)
    found = as_processes(work)
    assert str(found[broken]) == "disk full"
    assert isinstance(found[1 - broken], OtherProcessError)


def test_everything_that_decides_the_features_is_in_the_key(
    tmp_path, tiny_model, tiny_params, tiny_config, reader
):
    import dataclasses

    def directory(model=tiny_model, params=tiny_params, reader=reader, dtype="float32"):
        return features.open_cache(tmp_path, model, params["vision"], reader, dtype).directory

    def changed(**fields):
        return dataclasses.replace(tiny_model, **fields)

    other = paths.flatten(tiny_params)
    other["vision/blocks/fc2/bias"] = other["vision/blocks/fc2/bias"].copy()
    other["vision/blocks/fc2/bias"][-1, -1] += 1e-6
    larger = dataclasses.replace(reader.processor, size=35, shortest_side=0)
    found = [
        directory(),
        directory(params=paths.unflatten(other)),
        directory(dtype="bfloat16"),
        directory(changed(dtype="bfloat16")),
        directory(changed(select_layer=1)),
        directory(changed(connector="sci", connector_options=(("layers", (0,)),))),
        directory(changed(image_size=35), reader=ImageReader(larger)),
        directory(changed(vision=dataclasses.replace(tiny_model.vision, activation="gelu"))),
        directory(reader=ImageReader(runs.image_processor(tiny_config, "square"))),
        directory(reader=dataclasses.replace(reader, compat="llava")),
    ]
    assert len(set(found)) == len(found)
    assert (
        directory(changed(connector="mlp2x_gelu", connector_options=())) == found[0]
    )  # needs the same state
    assert directory(changed(remat="full", vision_remat="full")) == found[0]


def test_a_stage_that_trains_the_tower_is_refused(tiny_config):
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    model, tokenizer = runs.model_config(tiny_config), load_tokenizer(tiny_config.model.llm.path)
    tiny_config.stages.finetune.cache_features = True
    preflight.check_stages(tiny_config, model, tokenizer, mesh)
    tiny_config.stages.finetune.lora.rank = 2
    tiny_config.stages.finetune.trainable = ("connector/.*",)
    tiny_config.stages.finetune.lora.targets = r"vision/blocks/q/kernel"
    with pytest.raises(
        ConfigError, match=r"'stages\.finetune\.cache_features': this stage trains the vision tower"
    ):
        preflight.check_stages(tiny_config, model, tokenizer, mesh)


@pytest.mark.slow
def test_training_is_the_same_and_does_not_run_the_tower(train, tiny_config, tmp_path, monkeypatch):
    """Stage 1 of the tiny recipe with `dci`, whose group means are cached too.

    Features that are on disk give the same parameters bit for bit. Those trained without a cache may differ by
    rounding, because the tower is then compiled into the update and sees other batches; AdamW divides by the gradient's
    size, so what hardly has a gradient can move differently by a share of the rate (here 0.01).
    """
    config = tiny_config
    del config.stages.finetune
    config.stage_order = ("pretrain",)
    config.stages.pretrain.steps = STEPS
    config.model.connector.name = "dci"
    config.model.connector.dci.groups = 1
    plain = train.train(config, tmp_path / "plain", evaluate=False)

    config.stages.pretrain.cache_features = True
    config.data.dir = str(tmp_path / "data")
    seen = []
    call = VisionTransformer.__call__

    def watched(tower, images, *arguments):
        seen.append(images.shape[0])
        return call(tower, images, *arguments)

    encoded = features.PER_DEVICE * len(jax.local_devices())
    trained = {}
    with monkeypatch.context() as patch:
        patch.setattr(VisionTransformer, "__call__", watched)
        for run, times in (("writes", 1), ("reads", 0)):
            trained[run] = paths.flatten(train.train(config, tmp_path / run, evaluate=False))
            assert set(seen) <= {1, encoded}  # 1: shapes of the parameters
            assert seen.count(encoded) == times
            seen.clear()
    (key,) = (tmp_path / "data" / "features").glob("*/key.json")
    assert json.loads(key.read_text())["request"]["means"]

    plain, cached = paths.flatten(plain), trained["writes"]
    assert set(plain) == set(cached)  # the tower is in the saved model as before
    for path, leaf in cached.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(trained["reads"][path]), err_msg=path)
        change = np.abs(np.asarray(leaf) - np.asarray(plain[path]))
        assert change.max() <= (2e-3 if path.startswith("connector/") else 0), path
    first, second, third = (
        read_metrics(tmp_path / run / "metrics.jsonl")["pretrain"] for run in ("plain", "writes", "reads")
    )
    assert len(first) == STEPS
    for name in ("loss", "grad_norm"):
        one, two = ([record[name] for record in records] for records in (first, second))
        np.testing.assert_allclose(one, two, rtol=1e-5)
        assert two == [record[name] for record in third]
