"""Features on disk: found by picture and key, never another key's, complete or not there."""

import json
import os
import time

import jax
import numpy as np
import pytest

from mllm_jax import files
from mllm_jax.data.feature_cache import FeatureCache, FeatureCacheError, digest
from mllm_jax.data.layout import Slot, WholeImage
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.rows import ImageReader, RowEncoder, stack_rows
from mllm_jax.data.samples import Sample

KEY = {"weights": "abc", "image_size": 28}
SHAPE = (2, 4, 3)
PICTURES = [digest(f"picture {i}".encode()) for i in range(5)]


def spec(dtype="float32", *shapes):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes or (SHAPE,)]


def values(count, dtype="float32", shape=SHAPE):
    return np.random.default_rng(0).standard_normal((count, *shape)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read_bit_for_bit_also_by_another_process(tmp_path, dtype):
    import ml_dtypes  # noqa: F401  (registers bfloat16)

    shapes = (SHAPE, (1, 9, 5))  # of two encoders on grids of their own
    cache = FeatureCache(tmp_path, KEY, spec(dtype, *shapes))
    assert json.loads((cache.directory / "key.json").read_text())["maps"] == [[1, 9, 5]]
    features = [values(5, dtype, shape) for shape in shapes]
    cache.write(PICTURES[:3], [each[:3] for each in features])
    assert len(cache) == 0  # seen when looked for again, like another process's
    cache.refresh()
    cache.write(PICTURES[3:], [each[3:] for each in features])
    other = FeatureCache(tmp_path, KEY, spec(dtype, *shapes))
    assert (len(cache), len(other)) == (3, 5)
    for picture, *expected in zip(PICTURES, *features, strict=True):
        assert picture in other
        for found, one in zip(other.read(picture), expected, strict=True):
            assert found.dtype == np.dtype(dtype)
            np.testing.assert_array_equal(found.view(np.uint8), one.view(np.uint8))
    assert not list(cache.directory.glob("*.part"))


@pytest.mark.parametrize(
    ("key", "shape", "dtype"),
    [
        (KEY | {"weights": "abd"}, SHAPE, "float32"),
        (KEY | {"processor": {"aspect": "pad"}}, SHAPE, "float32"),
        (KEY, (2, 4, 6), "float32"),
        (KEY, SHAPE, "float16"),
    ],
)
def test_another_key_never_sees_them(tmp_path, key, shape, dtype):
    cache = FeatureCache(tmp_path, KEY, spec())
    cache.write(PICTURES, [values(5)])
    other = FeatureCache(tmp_path, key, spec(dtype, shape))
    assert other.directory != cache.directory
    assert len(other) == 0
    with pytest.raises(FeatureCacheError, match="has no features of an image"):
        other.read(PICTURES[0])


def test_a_folder_of_another_key_is_refused(tmp_path):
    cache = FeatureCache(tmp_path, KEY, spec())
    found = json.loads((cache.directory / "key.json").read_text())
    assert (found["weights"], found["shape"], found["dtype"]) == ("abc", list(SHAPE), "float32")
    (cache.directory / "key.json").write_text(json.dumps(found | {"weights": "forged"}))
    with pytest.raises(FeatureCacheError, match="is not the key of these features"):
        FeatureCache(tmp_path, KEY, spec())


def test_damaged_and_lost_shards_are_named(tmp_path):
    cache = FeatureCache(tmp_path, KEY, spec())
    cache.write(PICTURES, [values(5)])
    cache.refresh()
    (shard,) = cache.directory.glob("*.features")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(FeatureCacheError, match=f"{shard.name} is damaged; remove it"):
        FeatureCache(tmp_path, KEY, spec())
    with pytest.raises(FeatureCacheError, match="has become shorter"):
        cache.read(PICTURES[4])
    shard.unlink()
    with pytest.raises(FeatureCacheError, match="cannot be read"):
        cache.read(PICTURES[0])


def test_a_failed_write_leaves_no_shard(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, KEY, spec())

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            cache.write(PICTURES, [values(5)])
    assert [path.name for path in cache.directory.iterdir()] == ["key.json"]
    with pytest.raises(ValueError, match=r"expected \(2, 4, 3\) float32 each"):
        cache.write(PICTURES, [values(4)])


def test_what_a_killed_run_has_left_is_removed_when_it_is_old(tmp_path):
    cache = FeatureCache(tmp_path, KEY, spec())
    old, new = (cache.directory / f".{name}.features.0123456789abcdef.part" for name in ("old", "new"))
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    files.remove_stale(cache.directory)
    assert not old.exists()
    assert new.exists()  # perhaps another run's, being written


def test_rows_hold_features_in_place_of_pictures(tmp_path):
    from test_pipeline import TOKENIZER

    cache = FeatureCache(tmp_path, KEY, spec())
    features = values(2)
    pixels = np.full((4, 6, 3), 7, np.uint8)
    cache.write([digest(b"not even an image"), digest(pixels)], [features])
    cache.refresh()
    encoder = RowEncoder(
        ImageReader(ImageProcessor.clip(8)),
        WholeImage(Slot(4, size=(8, 8))),
        TOKENIZER,
        "mistral_instruct",
        seq_len=48,
        image_slots=3,
        features=cache,
    )
    turns = ({"from": "human", "value": "<image><image>q"}, {"from": "gpt", "value": "ok"})
    row = encoder([Sample("two", (b"not even an image", pixels), turns)])
    batch = stack_rows([row, encoder([])]).arrays
    assert batch.images is None
    (found,) = batch.features
    assert found.shape == (2, 3, *SHAPE)
    np.testing.assert_array_equal(found[0, :2], features)
    assert not found[0, 2].any()
    assert not found[1].any()
    assert batch.image_mask.tolist() == [[True, True, False], [False] * 3]
    with pytest.raises(FeatureCacheError, match="has no features"):
        encoder([Sample("new", (b"a", b"b"), turns)])
