"""The table of benchmarks: exact name -> benchmark. A new benchmark is one file and one row here."""

from mllm_jax.evaluation.benchmarks import (
    blink,
    captions,
    gqa,
    llava_bench,
    mathvista,
    mini,
    mm_vet,
    mmbench,
    mme,
    mmmu,
    mmmu_pro,
    nextqa,
    pope,
    q_bench,
    refcoco,
    relaxed_accuracy,
    scienceqa,
    seed_bench,
    textvqa,
    video_qa,
    vizwiz,
    vqa,
    vqav2,
)
from mllm_jax.evaluation.benchmarks.base import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    "activitynet_qa": video_qa.BENCHMARKS["activitynet_qa"],
    "blink": blink.BENCHMARK,
    "captions": captions.BENCHMARK,
    "chartqa": relaxed_accuracy.BENCHMARK_CHARTQA,
    "gqa": gqa.BENCHMARK,
    "llava_bench": llava_bench.BENCHMARK,
    "mathvista": mathvista.BENCHMARK,
    "mini": mini.BENCHMARK,
    "mm_vet": mm_vet.BENCHMARK,
    "mmbench": mmbench.BENCHMARK,
    "mmbench_cn": mmbench.BENCHMARK_CN,
    "mme": mme.BENCHMARK,
    "mmmu": mmmu.BENCHMARK,
    "mmmu_pro": mmmu_pro.BENCHMARK,
    "msrvtt_qa": video_qa.BENCHMARKS["msrvtt_qa"],
    "msvd_qa": video_qa.BENCHMARKS["msvd_qa"],
    "nextqa": nextqa.BENCHMARK,
    "ok_vqa": vqav2.BENCHMARK_OK_VQA,
    "pope": pope.BENCHMARK,
    "q_bench": q_bench.BENCHMARK,
    "q_bench_zh": q_bench.BENCHMARK_ZH,
    "refcoco": refcoco.BENCHMARKS["refcoco"],
    "refcoco+": refcoco.BENCHMARKS["refcoco+"],
    "refcoco+_caption": captions.BENCHMARK_REGION["refcoco+"],
    "refcoco_caption": captions.BENCHMARK_REGION["refcoco"],
    "refcocog": refcoco.BENCHMARKS["refcocog"],
    "refcocog_caption": captions.BENCHMARK_REGION["refcocog"],
    "relaxed_accuracy": relaxed_accuracy.BENCHMARK,
    "scienceqa": scienceqa.BENCHMARK,
    "seed_bench": seed_bench.BENCHMARK,
    "textvqa": textvqa.BENCHMARK,
    "video_chatgpt": video_qa.BENCHMARKS["video_chatgpt"],
    "vizwiz": vizwiz.BENCHMARK,
    "vqa": vqa.BENCHMARK,
    "vqav2": vqav2.BENCHMARK,
}


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that exact name.

    Raises:
        ValueError: there is none; lists the names.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(sorted(BENCHMARKS))}")
    return BENCHMARKS[name]


__all__ = ["BENCHMARKS", "Benchmark", "get_benchmark"]
