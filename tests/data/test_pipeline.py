"""The training input: complete, reproducible, independent of threads and processes, and exactly resumable."""

import copy
import io
import json
from collections import Counter

import jax
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mllm_jax.data.batch import Batch
from mllm_jax.data.conversations import SampleError
from mllm_jax.data.images import ImageError
from mllm_jax.data.layout import Slot, VisualLayout, WholeImage
from mllm_jax.data.pipeline import make_train_iterator, packing_plan
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.reading import DataError
from mllm_jax.data.rows import ImageReader, RowEncoder, Rows, TooManyLabels
from mllm_jax.data.samples import Sample
from mllm_jax.data.tfds_llava import prepare
from mllm_jax.data.tokens import SampleTooLong, TooManyImages

VISUAL, SIDE, LENGTH = 4, 8, 48


def byte_tokenizer():
    """One token per byte, and the end token of the vicuna template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {symbol: i + 2 for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZER = byte_tokenizer()


def picture(value):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


def sample(sample_id, images=(), answer="ok"):
    turns = (
        {"from": "human", "value": "<image>" * len(images) + "q"},
        {"from": "gpt", "value": answer},
    )
    return Sample(sample_id, tuple(images), turns, tuple(f"{i}.png" for i in range(len(images))))


def source(count, prefix="s", images=1, answer="ok"):
    return [sample(f"{prefix}{i}", [picture(i)] * images, answer) for i in range(count)]


RULE = WholeImage(Slot(VISUAL, size=(SIDE, SIDE)))


def encoder(rule=RULE, compat=None, max_image_pixels=None, **options):
    """A row encoder with short rows and the byte tokenizer."""
    processor = ImageProcessor.clip(rule.slot.size[0], aspect="pad")
    reader = ImageReader(processor, compat, max_image_pixels)
    settings = {"seq_len": LENGTH, "image_slots": 2} | options
    return RowEncoder(reader, rule, TOKENIZER, "mistral_instruct", **settings)


OF_ENCODER = (
    "rule",
    "compat",
    "max_image_pixels",
    "seq_len",
    "image_slots",
    "overlong",
    "label_tokens",
    "samples_per_row",
    "features",
)


def make(sources, sizes=None, **options):
    rows = encoder(**{key: options.pop(key) for key in OF_ENCODER if key in options})
    options = {"batch_size": 4, "seed": 0, "num_threads": 0} | options
    if sizes is not None:
        order = {key: options[key] for key in ("seed", "epochs", "weights") if key in options}
        options["packing"] = packing_plan(sources, sizes, rows.limits, **order)
    return make_train_iterator(sources, rows, **options)


def ids_of(iterator):
    return [row for batch in iterator for row in batch.ids]


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.ids == other.ids
        jax.tree.map(np.testing.assert_array_equal, batch.arrays, other.arrays)
        assert jax.tree.map(lambda x: x.dtype, batch.arrays) == jax.tree.map(lambda x: x.dtype, other.arrays)


def test_batches_have_the_documented_shapes_and_contents():
    samples = [sample("none"), sample("one", [picture(9)]), sample("two", [picture(1), picture(2)], "yes")]
    iterator = make([samples], image_slots=3)
    (rows,) = list(iterator)
    batch = rows.arrays
    spec = Batch.spec(4, length=LENGTH, slots=3, image_size=(SIDE, SIDE))
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch) == spec

    row = rows.ids.index("two")
    assert batch.image_mask[row].tolist() == [True, True, False]
    expected = ImageProcessor.clip(SIDE, aspect="pad")(np.full((4, 6, 3), (2, 0, 253), np.uint8))
    np.testing.assert_array_equal(batch.images[row, 1], expected)
    assert not batch.images[row, 2].any()
    index = batch.visual_index[row]
    assert index[index >= 0].tolist() == list(range(2 * VISUAL))
    learned = batch.tokens[row][batch.loss_weights[row] > 0]
    assert TOKENIZER.decode(learned) == " yes </s>"

    row = rows.ids.index("none")
    assert not batch.image_mask[row].any()
    assert (batch.visual_index[row] == -1).all()
    assert batch.loss_weights[row].sum() > 0

    row = rows.ids.index("")  # the fourth row of a batch of four, for three samples
    for field in (
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        batch.loss_weights,
        batch.images,
        batch.image_mask,
    ):
        assert not field[row].any()
    assert (batch.visual_index[row] == -1).all()
    assert (iterator.num_samples, iterator.num_batches, iterator.skipped) == (3, 1, 0)


def test_every_sample_once_per_epoch_in_a_new_seeded_order():
    data = [source(7), source(4, "t", images=0)]
    ids = ids_of(make(data, epochs=3))
    assert len(ids) == 36
    assert ids[33:] == [""] * 3
    epochs = [ids[:11], ids[11:22], ids[22:33]]
    everything = {f"s{i}" for i in range(7)} | {f"t{i}" for i in range(4)}
    assert all(set(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert ids_of(make(data, epochs=3)) == ids
    assert ids_of(make(data, epochs=3, seed=1)) != ids
    assert ids_of(make(data, epochs=1, seed=1))[:11] not in epochs  # seeds do not share orders
    assert any(set(epoch[:7]) != {f"s{i}" for i in range(7)} for epoch in epochs)  # the sources are mixed


def test_weights_set_the_mixture():
    data = [source(30), source(10, "t", images=0)]
    iterator = make(data, weights=[1, 3], epochs=2, batch_size=8)
    ids = ids_of(iterator)
    counts = Counter(row[0] for row in ids)
    assert counts == {"s": 20, "t": 60}
    assert iterator.num_samples == 80
    assert set(Counter(row for row in ids if row[0] == "t").values()) == {6}  # reshuffled and used up evenly
    firsts = [row for row in ids if row[0] == "t"]
    assert firsts[:10] != firsts[10:20]


@pytest.mark.parametrize("weights", [None, [2, 1]])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_every_batch_without_overlap(weights, processes):
    data = [source(5), source(4, "t", images=0)]
    options = {"weights": weights, "epochs": 2, "batch_size": 4}
    whole = list(make(data, **options))
    parts = [
        list(make(data, **options, process_index=index, process_count=processes))
        for index in range(processes)
    ]
    for step, batch in enumerate(whole):
        arrays = jax.tree.map(lambda *shares: np.concatenate(shares), *(part[step].arrays for part in parts))
        ids = [row for part in parts for row in part[step].ids]
        assert_same([Rows(arrays, ids, [])], [batch])
    assert {len(part) for part in parts} == {len(whole)}


@pytest.mark.parametrize("weights", [None, [1, 1]])
@pytest.mark.parametrize("threads", [0, 3])
def test_resuming_gives_bitwise_the_same_remaining_batches(weights, threads):
    data = [source(9), source(6, "t", images=0)]
    options = {"weights": weights, "epochs": 3, "batch_size": 2}
    unbroken = list(make(data, **options))
    with make(data, **options, num_threads=threads) as iterator:
        first = [next(iterator) for _ in range(9)]  # past the first epoch
        state = json.loads(json.dumps(iterator.get_state()))
        rest = list(iterator)
    assert_same(first + rest, unbroken)
    with make(data, **options, num_threads=3 - threads) as resumed:
        resumed.set_state(state)
        assert resumed.get_state() == state
        assert_same(resumed, unbroken[9:])
    halves = [make(data, **options, process_index=index, process_count=2) for index in (0, 1)]
    for half in halves:  # also on another number of processes
        half.set_state(state)
    assert next(halves[0]).ids + next(halves[1]).ids == unbroken[9].ids
    assert halves[0].get_state() == halves[1].get_state()


PACKED = {"seq_len": 4 * LENGTH, "image_slots": 4, "samples_per_row": 5}


def sizes_of(sources, **options):
    rows = encoder(**options)
    return np.array([rows.needs(one) for source in sources for one in source])


@pytest.mark.parametrize("weights", [None, [1, 2]])
def test_packed_rows_hold_each_sample_once_an_epoch_and_resume(weights):
    data = [source(9), source(6, "t", images=0), source(3, "u", images=2)]
    weights = weights and [*weights, 1]
    options = PACKED | {"sizes": sizes_of(data, **PACKED), "weights": weights, "epochs": 2, "batch_size": 7}
    iterator = make(data, **options)
    unbroken = list(iterator)
    assert iterator.rows == 2
    assert len(unbroken) == iterator.num_batches < 9
    assert iterator.num_samples == 36
    assert max(batch.arrays.segment_ids.max() for batch in unbroken) > 2
    seen = Counter(name for batch in unbroken for row in batch.ids if row for name in row.split(", "))
    assert sum(seen.values()) == 36
    if weights is None:
        assert set(seen.values()) == {2}
    else:  # in proportion, each source used up before it repeats
        of = {name: [count for one, count in seen.items() if one[0] == name] for name in "stu"}
        assert [sum(of[name]) for name in "stu"] == [9, 18, 9]
        assert all(max(counts) - min(counts) <= 1 for counts in of.values())
    with make(data, **options, num_threads=3) as first:
        begun = [next(first) for _ in range(3)]
        state = json.loads(json.dumps(first.get_state()))
    with make(data, **options) as resumed:
        resumed.set_state(state)
        assert_same(begun + list(resumed), unbroken)
    halves = [make(data, **options, process_index=index, process_count=2) for index in (0, 1)]
    for half in halves:
        half.set_state(state)
    assert next(halves[0]).ids + next(halves[1]).ids == unbroken[3].ids
    with pytest.raises(DataError, match="'packing' was"):
        make(data, **options | {"samples_per_row": 4}).set_state(state)


def test_shorter_samples_make_smaller_batches_of_as_many_samples():
    data, rows, steps = [source(60)], {}, {}
    for visual in (100, 32, 2):
        options = PACKED | {
            "rule": WholeImage(Slot(visual, size=(SIDE, SIDE))),
            "image_slots": 9,
            "samples_per_row": 9,
        }
        iterator = make(data, **options, sizes=sizes_of(data, **options), batch_size=24)
        rows[visual], steps[visual] = iterator.rows, iterator.num_batches
        batches = list(iterator)
        assert {batch.arrays.tokens.shape[0] for batch in batches} == {iterator.rows}
        held = [sum(len(row.split(", ")) for row in batch.ids if row) for batch in batches]
        assert sum(held) == 60
        assert all(20 <= count <= 28 for count in held[:-1])
    assert rows[100] > rows[32] > rows[2]
    assert set(steps.values()) <= {3, 4}


def test_packed_batches_hold_the_same_on_any_number_of_devices():
    data = [source(20)]
    options = PACKED | {"sizes": sizes_of(data, **PACKED), "batch_size": 12, "epochs": 2}
    plain = make(data, **options)
    filled = make(data, **options, row_multiple=4)
    assert plain.rows < filled.rows == 4
    expected = list(plain)
    for batch, other in zip(expected, filled, strict=True):
        assert other.ids == batch.ids + [""] * (4 - plain.rows)
        assert not other.arrays.segment_ids[plain.rows :].any()
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[: len(y)], y), other.arrays, batch.arrays)
    halves = [make(data, **options, row_multiple=3, process_index=i, process_count=2) for i in (0, 1)]
    assert halves[0].rows == 6
    for batch, one, other in zip(expected, *halves, strict=True):
        assert [each for each in one.ids + other.ids if each] == [each for each in batch.ids if each]


def test_a_sample_that_a_packed_row_cannot_hold_is_left_out_alone():
    data = [[*source(4), sample("long", [], "word " * 200)]]
    options = PACKED | {"overlong": "skip"}
    batches = list(make(data, **options, sizes=sizes_of(data, **options), batch_size=1))
    (message,) = [message for batch in batches for message in batch.skipped]
    assert "'long': has" in message
    kept = sorted(name for batch in batches for row in batch.ids if row for name in row.split(", "))
    assert kept == ["s0", "s1", "s2", "s3"]


def test_a_row_with_more_supervised_tokens_than_its_samples_were_measured_to_have_is_an_error():
    data = [source(12)]
    sizes = sizes_of(data, **PACKED)
    found = make(data, **PACKED, sizes=sizes)
    assert (
        max(np.count_nonzero(batch.arrays.loss_weights, axis=1).max() for batch in found)
        <= found.label_tokens
    )
    sizes[:, 2] //= 3  # of other data
    with pytest.raises(SampleError, match="stored sizes"):
        list(make(data, **PACKED, sizes=sizes))


def test_the_state_can_go_back_and_forth_in_one_iterator():
    iterator = make([source(8)], epochs=None, batch_size=4, num_threads=2)
    assert (iterator.num_batches, iterator.num_samples) == (None, None)
    with iterator:
        start = iterator.get_state()
        batches = [next(iterator) for _ in range(5)]
        later = iterator.get_state()
        iterator.set_state(start)
        assert_same([next(iterator) for _ in range(5)], batches)
        assert iterator.get_state() == later
        iterator.close()
        following = next(iterator).ids  # closing loses nothing
    assert sorted(batches[4].ids + following) == sorted(f"s{i}" for i in range(8))


def test_a_state_of_other_data_is_refused():
    state = make([source(8)]).get_state()
    with pytest.raises(ValueError, match="'seed' was 0, now it is 1"):
        make([source(8)], seed=1).set_state(state)
    with pytest.raises(ValueError, match="'batch_size' was 4, now it is 2"):
        make([source(8)], batch_size=2).set_state(state)
    with pytest.raises(
        DataError, match=r"'sources' was .*; give the data and settings of the run's beginning"
    ):
        make([source(9)]).set_state(state)
    with pytest.raises(ValueError, match="'weights' was None"):
        make([source(8)], weights=[1]).set_state(state)
    with pytest.raises(ValueError, match="data state of version 9"):
        make([source(8)]).set_state(state | {"version": 9})
    make([source(8)], epochs=7).set_state(state)  # a longer run may continue a shorter one


def test_too_many_labels_are_an_error_or_counted_and_left_out():
    data = [*source(3), sample("chatty", [picture(0)], "yes yes")]
    learned = int((encoder()([data[3]]).arrays.loss_weights != 0).sum())
    assert sorted(ids_of(make([data], label_tokens=learned))) == ["chatty", "s0", "s1", "s2"]
    with pytest.raises(TooManyLabels, match=rf"'chatty': has {learned} supervised tokens, more") as error:
        list(make([data], label_tokens=learned - 1))
    again = copy.copy(error.value)  # rebuilt as it is from a worker process
    assert (str(again), again.count, again.limit) == (str(error.value), learned, learned - 1)
    iterator = make([data], label_tokens=learned - 1, overlong="skip")
    (batch,) = list(iterator)
    row = batch.ids.index("")
    assert not batch.arrays.loss_weights[row].any()
    assert not batch.arrays.image_mask[row].any()
    assert batch.skipped == [str(error.value)]
    assert iterator.skipped == 1


def test_overlong_samples_are_an_error_or_counted_and_left_out():
    data = [*source(3), sample("long", [picture(0)], "word " * 20)]
    with pytest.raises(SampleTooLong, match=r"'long': has \d+ tokens .* limit of 48") as error:
        list(make([data], num_threads=2))
    length = error.value.length
    assert length > LENGTH
    iterator = make([data], overlong="skip", epochs=2, batch_size=2)
    batches = list(iterator)
    assert iterator.skipped == 2
    assert sorted(row for batch in batches for row in batch.ids) == sorted(["", "s0", "s1", "s2"] * 2)
    messages = [message for batch in batches for message in batch.skipped]
    assert (
        messages
        == [f"sample 'long': has {length} tokens (visual tokens included), more than the limit of 48"] * 2
    )
    for batch in batches:
        rows = [index for index, row in enumerate(batch.ids) if not row]
        assert not batch.arrays.segment_ids[rows].any()
        assert not batch.arrays.loss_weights[rows].any()
    assert "" not in next(make([data], seq_len=length)).ids  # exactly fitting is not too long
    with pytest.raises(SampleTooLong):
        list(make([data], seq_len=length - 1))
    with pytest.raises(ValueError, match="overlong 'cut': choose"):
        make([data], overlong="cut")


@pytest.mark.parametrize("threads", [0, 2])
def test_bad_samples_stop_the_run_and_are_named(threads):
    bad = {
        "junk": (sample("junk", [b"not an image"]), ImageError, r"sample 'junk', 0\.png: not an image"),
        "cut": (sample("cut", [picture(3)[:50]]), ImageError, r"sample 'cut', 0\.png: damaged or truncated"),
        "many": (sample("many", [picture(0)] * 3), TooManyImages, "'many': has 3 images, more than"),
        "mute": (sample("mute", answer=" "), SampleError, "'mute': turn 1 .answer. is empty"),
        "swap": (Sample("swap", (), sample("x").conversations[::-1]), SampleError, "'swap': the first turn"),
    }
    for item, kind, message in bad.values():
        with make([[item]], num_threads=threads) as iterator:
            with pytest.raises(kind, match=message):
                next(iterator)
            with pytest.raises(kind, match=message):  # and it does not go on behind it
                next(iterator)


def test_image_bombs_are_refused_by_the_limit():
    data = [[sample("big", [picture(0)])]]
    assert next(make(data, max_image_pixels=24)).ids[0] == "big"
    with pytest.raises(ImageError, match=r"'big'.*24 pixels exceed the limit of 23"):
        list(make(data, max_image_pixels=23))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="no data source"):
        make([])
    with pytest.raises(ValueError, match=r"data source 1 .* is empty"):
        make([source(2), []])
    with pytest.raises(ValueError, match="batch_size 4 does not divide over 3 processes"):
        make([source(2)], process_count=3)
    with pytest.raises(ValueError, match="process_index 2"):
        make([source(2)], process_index=2, process_count=2)
    with pytest.raises(ValueError, match="2 weights for 1 data source"):
        make([source(2)], weights=[1, 2])
    with pytest.raises(ValueError, match="weight of data source 1 is 0"):
        make([source(2), source(2)], weights=[1, 0])
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        make([source(2)], epochs=0)


def test_compat_llava_reads_images_and_turns_as_llava_does():
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(buffer, "PNG")
    data = sample("a", [buffer.getvalue()])
    data = Sample("a", data.images, ({"from": "gpt", "value": "Hi"}, *data.conversations))
    small = WholeImage(Slot(VISUAL, size=(4, 4)))
    row = encoder(small, compat="llava")([data])
    np.testing.assert_array_equal(row.arrays.images[0, 0, 0], (10, 20, 30))  # the hidden colour
    upright = Sample("a", data.images, data.conversations[1:])
    np.testing.assert_array_equal(encoder(small)([upright]).arrays.images[0, 0, 0], (255, 255, 255))


class WideImagesKeepMore:
    """A rule that depends on the size: half of the slot's tokens of images that are taller than wide."""

    slot, combination, separated = RULE.slot, RULE.combination, RULE.separated
    most_slots, most_tokens = 1, VISUAL

    def __call__(self, read_size, images=1):
        height, width = read_size()
        return VisualLayout((self.slot,), range(VISUAL) if width >= height else range(0, VISUAL, 2))


def test_counts_follow_each_image_size():
    tall = np.zeros((6, 4, 3), np.uint8)
    both = sample("both", [picture(1), tall, picture(2)])
    encode = encoder(WideImagesKeepMore(), image_slots=3)
    row = encode([both]).arrays
    index = row.visual_index[row.visual_index >= 0]
    assert index.tolist() == [0, 1, 2, 3, 4, 6, 8, 9, 10, 11]
    assert row.image_mask.all()
    shorter = encoder(image_slots=3)([both]).arrays.segment_ids.sum() - row.segment_ids.sum()
    assert shorter == VISUAL // 2
    with pytest.raises(ImageError, match=r"sample 'junk', 0\.png: not an image"):
        encode([sample("junk", [b"not an image"])])


def test_prepared_data_gives_the_same_rows_and_a_fingerprint(tmp_path):
    samples = source(5)
    for item in samples:
        (tmp_path / f"{item.id}.png").write_bytes(item.images[0])
    entries = [{"id": s.id, "image": f"{s.id}.png", "conversations": list(s.conversations)} for s in samples]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    prepared = prepare(tmp_path / "data.json", tmp_path, tmp_path / "out", show_progress=False)
    with make([prepared], num_threads=2) as iterator:
        batches = list(iterator)
    assert_same(batches, list(make([samples])))
    assert iterator.get_state()["order"]["sources"] == [{"samples": 5, "fingerprint": prepared.fingerprint}]
    with pytest.raises(ValueError, match="fingerprint"):
        make([samples]).set_state(iterator.get_state())


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_and_resume():
    options = {"epochs": 2, "batch_size": 4}
    expected = list(make([source(13)], **options))
    with make([source(13)], **options, num_threads=1, num_workers=2) as iterator:
        first = [next(iterator) for _ in range(3)]
        state = iterator.get_state()
    assert_same(first, expected[:3])
    with make([source(13)], **options, num_threads=1, num_workers=1) as iterator:
        iterator.set_state(state)
        assert_same(iterator, expected[3:])
