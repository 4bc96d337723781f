"""The table of benchmarks: exact name -> class. A new benchmark is one file, one place here and one test.

Everything else follows from it: what models can be asked (`read_benchmark`), what can be scored (`get_benchmark`),
prepared, submitted and judged.
"""

from mllm_jax.evaluation.benchmarks import refcoco
from mllm_jax.evaluation.benchmarks.base import Benchmark
from mllm_jax.evaluation.benchmarks.blink import Blink
from mllm_jax.evaluation.benchmarks.caption import Caption
from mllm_jax.evaluation.benchmarks.captions import Captions
from mllm_jax.evaluation.benchmarks.chartqa import ChartQa
from mllm_jax.evaluation.benchmarks.gqa import Gqa
from mllm_jax.evaluation.benchmarks.judged import JudgeTask
from mllm_jax.evaluation.benchmarks.llava_bench import LlavaBench
from mllm_jax.evaluation.benchmarks.mathvista import MathVista
from mllm_jax.evaluation.benchmarks.mini import Mini
from mllm_jax.evaluation.benchmarks.mini_video import MiniVideo
from mllm_jax.evaluation.benchmarks.mm_vet import MmVet
from mllm_jax.evaluation.benchmarks.mmbench import CcBench, MmBench, MmBenchCn
from mllm_jax.evaluation.benchmarks.mme import Mme
from mllm_jax.evaluation.benchmarks.mmmu import Mmmu
from mllm_jax.evaluation.benchmarks.mmmu_pro import MmmuPro, MmmuProVision
from mllm_jax.evaluation.benchmarks.nextqa import NextQa
from mllm_jax.evaluation.benchmarks.pope import Pope
from mllm_jax.evaluation.benchmarks.published import Published
from mllm_jax.evaluation.benchmarks.q_bench import QBench, QBenchZh
from mllm_jax.evaluation.benchmarks.q_bench_a3 import QBenchA3
from mllm_jax.evaluation.benchmarks.relaxed_accuracy import RelaxedAccuracy
from mllm_jax.evaluation.benchmarks.scienceqa import ScienceQa
from mllm_jax.evaluation.benchmarks.seed_bench import SeedBench
from mllm_jax.evaluation.benchmarks.textvqa import TextVqa
from mllm_jax.evaluation.benchmarks.video_chatgpt import VideoChatGpt
from mllm_jax.evaluation.benchmarks.video_qa import ActivityNetQa, MsrvttQa, MsvdQa, TgifQa
from mllm_jax.evaluation.benchmarks.vizwiz import VizWiz
from mllm_jax.evaluation.benchmarks.vqa import Vqa
from mllm_jax.evaluation.benchmarks.vqav2 import OkVqa, VqaV2
from mllm_jax.evaluation.predictions import BenchmarkError
from mllm_jax.schema import did_you_mean
from mllm_jax.storage import Path, as_path

_FAMILIES: tuple[tuple[type[Benchmark], ...], ...] = (
    # multiple choice
    (CcBench, MmBench, MmBenchCn, ScienceQa, SeedBench, NextQa),
    (Blink, MathVista, Mini, MiniVideo, Mmmu, MmmuPro, MmmuProVision, QBench, QBenchZh),
    # yes or no
    (Mme, Pope),
    # a word or two
    (ChartQa, Gqa, OkVqa, RelaxedAccuracy, TextVqa, VizWiz, Vqa, VqaV2),
    # sentences, which a judge or references decide about
    (Caption, Captions, refcoco.RegionCaption, refcoco.RegionCaptionG, refcoco.RegionCaptionPlus),
    (ActivityNetQa, LlavaBench, MmVet, MsrvttQa, MsvdQa, TgifQa, VideoChatGpt),
    # numbers
    (QBenchA3, refcoco.RefCoco, refcoco.RefCocoG, refcoco.RefCocoPlus),
)
BENCHMARKS: dict[str, type[Benchmark]] = {one.name: one for family in _FAMILIES for one in family}
# Read from the official files; the folder `name` below the data folder holds them under their default names.
PUBLISHED: dict[str, type[Published]] = {
    name: benchmark for name, benchmark in BENCHMARKS.items() if issubclass(benchmark, Published)
}
JUDGE_TASKS: dict[str, tuple[JudgeTask, ...]] = {
    name: benchmark.judge for name, benchmark in BENCHMARKS.items() if benchmark.judge
}
PROMPTS = "prompts.json"  # marks a prepared benchmark (data/tfds_benchmarks.py, a slow import)


def get_benchmark(name: str) -> type[Benchmark]:
    """The benchmark of that exact name.

    Raises:
        BenchmarkError: there is none; names the nearest and lists the others.

    Examples:
      >>> get_benchmark("pope").unit
      'fraction'
    """
    if name not in BENCHMARKS:
        hint = did_you_mean(name, BENCHMARKS)
        raise BenchmarkError(f"no benchmark {name!r}; {hint}there are {', '.join(sorted(BENCHMARKS))}")
    return BENCHMARKS[name]


def get_asked(name: str) -> type[Benchmark]:
    """The benchmark of that exact name, if models can be asked it.

    Raises:
        BenchmarkError: there is none, or it cannot be asked; says why.

    Examples:
      >>> get_asked("mmbench").name
      'mmbench'
    """
    benchmark = get_benchmark(name)
    if benchmark.not_asked:
        raise BenchmarkError(f"the benchmark {name!r} cannot be asked: {benchmark.not_asked}")
    return benchmark


def read_benchmark(
    name: str, path: str | Path, images: str | Path | None = None, **options: bool | str
) -> Benchmark:
    """Reads a benchmark's questions.

    Args:
      name: exact name in `BENCHMARKS`.
      path: its question file; for a published one also the folder that holds its files, or a version directory that
        `evaluation.prepared.prepare` wrote.
      images: folder that image names are relative to; None or "" for the default one.
      **options: of a published benchmark, see its `options`; of a prepared one only those of decoding.

    Raises:
      BenchmarkError: an unknown name (the nearest is named) or option, or files that cannot be used.

    Examples:
      >>> import json, pathlib, tempfile
      >>> file = pathlib.Path(tempfile.mkdtemp(), "test.json")
      >>> row = {"question_id": "1", "image": "b.jpg", "question": "What is shown?", "answer": "bus"}
      >>> file.write_text(json.dumps([row])) > 0
      True
      >>> print(read_benchmark("vqa", file).questions[0].prompt)
      What is shown?
      Answer the question using a single word or phrase.
    """
    benchmark = get_asked(name)
    if not path:
        raise BenchmarkError(f"the {name!r} benchmark needs the path of its JSON file")
    if not issubclass(benchmark, Published):
        if options:
            raise BenchmarkError(f"the {name!r} benchmark has no option {next(iter(options))!r}")
        return benchmark(path, images)
    if (as_path(path) / PROMPTS).is_file():
        from mllm_jax.data.tfds_benchmarks import BenchmarkSource

        return benchmark.from_source(BenchmarkSource(path), **options)
    return benchmark(path, images, **options)
