"""The table of benchmarks that a model can be asked: exact kind -> benchmark.

A new one is one file (or a class in the file of its family) and one row here.
"""

import difflib
from pathlib import Path

from mllm_jax.evaluation.runners import choices, grounding, mmbench, mmmu, open_answers, short_answer, yes_no
from mllm_jax.evaluation.runners.base import MAIN, OPEN, BenchmarkError, Question, Runner, key_of
from mllm_jax.evaluation.runners.caption import CaptionRunner
from mllm_jax.evaluation.runners.mini import MiniRunner
from mllm_jax.evaluation.runners.published import Published
from mllm_jax.evaluation.runners.vqa import VqaRunner

# From the official files; the folder `kind` below the data folder holds them under their default names.
PUBLISHED: dict[str, type[Published]] = {
    "blink": choices.Blink,
    "captions": grounding.Captions,
    "chartqa": short_answer.ChartQa,
    "gqa": short_answer.Gqa,
    "llava_bench": open_answers.LlavaBench,
    "mathvista": open_answers.MathVista,
    "mm_vet": open_answers.MmVet,
    "mmbench": mmbench.MmBench,
    "mmbench_cn": mmbench.MmBenchCn,
    "mme": yes_no.Mme,
    "mmmu": mmmu.Mmmu,
    "mmmu_pro": mmmu.MmmuPro,
    "mmmu_pro_vision": mmmu.MmmuProVision,
    "ok_vqa": short_answer.OkVqa,
    "pope": yes_no.Pope,
    "q_bench": choices.QBench,
    "q_bench_zh": choices.QBenchZh,
    "refcoco": grounding.RefCoco,
    "refcoco+": grounding.RefCocoPlus,
    "refcoco+_caption": grounding.RegionCaptionPlus,
    "refcoco_caption": grounding.RegionCaption,
    "refcocog": grounding.RefCocoG,
    "refcocog_caption": grounding.RegionCaptionG,
    "scienceqa": choices.ScienceQa,
    "seed_bench": choices.SeedBench,
    "textvqa": short_answer.TextVqa,
    "vizwiz": short_answer.VizWiz,
    "vqav2": short_answer.VqaV2,
}
RUNNERS: dict[str, type[Runner]] = {
    "caption": CaptionRunner,
    "mini": MiniRunner,
    "vqa": VqaRunner,
    **PUBLISHED,
}
PROMPTS = "prompts.json"  # marks a prepared benchmark (data/tfds_benchmarks.py, a slow import)
# Scored from stored answers only: models are not shown videos yet.
VIDEO = ("activitynet_qa", "msrvtt_qa", "msvd_qa", "nextqa", "video_chatgpt")


def check_kind(kind: str) -> None:
    """Raises BenchmarkError for a kind that is not in the table, with the nearest that is."""
    if kind in VIDEO:
        raise BenchmarkError(
            f"{kind!r} is a video benchmark: models cannot be shown videos yet; `mllm-jax score {kind}` scores answers "
            "that were made elsewhere"
        )
    if kind not in RUNNERS:
        near = difflib.get_close_matches(str(kind), RUNNERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise BenchmarkError(f"unknown kind of benchmark {kind!r}; {hint}valid: {', '.join(RUNNERS)}")


def read_benchmark(
    kind: str, path: str | Path, images: str | Path | None = None, **options: bool | str
) -> Runner:
    """Reads a benchmark's files.

    Args:
      kind: exact name in `RUNNERS`.
      path: its question file; for a published one also the folder that holds its files, or a version directory that
        `prepared.prepare` wrote.
      images: folder that image names are relative to; None or "" for the default one.
      **options: of a published benchmark, see its `options`; of a prepared one only those of decoding.

    Raises:
      BenchmarkError: an unknown kind (the nearest is named) or option, or files that cannot be used.
    """
    check_kind(kind)
    if not path:
        raise BenchmarkError(f"the {kind!r} benchmark needs the path of its JSON file")
    if kind not in PUBLISHED and options:
        raise BenchmarkError(f"the {kind!r} benchmark has no option {next(iter(options))!r}")
    if kind in PUBLISHED and (Path(path) / PROMPTS).is_file():
        from mllm_jax.data.tfds_benchmarks import BenchmarkSource

        return PUBLISHED[kind].from_source(BenchmarkSource(path), **options)
    return RUNNERS[kind](path, images, **options)


__all__ = [
    "MAIN",
    "OPEN",
    "PUBLISHED",
    "RUNNERS",
    "VIDEO",
    "BenchmarkError",
    "Published",
    "Question",
    "Runner",
    "check_kind",
    "key_of",
    "read_benchmark",
]
