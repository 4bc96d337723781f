"""The data of a stage: its sources, prepared and checked, and the iterator over its batches."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from mllm_jax import files
from mllm_jax.config import data_seed
from mllm_jax.console import make_console, say
from mllm_jax.data import pipeline
from mllm_jax.data.chat_template import resolve_template
from mllm_jax.data.feature_cache import FeatureCache
from mllm_jax.data.layout import layouts
from mllm_jax.data.llava_json import Record
from mllm_jax.data.measure import sizes
from mllm_jax.data.packing import PackingPlan, by_text
from mllm_jax.data.pipeline import TrainIterator
from mllm_jax.data.reading import DataError, read_json
from mllm_jax.data.rows import ImageReader, RowEncoder, check_fits, check_slots, render_sample
from mllm_jax.data.samples import Source, record_shown
from mllm_jax.data.templates import Template, is_chat
from mllm_jax.data.tokens import encode_sample
from mllm_jax.inference.runs import image_processor, video_settings
from mllm_jax.mini.world import dataset as mini_dataset
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.parallel import processes
from mllm_jax.parallel.row_parts import RowPart
from mllm_jax.storage import Path
from mllm_jax.training.prepared import dataset_name, find_prepared, note_prepared
from mllm_jax.turns import taking_turns
from mllm_jax.workdir import data_dir

NOTED, SIZES = "sources.json", "sizes"
SHOWN = 3  # broken samples that are told one by one


def prepare_sources(
    config: ConfigDict, name: str, model: ModelConfig, tokenizer: Any, workdir: Path
) -> dict[str, Source]:
    """The data sets of stage `name`, written under `data.dir` (or the work directory) unless they are there already.

    The first process writes, then the others read, or write on a disk of their own. What a run uses is noted in
    `WORKDIR/sources.json`, so that it goes on from the prepared copy where the JSON or its images are gone. Samples
    that `data.broken=skip` leaves out are told and listed beside the prepared data. With `data.prepared` only what
    `prepare_stage` has noted is read.

    Raises:
      DataError, ImageError, SampleError: naming file and sample. A sample that the template cannot take or whose
        images do not fit a row is one; with `data.overlong=error` also one with too many tokens, which only the
        first process looks for. A stage that has begun is not checked again: it goes on with the same data only.
    """
    directory, stage = data_dir(config, workdir), config.stages[name]
    tokenizer = None if jax.process_index() else tokenizer
    check = None
    if not (workdir / "checkpoints" / name).exists():
        check = RecordCheck(config, stage, model, tokenizer)

    noted = read_noted(workdir)

    def prepare() -> dict[str, Source]:
        with taking_turns(directory, "preparing data"):
            return prepared()

    def prepared() -> dict[str, Source]:
        found: dict[str, Source] = {}
        for source, values in sorted(stage.sources.items()):
            if config.data.prepared:
                found[source] = find_prepared(config, name, source, directory)
            else:
                before = noted.get(f"{name}/{source}")
                found[source] = _copy_left(source, values, directory, before) or _prepare(
                    config, source, values, directory, check
                )
            if jax.process_index() == 0:
                noted[f"{name}/{source}"] = found[source].fingerprint
                _tell_skipped(source, found[source])
        if jax.process_index() == 0:
            files.write_json(workdir / NOTED, noted)
        return found

    return processes.first_then_others(prepare, "data prepared")


def prepare_stage(
    config: ConfigDict, name: str, model: ModelConfig, tokenizer: Any, directory: pathlib.Path, workers: int
) -> dict[str, Source]:
    """Writes the data sets of a stage and measures their samples for packing, without training; see `prepare_sources`.

    What was stopped is continued, and what is there stays. It is noted in `DIRECTORY/prepared.json`, for
    `data.prepared`.

    Args:
      directory: where prepared data are kept.
      workers: processes; the result is the same for any number.

    Raises:
      DataError, ImageError, SampleError: as `prepare_sources`.
    """
    stage, found = config.stages[name], {}
    check = RecordCheck(config, stage, model, tokenizer)
    for source, values in sorted(stage.sources.items()):
        found[source] = _prepare(config, source, values, directory, check, workers)
        _tell_skipped(source, found[source])
        note_prepared(config, name, source, directory, found[source].fingerprint)
    if stage.samples_per_row != 1:
        encoder = _encoder(config, stage, model, tokenizer)
        for source in found.values():
            sizes(source, encoder, directory / SIZES, config.data.threads, workers=workers)
    return found


def is_drawn(stage: ConfigDict) -> bool:
    """Whether all data of a stage are drawn here (the mini world), so that nothing can be wrong with them."""
    return all(source.kind == "mini_world" for source in stage.sources.values())


def read_noted(workdir: Path) -> dict[str, str]:
    """The fingerprints of the data sets that a run has used so far, by stage and source."""
    try:
        noted = read_json(workdir / NOTED)
    except DataError:
        return {}
    return noted if isinstance(noted, dict) else {}


def _copy_left(
    name: str, source: ConfigDict, directory: pathlib.Path, fingerprint: str | None
) -> Source | None:
    """The prepared data of a source whose JSON or image folder is gone; None where both are there, or it is not."""
    from mllm_jax.data import tfds_llava  # slow to import: tensorflow-datasets

    gone = [path for path in (source.json, source.images) if path and not pathlib.Path(path).exists()]
    if source.kind != "llava" or not gone or fingerprint is None:
        return None
    found = tfds_llava.prepared(directory, dataset_name(name), fingerprint)
    if found is not None and jax.process_index() == 0:
        say(make_console(), f"{gone[0]} is gone; going on with the prepared copy in {found.directory}")
    return found


def _tell_skipped(name: str, source: Any) -> None:
    if not source.skipped:
        return
    from mllm_jax.data.tfds_llava import SKIPPED  # slow to import: tensorflow-datasets

    console, shown = make_console(), source.skipped[:SHOWN]
    say(
        console,
        f"source {name}: {len(source.skipped):,} broken samples left out of {len(source) + len(source.skipped):,} "
        f"(data.broken=skip); all are listed in {source.directory / SKIPPED}",
    )
    for one in shown:
        say(console, f"  {one['sample']!r}: {one['problem']}")


@dataclasses.dataclass(frozen=True)
class RecordCheck:
    """Raises what makes a record unusable in a stage.

    Attributes:
      config, stage, model: the recipe, its stage and its model.
      tokenizer: None leaves lengths unchecked.
      root: folder that the records' images are relative to.
    """

    config: ConfigDict
    stage: ConfigDict
    model: ModelConfig
    tokenizer: Any
    root: pathlib.Path = pathlib.Path()

    @functools.cached_property
    def _template(self) -> str | Template:
        template = self.stage.template
        return resolve_template(template, self.tokenizer) if self._lengths else template

    @property
    def _lengths(self) -> bool:
        return self.tokenizer is not None and self.config.data.overlong == "error"

    def __call__(self, record: Record) -> None:
        """Raises DataError, ImageError or SampleError for an unusable record."""
        data, stage = self.config.data, self.stage
        images, limit = len(record.images), stage.image_slots or data.image_slots
        check_slots(record.id, images, images, limit)  # every image fills at least one
        if is_chat(self._template):  # which any conversation fits, and which only the tokenizer knows
            return
        compat = data.compat or None
        spans = render_sample(record.id, record.conversations, images, self._template, compat)
        if self._lengths:
            shown = record_shown(self.root, record, compat, max_pixels=data.max_image_pixels)
            found = layouts(self.model.visual_layout, shown, sample=record.id)
            encoded = encode_sample(spans, self.tokenizer, found, sample=record.id)
            check_slots(record.id, images, encoded.num_slots, limit)
            check_fits(encoded, stage.seq_len or data.seq_len, data.label_tokens)


def _prepare(
    config: ConfigDict,
    name: str,
    source: ConfigDict,
    directory: pathlib.Path,
    check: RecordCheck | None,
    workers: int = 1,
) -> Source:
    from mllm_jax.data import tfds_llava  # slow to import: tensorflow-datasets

    json_path, images = pathlib.Path(source.json), source.images or None
    if source.kind == "mini_world":
        split, form, count, seed = source.split, source.form, source.count, data_seed(config)
        framed = source.get("framed", False)
        root = directory / f"mini_world_{split}_{form}_{count}_{seed}{'_framed' * framed}"
        draw = None if workers == 1 else workers
        json_path = mini_dataset.write_split(root, split, count, form, seed, framed=framed, workers=draw)
        images = root / "images"
    return tfds_llava.prepare(
        json_path,
        images,
        directory,
        name=dataset_name(name),
        duplicate_ids=source.duplicate_ids,
        compat=config.data.compat or None,
        broken=config.data.broken,
        check=check and dataclasses.replace(check, root=pathlib.Path(images or "")),
        max_image_pixels=config.data.max_image_pixels if source.kind == "llava" else None,  # ours are sound
        video=video_settings(config),
        workers=workers,
    )


def image_reader(config: ConfigDict, stage: ConfigDict) -> ImageReader:
    """How a stage decodes and preprocesses its images."""
    processor = image_processor(config, stage.aspect)
    return ImageReader(processor, config.data.compat or None, config.data.max_image_pixels)


def packing_plan(
    config: ConfigDict,
    stage: ConfigDict,
    model: ModelConfig,
    tokenizer: Any,
    prepared: dict[str, Source],
    workdir: Path,
) -> PackingPlan | None:
    """Which samples share the rows of a stage; None for one sample a row.

    Sizes that are not measured yet are measured now and kept in the data folder: the first process measures, then the
    others read, or measure for themselves. With `pack_by="text"` the stage has passed `preflight.check_packing`.
    """
    if stage.samples_per_row == 1:
        return None
    folder, encoder = data_dir(config, workdir) / SIZES, _encoder(config, stage, model, tokenizer)
    sources = list(prepared.values())

    def measured() -> Int[np.ndarray, "N 4"]:
        return np.concatenate([sizes(source, encoder, folder, config.data.threads) for source in sources])

    found, limits = processes.first_then_others(measured, "samples measured"), encoder.limits
    if stage.pack_by == "text":  # the same rows whatever the connector
        found, limits = by_text(found, limits, model.visual_layout.most_tokens)
    return pipeline.packing_plan(sources, found, limits, **_order(config, stage, prepared))


def stage_iterator(
    config: ConfigDict,
    stage: ConfigDict,
    model: ModelConfig,
    tokenizer: Any,
    prepared: dict[str, Source],
    packing: PackingPlan | None = None,
    cache: FeatureCache | None = None,
    row_multiple: int = 1,
    part: RowPart | None = None,
) -> TrainIterator:
    """The batches of a stage from its prepared data sets, with features from `cache` in place of images.

    Args:
      packing: of the stage; see `packing_plan`.
      row_multiple: empty rows fill a packed batch up until this divides it.
      part: the rows of each batch that are read; None = all.

    Raises (when iterated):
      SampleError, ImageError: naming file and sample.
    """
    part = part or RowPart()
    return pipeline.make_train_iterator(
        list(prepared.values()),
        _encoder(config, stage, model, tokenizer, cache),
        packing=packing,
        batch_size=stage.batch_size,
        row_multiple=row_multiple,
        process_index=part.index,
        process_count=part.count,
        num_threads=config.data.threads,
        **_order(config, stage, prepared),
    )


def _order(config: ConfigDict, stage: ConfigDict, prepared: Mapping[str, Source]) -> dict[str, Any]:
    """What decides the order of a stage's samples."""
    weights = [stage.sources[name].weight for name in prepared]
    return {
        "seed": config.seed,
        "epochs": None if stage.steps else stage.epochs,
        # Equal weights read every sample once an epoch; others draw in proportion.
        "weights": None if len(set(weights)) == 1 else weights,
    }


def _encoder(
    config: ConfigDict,
    stage: ConfigDict,
    model: ModelConfig,
    tokenizer: Any,
    cache: FeatureCache | None = None,
) -> RowEncoder:
    return RowEncoder(
        image_reader(config, stage),
        model.visual_layout,
        tokenizer,
        stage.template,
        seq_len=stage.seq_len or config.data.seq_len,
        image_slots=stage.image_slots or config.data.image_slots,
        overlong=config.data.overlong,
        label_tokens=config.data.label_tokens,
        samples_per_row=stage.samples_per_row,
        loss_weighting=stage.loss_weighting,
        features=cache,
    )
