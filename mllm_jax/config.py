"""The configuration: every key once, with default, type, range or choices and meaning, and the check of it all.

A recipe in `configs/` starts from `default_config()` and changes values; a user overrides any key on the command line,
as in `--config.model.connector.name=average_pool`. A key whose default is None accepts None. The options of a connector
are declared by the connector. `mllm-jax config` prints what is declared here (docs/config.md).
"""

import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mllm_jax import connectors
from mllm_jax.schema import (
    ConfigError,
    Key,
    Named,
    Schema,
    check_tree,
    config_key_error,
    defaults,
    find,
    join,
    regular_expression,
    unknown_key,
)

__all__ = [
    "SCHEMA",
    "ConfigError",
    "benchmark_config",
    "check",
    "check_key",
    "check_paths",
    "config_key_error",
    "data_seed",
    "declared",
    "default_config",
    "default_of",
    "differences",
    "map_paths",
    "resolved",
    "source_config",
    "stage_config",
]

LLM_LINEAR = r"llm/blocks/(q|k|v|o|gate|up|down|fc1|fc2)/kernel"  # every linear layer of the LLM but the head
DTYPES = ("float32", "bfloat16")
REMAT = ("none", "full", "dots")
# "auto" and the keys of `models.attention.BACKENDS`, which stands above this module.
ATTENTION = ("auto", "xla", "blockwise", "splash", "cudnn", "tokamax")
ASPECTS = ("pad", "square")
# What `data.anyres.Tiles` takes, which stands above this module too.
MERGES = (
    "flat", "spatial", "spatial_nobase", "spatial_unpad", "spatial_unpad_nobase", "spatial_maxpool2x2",
    "spatial_maxpool2x2_nobase",
)  # fmt: skip
# What `data.video_layout.Video` takes, likewise.
SAMPLINGS = ("segments", "linspace")
POOLS = ("none", "max1d", "max2d", "average2d", "bilinear2d")
TIMES = ("concat", "mean")
NEWLINES = ("no_token", "one_token", "frame", "grid")
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def _patterns_fault(patterns: Sequence[str]) -> str | None:
    return next(filter(None, map(regular_expression, patterns)), None)


def _pinpoints_fault(pinpoints: Sequence[Any]) -> str | None:
    for pair in pinpoints:
        fits = (
            isinstance(pair, tuple | list) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)
        )
        if not fits:
            return f"must hold (columns, rows) pairs of tiles such as (2, 1), not {pair!r}"
    return None if pinpoints else "must hold a pair at least"


def _rates_fault(groups: Sequence[Any]) -> str | None:
    for group in groups:
        pair = isinstance(group, tuple | list) and len(group) == 2 and isinstance(group[0], str)
        if not pair or type(group[1]) not in (int, float) or not 0 < group[1] < math.inf:
            return f"must hold (path regex, positive rate) pairs such as ('llm/.*', 2e-5), not {groups!r}"
    return _patterns_fault([pattern for pattern, _ in groups])


# One training source of a stage: a user's LLaVA-format data set, or images of the mini world.
SOURCE: Schema = {
    "kind": Key("llava", "a user's LLaVA-format data, or the mini world", choices=("llava", "mini_world"),
                synonyms=("type",)),
    "json": Key("", "LLaVA-format JSON or JSON lines", path=True, resumable=True,
                synonyms=("data_path", "annotations")),
    "images": Key("", "folder that its image paths are relative to", path=True, resumable=True,
                  synonyms=("image_folder", "image_dir")),
    "duplicate_ids": Key("error", "`number` tells samples that share an id apart as id, id#2, id#3",
                         choices=("error", "number"), resumable=True),
    "weight": Key(1.0, "how often it is drawn, relative to the other sources", above=0,
                  synonyms=("ratio", "proportion")),
    "split": Key("", "mini_world: which stream of scenes (`pretrain`, `finetune`)"),
    "form": Key("", "mini_world: `caption` or `instruct`"),
    "count": Key(0, "mini_world: number of samples", least=0, synonyms=("num_samples",)),
    "framed": Key(False, "mini_world: scenes on canvases of many aspect ratios"),
}  # fmt: skip

# One training stage; the defaults are those of LLaVA-1.5's stage 1 (recipes.md 1.1).
STAGE: Schema = {
    "trainable": Key(("connector/.*",), "path regexes of what is trained; all else is frozen, LoRA adapters excepted",
                     items=str, fault=_patterns_fault, synonyms=("freeze", "frozen", "unfreeze", "tune")),
    "lora": {
        "rank": Key(0, "of the adapters; 0 = none", least=0, synonyms=("r", "lora_r", "lora_rank")),
        "alpha": Key(256.0, "their output is scaled by alpha / rank", above=0, synonyms=("lora_alpha",)),
        "dropout": Key(0.05, "on their input, in training", least=0, below=1, synonyms=("lora_dropout",)),
        "targets": Key(LLM_LINEAR, "regex over kernel paths, llm/... and vision/...", fault=regular_expression,
                       synonyms=("target_modules", "modules")),
        "rank_stabilized": Key(False, "scale by alpha / sqrt(rank)", synonyms=("use_rslora", "rslora")),
    },
    "quantize_base": Key("none", "how the LLM's frozen block kernels are kept", choices=("none", "int8"),
                         synonyms=("bits", "quantization", "load_in_8bit")),
    "template": Key("plain", "conversation template (docs/data.md)",
                    synonyms=("conv_mode", "prompt_template", "version", "conversation")),
    "aspect": Key(None, "as data.aspect, which counts where this is None", of=str, choices=ASPECTS),
    "cache_features": Key(False, "keep the frozen tower's features on disk instead of running it", resumable=True),
    "sources": Named(SOURCE, "training data by name; several are mixed by weight", created_by=("json", "kind")),
    "seq_len": Key(None, "tokens a row holds; None = data.seq_len", of=int, least=1,
                   synonyms=("max_length", "max_len", "model_max_length", "context_length")),
    "image_slots": Key(None, "images a row has room for; None = data.image_slots", of=int, least=1,
                       synonyms=("max_images", "num_images")),
    "samples_per_row": Key(1, "most samples that share a row (packing); 1 = one sample a row", least=1,
                           synonyms=("packing", "pack", "sequence_packing", "sample_packing")),
    "pack_by": Key("tokens", "what fills a row: all tokens, or text alone (docs/operating.md)",
                   choices=("tokens", "text"), synonyms=("packing_strategy",)),
    "loss_weighting": Key("token", "a sample's weight per supervised token, of n: 1, 1 / n, or 1 / sqrt(n)",
                          choices=("token", "sample", "sqrt"), synonyms=("loss_reduction", "loss_reduce")),
    "batch_size": Key(256, "samples per step, over all devices and accumulation; on average with packing", least=1,
                      synonyms=("batch", "bs", "bsz", "global_batch_size", "train_batch_size")),
    "accumulation": Key(1, "parts that a batch is computed in, one after the other", least=1, resumable=True,
                        synonyms=("grad_accum", "accum", "accumulate", "gradient_accumulation_steps", "micro_batches")),
    "epochs": Key(1, "passes over the data", least=1, synonyms=("num_epochs", "num_train_epochs")),
    "steps": Key(None, "training steps; None = from epochs", of=int, least=1,
                 synonyms=("max_steps", "num_steps", "updates", "iterations")),
    "optimizer": Key("adamw", "of all that is trained", choices=("adamw", "muon"), synonyms=("optim", "opt")),
    "learning_rate": Key(1e-3, "its peak", above=0, synonyms=("lr", "peak_lr", "rate", "max_lr")),
    "matrix_learning_rate": Key(0.02, "muon only: of the matrices inside the blocks", above=0,
                                synonyms=("muon_lr", "matrix_lr")),
    "learning_rates": Key((), "(path regex, rate) pairs for groups that differ; the first match counts",
                          fault=_rates_fault, synonyms=("mm_projector_lr", "lrs", "lr_groups")),
    "connector_rate_scale": Key(1.0, "factor on the learning rates of the connector's parameters", above=0,
                                synonyms=("connector_lr", "connector_learning_rate", "projector_lr")),
    "schedule": Key("cosine", "of the learning rates, after the warm-up", choices=("cosine", "constant"),
                    synonyms=("lr_schedule", "scheduler", "lr_scheduler", "lr_scheduler_type")),
    "warmup_ratio": Key(0.03, "share of the steps in which the rates rise from zero", least=0, below=1,
                        synonyms=("warmup", "warmup_steps")),
    "weight_decay": Key(0.0, "decoupled; not of biases and norm scales", least=0, synonyms=("wd",)),
    "b1": Key(0.9, "decay of the first moment", least=0, below=1, synonyms=("beta1", "adam_beta1", "momentum")),
    "b2": Key(0.999, "decay of the second moment", least=0, below=1, synonyms=("beta2", "adam_beta2")),
    "eps": Key(1e-8, "added to the root of the second moment", above=0, synonyms=("epsilon", "adam_epsilon")),
    "clip_norm": Key(1.0, "global norm that gradients are clipped to; 0 = no clipping", least=0,
                     synonyms=("grad_clip", "max_grad_norm", "gradient_clipping", "clip")),
    "log_every": Key(10, "steps between two log lines", least=1, resumable=True,
                     synonyms=("logging_steps", "log_interval")),
    "checkpoint_every": Key(500, "steps between two checkpoints", least=1, resumable=True,
                            synonyms=("save_steps", "save_every", "ckpt_every", "checkpoint_interval")),
    "keep_last": Key(2, "most recent checkpoints that are kept", least=1, resumable=True,
                     synonyms=("save_total_limit", "max_to_keep")),
    "keep_best": Key(1, "checkpoints kept for their mean training loss since the one before", least=0, resumable=True),
}  # fmt: skip

# One benchmark that `eval.py` answers.
BENCHMARK: Schema = {
    "kind": Key("mini", "`mini`, `mini_video`, `vqa`, `caption` or a published one (docs/benchmarks.md)",
                synonyms=("type", "name"), resumable=True),
    "path": Key("", "its question file, or a published one's folder; mini: \"\" = made in the work directory",
                path=True, synonyms=("json", "questions", "file", "question_file")),
    "images": Key("", "folder that its image paths are relative to", path=True, resumable=True,
                  synonyms=("image_folder", "image_dir")),
    "count": Key(0, "mini: questions per ability", least=0, resumable=True, synonyms=("num_questions",)),
    "seed": Key(None, "mini: of its scenes and questions; None = data.seed", of=int, least=0, resumable=True),
    "framed": Key(False, "mini, where it is made: scenes on canvases of many aspect ratios", resumable=True),
    "max_new_tokens": Key(0, "0 = the official limit, or eval.max_new_tokens where there is none", least=0,
                          resumable=True, synonyms=("max_tokens",)),
    "options": Key({}, "of a published benchmark (docs/benchmarks.md)", of=dict, resumable=True),
}  # fmt: skip

CONNECTOR: Schema = {
    "name": Key("mlp2x_gelu", "which connector (docs/connectors.md)", choices=tuple(connectors.CONNECTORS),
                synonyms=("type", "mm_projector_type", "projector")),
    "path": Key("", "a checkpoint whose connector training starts from; \"\" = fresh weights", path=True, bucket=True,
                synonyms=("pretrain_mm_mlp_adapter", "checkpoint")),
    "allow_mismatch": Key(False, "take its weights although it was trained as another model (docs/models.md)"),
    **{name: keys for name in connectors.CONNECTORS if (keys := connectors.declared_options(name))},
}  # fmt: skip

SCHEMA: Schema = {
    "model": {
        "connector": CONNECTOR,
        "vision": {
            "path": Key("mini", "`mini`, a directory (also gs://), or a Hugging Face id", path=True, bucket=True,
                        synonyms=("vision_tower", "tower", "encoder", "name")),
            "image_size": Key(84, "side of the images that the encoder sees, in pixels", least=1,
                              synonyms=("resolution", "image_res", "size", "res")),
            "max_patches": Key(0, "NaFlex encoders: most patches of an image, which keeps its aspect ratio; 0 = "
                                  "squares of `image_size`", least=0, synonyms=("max_num_patches", "naflex")),
            "image_sizes": Key((), "of several encoders, A+B: side of each one's input; () = all see `image_size`, "
                               "which otherwise is the largest of them", items=int),
            "combine": Key("channels", "how several encoders are used together (docs/models.md)",
                           choices=("channels", "tokens", "mining", "mining_all", "mining_channels")),
            "split": Key(1, "parts per side that the first of mined encoders sees an image in", least=1,
                         synonyms=("image_grid",)),
            "overview": Key(False, "and the whole image before them", synonyms=("image_global",)),
            # LLaVA's default; P1's choice is unknown.
            "select_layer": Key(-2, "hidden state taken as the image's features; negative counts from the last",
                                synonyms=("layer", "feature_layer", "vision_feature_layer",
                                          "mm_vision_select_layer")),
            "remat": Key("full", "what is computed again in the backward pass to save memory", choices=REMAT,
                         resumable=True, synonyms=("gradient_checkpointing", "checkpointing", "rematerialize")),
        },
        "tiles": {
            "merge": Key("none", "what the LLM reads of an image in tiles (docs/data.md); `none` = no tiles",
                         choices=("none", *MERGES), synonyms=("anyres", "mm_patch_merge_type", "patch_merge_type")),
            "pinpoints": Key(PINPOINTS, "(columns, rows) of tiles that an image may be brought to",
                             fault=_pinpoints_fault, synonyms=("image_grid_pinpoints", "grid_pinpoints")),
            "max_tiles": Key(0, "spatial_unpad: features of more tiles are shrunk to so many; 0 = never", least=0,
                             synonyms=("anyres_max",)),
            "rounding": Key("floor", "of the size without padding: as LLaVA-NeXT (`floor`) or transformers (`round`)",
                            choices=("floor", "round")),
            "several": Key("tiles", "images of samples with several: in `tiles` too, or `whole` in one slot each",
                           choices=("tiles", "whole")),
        },
        "video": {
            "frames": Key(0, "that are picked of a video, each in an image slot (docs/data.md); 0 = no videos", least=0,
                          synonyms=("num_frames", "num_frm", "frames_upbound", "max_frames")),
            "sampling": Key("segments", "the middles of equal parts (FreeVA, Dense Connector), or `linspace` from "
                                        "the first to the last (LLaVA-NeXT)", choices=SAMPLINGS),
            "pool": Key("max1d", "what is kept of a frame's tokens (docs/data.md)", choices=POOLS,
                        synonyms=("mm_spatial_pool_mode", "pooling", "if_pool")),
            "window": Key(2, "tokens of which one is made; with 2d pools along a side", least=2,
                          synonyms=("mm_spatial_pool_stride", "kernel", "stride")),
            "time": Key("concat", "frame after frame, or the mean over all frames", choices=TIMES,
                        synonyms=("merge", "aggregation")),
            "newline": Key("no_token", "where the learned newline stands", choices=NEWLINES,
                           synonyms=("mm_newline_position",)),
        },
        "llm": {
            "path": Key("mini", "`mini`, a directory (also gs://), or a Hugging Face id", path=True, bucket=True,
                        synonyms=("model_name_or_path", "name", "base")),
            "remat": Key("full", "what is computed again in the backward pass to save memory", choices=REMAT,
                         resumable=True, synonyms=("gradient_checkpointing", "checkpointing", "rematerialize")),
        },
        "dtype": Key("float32", "of the computation", choices=DTYPES, synonyms=("precision", "bf16", "compute_dtype")),
        "param_dtype": Key("float32", "of trained parameters and optimizer state", choices=DTYPES),
        "frozen_dtype": Key("float32", "of parameters that a stage does not train", choices=DTYPES),
        "attention": Key("auto", "what computes attention (docs/operating.md); `auto` = what suits the platform",
                         choices=ATTENTION, resumable=True,
                         synonyms=("attn_implementation", "flash_attention", "attn")),
    },
    "stages": Named(STAGE, "training stages by name"),
    "stage_order": Key((), "the names of the stages, in the order in which they are trained", items=str,
                       synonyms=("order",)),
    "seed": Key(42, "of fresh parameters, data order and dropout", least=0, synonyms=("random_seed", "rng")),
    "data": {
        "dir": Key("", "where prepared data sets are kept (with `data.prepared` also gs://); \"\" = WORKDIR/data",
                   path=True, bucket=True, resumable=True,
                   synonyms=("data_dir", "cache_dir", "path")),
        "seed": Key(None, "of what is drawn here (the mini world and its benchmark); None = `seed`", of=int, least=0),
        "seq_len": Key(2048, "tokens a row holds, visual tokens included", least=1,
                       synonyms=("max_length", "max_len", "model_max_length", "context_length")),
        "image_slots": Key(1, "images a row has room for", least=1, synonyms=("max_images", "num_images")),
        "label_tokens": Key(None, "most supervised tokens of a row; None = seq_len", of=int, least=1),
        "aspect": Key("pad", "images that are not square are padded, or scaled to a square", choices=ASPECTS,
                      synonyms=("image_aspect_ratio",)),
        "compat": Key("", "`llava` accepts what LLaVA's own loader accepts", choices=("", "llava")),
        "overlong": Key("error", "a sample with more tokens than a row: stop, or skip, count and list it",
                        choices=("error", "skip"), resumable=True, synonyms=("truncate", "truncation")),
        "broken": Key("error", "a sample whose image or text cannot be used: stop, or skip, count and list it",
                      choices=("error", "skip"), resumable=True, synonyms=("skip_broken", "on_error")),
        "max_image_pixels": Key(178_956_970, "an image with more is refused", least=1, resumable=True),
        "prepared": Key(False, "train on what `mllm-jax prepare` wrote, without a look at the JSON files and images",
                        resumable=True),
        "threads": Key(4, "that read and preprocess samples", least=0, resumable=True,
                       synonyms=("workers", "num_workers", "dataloader_num_workers")),
    },
    "mesh": {
        "data": Key(-1, "devices that hold different rows; -1 = the remaining devices", least=1, special=(-1,),
                    resumable=True, synonyms=("dp", "data_parallel")),
        "fsdp": Key(1, "devices that also share parameters and optimizer state", least=1, special=(-1,),
                    resumable=True, synonyms=("zero", "fully_sharded")),
        "tensor": Key(1, "devices that share each layer's heads and widths", least=1, special=(-1,),
                      resumable=True, synonyms=("tp", "model", "model_parallel", "tensor_parallel")),
        "sequence": Key(1, "devices that share the positions of each row (context parallelism)", least=1,
                        special=(-1,), resumable=True, synonyms=("cp", "sp", "context", "context_parallel",
                                                                 "sequence_parallel")),
        "cpu_devices": Key(1, "devices that a CPU is divided into, where there is nothing else (docs/operating.md)",
                           least=1, resumable=True, synonyms=("num_cpu_devices", "host_devices")),
        "slices": Key(None, "groups of devices with a slow network between them; None = as the devices say", of=int,
                      least=1, resumable=True, synonyms=("num_slices", "dcn", "dcn_data", "hosts")),
    },
    "profile": {
        "start": Key(0, "step after a stage's beginning (or continuation) at which a trace begins; 0 = no trace",
                     least=0, resumable=True),
        "steps": Key(3, "traced, into WORKDIR/profile", least=1, resumable=True, synonyms=("num_steps",)),
    },
    "tracking": {
        "service": Key("none", "gets the figures of training too, beside metrics.jsonl and TensorBoard",
                       choices=("none", "wandb", "trackio"), resumable=True, synonyms=("report_to", "logger")),
        "project": Key("mllm-jax", "that the run belongs to there", resumable=True, synonyms=("wandb_project",)),
    },
    "eval": {
        "template": Key("vicuna_v1", "conversation template (docs/data.md)", resumable=True,
                        synonyms=("conv_mode", "prompt_template")),
        "benchmarks": Named(BENCHMARK, "benchmarks by name", created_by=("path", "kind"), resumable=True),
        "batch_size": Key(16, "prompts at once", least=1, resumable=True, synonyms=("batch", "bs")),
        "max_new_tokens": Key(16, "longest answer where a benchmark says nothing", least=1, resumable=True,
                              synonyms=("max_tokens", "max_length")),
        "overlong": Key("error", "a prompt beyond the context: stop, or count it as an empty answer",
                        choices=("error", "empty"), resumable=True),
        "blind": Key(True, "also answer with the image replaced by its mean", resumable=True),
        "likelihood": Key(False, "also score multiple choice by the options' likelihood", resumable=True),
        "examples": Key(12, "answers shown with their image in the report", least=0, resumable=True),
    },
}  # fmt: skip


def default_config() -> ConfigDict:
    """Every key with its default. Stages and benchmarks are filled in by the recipe.

    Examples:
      >>> config = default_config()
      >>> config.model.connector.name, config.data.seq_len
      ('mlp2x_gelu', 2048)
    """
    return defaults(SCHEMA)


def stage_config() -> ConfigDict:
    """One training stage; the defaults are those of LLaVA-1.5's stage 1.

    Examples:
      >>> stage = stage_config()
      >>> stage.batch_size, stage.learning_rate, stage.trainable
      (256, 0.001, ('connector/.*',))
    """
    return defaults(STAGE)


def source_config() -> ConfigDict:
    """One training source of a stage.

    Examples:
      >>> config = default_config()
      >>> config.stages = {"pretrain": stage_config()}
      >>> config.stages.pretrain.sources = {"main": source_config()}
      >>> config.stages.pretrain.sources.main.json = "captions.json"
    """
    return defaults(SOURCE)


def benchmark_config() -> ConfigDict:
    """One benchmark that `eval.py` answers.

    Examples:
      >>> config = default_config()
      >>> config.eval.benchmarks = {"mine": benchmark_config()}
      >>> config.eval.benchmarks.mine.update({"kind": "vqa", "path": "test.json"})
    """
    return defaults(BENCHMARK)


def declared(path: str) -> Key:
    """The declaration of a key such as "stages.finetune.lora.rank".

    Raises:
      ConfigError: there is no such key.

    Examples:
      >>> declared("data.broken").choices
      ('error', 'skip')
    """
    node = find(SCHEMA, path)
    if not isinstance(node, Key):
        raise ConfigError(f"config key {path!r} holds other keys")
    return node


def default_of(path: str) -> Any:
    """The default of a key or of a group of keys, as `resolved` writes it.

    Raises:
      ConfigError: there is no such key.
    """
    node = find(SCHEMA, path)
    if isinstance(node, Key):
        return _plain(node.default)
    return {} if isinstance(node, Named) else _plain(defaults(node).to_dict())


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The configuration as it runs: plain JSON-able values, only the chosen connector's options kept.

    Examples:
      >>> resolved(default_config())["model"]["connector"]
      {'mlp2x_gelu': {'reduced_grid': [], 'reduction': 1}, 'name': 'mlp2x_gelu', 'path': ''}
    """
    values = config.to_dict()
    chosen = values["model"]["connector"]["name"]
    values["model"]["connector"] = {
        key: value
        for key, value in values["model"]["connector"].items()
        if key in ("name", "path", chosen) or (key == "allow_mismatch" and value)
    }
    return _plain(values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def map_paths(config: ConfigDict, change: Callable[[str, bool], str]) -> None:
    """Replaces the value of every key that is a path by `change(value, whether it may be in a bucket)`, in place.

    Raises:
      ConfigError: `change` raised ValueError; the key is named.
    """
    for key, node, place, name in list(_values(config, SCHEMA)):
        if node.path and isinstance(place[name], str):
            with config_key_error(key):
                place[name] = change(place[name], node.bucket)


def _values(config: ConfigDict, schema: Schema, path: str = "") -> Iterator[tuple[str, Key, ConfigDict, str]]:
    """Every (key, its declaration, the dict that holds it, its name there) of a configuration."""
    for name, value in config.items():
        node, here = schema.get(name), join(path, name)
        if isinstance(node, Key):
            yield here, node, config, name
        elif isinstance(value, ConfigDict) and isinstance(node, Named):
            for child, entry in value.items():
                if isinstance(entry, ConfigDict):
                    yield from _values(entry, node.entry, f"{here}.{child}")
        elif isinstance(value, ConfigDict) and node is not None:
            yield from _values(value, node, here)


def items(config: ConfigDict) -> Iterator[tuple[str, Key, Any]]:
    """Every key of a configuration with its declaration and its value, as `resolved` writes it."""
    for key, node, place, name in _values(config, SCHEMA):
        value = place[name]
        yield key, node, _plain(value.to_dict() if isinstance(value, ConfigDict) else value)


def changes_scores(key: str) -> bool:
    """Whether a key is one of the evaluation's that the scores of a model depend on."""
    return key.startswith("eval.") and key not in ("eval.batch_size", "eval.examples")


def check_paths(config: ConfigDict, path: str) -> None:
    """Checks that every file or folder that the keys right below `path` name is there.

    Raises:
      FileNotFoundError: naming the key and the file.
    """
    for name, value in config.items():
        if value and declared(key := join(path, name)).path and not pathlib.Path(value).exists():
            raise FileNotFoundError(f"config key {key!r}: there is no {value}")


def differences(
    have: Mapping[str, Any], want: Mapping[str, Any], schema: Schema = SCHEMA, path: str = ""
) -> Iterator[tuple[str, Key | Named | None, Any, Any]]:
    """Every (key, declaration, one value, other value) in which two resolved configurations differ.

    They come in the order of the schema, so that what tells most comes first. A key that one of them lacks has its
    default there; the declaration is None for a key that the schema does not know.
    """
    for name, node in schema.items():
        here = join(path, name)
        if isinstance(node, Key):
            one, other = (_plain(values.get(name, node.default)) for values in (have, want))
            if one != other:
                yield here, node, one, other
            continue
        one, other = have.get(name, {}), want.get(name, {})
        if not isinstance(node, Named):
            yield from differences(one, other, node, here)
            continue
        for child in dict.fromkeys((*other, *one)):
            if child in one and child in other:
                yield from differences(one[child], other[child], node.entry, f"{here}.{child}")
            else:
                yield f"{here}.{child}", node, one.get(child), other.get(child)
    for name in have.keys() - schema.keys():
        yield join(path, name), None, have[name], want.get(name)


def check_key(config: ConfigDict, path: str) -> None:
    """Checks that `path`, such as "model.connector.name", is a key of `config`.

    Raises:
      ConfigError: it is not; the first part that is wrong and the nearest valid key are named.
    """
    node, done = config, ""
    for name in path.split("."):
        if not isinstance(node, ConfigDict):
            raise ConfigError(f"config key {done!r} holds a value, so there is no {join(done, name)!r}")
        if name not in node:
            raise unknown_key(
                _without_other_connectors(config), done, name, list(node), _how_to_create(done, name)
            )
        node, done = node[name], join(done, name)


def _without_other_connectors(config: ConfigDict) -> Schema:
    """The schema with the options of the chosen connector only: the others would do nothing."""
    chosen = config.model.connector.name
    connector = {name: node for name, node in CONNECTOR.items() if isinstance(node, Key) or name == chosen}
    return {**SCHEMA, "model": {**SCHEMA["model"], "connector": connector}}


def _how_to_create(parent: str, name: str) -> str:
    named = find(SCHEMA, parent) if parent else None
    if not isinstance(named, Named) or not named.created_by:
        return ""
    keys = " or ".join(f"--config.{parent}.{name}.{key}" for key in named.created_by)
    return f"; give {keys} to add it"


def check(config: ConfigDict) -> None:
    """Checks keys, types, ranges, choices and what keys say together, before anything is read or computed.

    What depends on the model is checked by `mllm_jax.inference.runs.model_config`, what depends on data and devices by
    `mllm_jax.training.preflight` and `mllm_jax.evaluation.preflight`.

    Raises:
      ConfigError: naming the key, what is wrong, and the nearest valid key or value.

    Examples:
      >>> from mllm_jax.recipes.mini import mini_config
      >>> config = mini_config()
      >>> check(config)
      >>> config.stages.finetune.lora.rank = -1
      >>> check(config)
      Traceback (most recent call last):
        ...
      mllm_jax.schema.ConfigError: config key 'stages.finetune.lora.rank'...
    """
    check_tree(config, SCHEMA)
    if not config.stages:
        raise ConfigError("config key 'stages' is empty; add a stage_config() and name it in 'stage_order'")
    if sorted(config.stage_order) != sorted(config.stages):
        raise ConfigError(
            f"config key 'stage_order' {tuple(config.stage_order)} must name each of the stages "
            f"{tuple(config.stages)} once"
        )
    for name, stage in config.stages.items():
        _check_stage(stage, f"stages.{name}")


def _check_stage(stage: ConfigDict, here: str) -> None:
    if not stage.trainable and not stage.lora.rank:
        raise ConfigError(f"config key '{here}.trainable' is empty: nothing would be trained")
    if not stage.sources:
        raise ConfigError(
            f"config key '{here}.sources' is empty; add a source with a json and an image folder"
        )
    if stage.samples_per_row == 1 and stage.batch_size % stage.accumulation:
        raise ConfigError(
            f"config key '{here}.batch_size' ({stage.batch_size}) must be a multiple of "
            f"'{here}.accumulation' ({stage.accumulation})"
        )
    for name, source in stage.sources.items():
        where = f"{here}.sources.{name}"
        if source.kind == "llava" and not source.json:
            raise ConfigError(
                f"config key '{where}.json' is empty; give the path of a LLaVA-format JSON file"
            )
        if source.kind == "mini_world":
            if source.form not in ("caption", "instruct"):
                raise ConfigError(
                    f"config key '{where}.form' is {source.form!r}; of mini_world it is 'caption' or 'instruct'"
                )
            if not source.count:
                raise ConfigError(f"config key '{where}.count' is 0; give the number of samples")


def data_seed(config: ConfigDict) -> int:
    """The seed of what is drawn here: the mini world and its benchmark."""
    return config.seed if config.data.seed is None else config.data.seed


def row_lengths(config: ConfigDict) -> list[int]:
    """T of the rows that the stages train on, each length once."""
    return sorted({stage.seq_len or config.data.seq_len for stage in config.stages.values()})
