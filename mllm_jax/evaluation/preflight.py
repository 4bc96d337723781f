"""What can be known to fail in an evaluation before the model is trained or loaded."""

from typing import Any

from ml_collections import ConfigDict

from mllm_jax.config import ConfigError, check_paths, config_key_error
from mllm_jax.data.chat_template import check_template, resolve_template
from mllm_jax.evaluation.benchmarks import Benchmark, read_benchmark
from mllm_jax.evaluation.benchmarks.base import VIDEOS
from mllm_jax.evaluation.own_benchmarks import DRAWN


def check_benchmarks(config: ConfigDict, tokenizer: Any) -> None:
    """Reads the questions of every benchmark of `config.eval` and looks for their images.

    Raises:
      ConfigError: naming the key.
      FileNotFoundError: naming the key and the file.
    """
    if config.eval.benchmarks:
        with config_key_error("eval.template"):
            check_template(resolve_template(config.eval.template, tokenizer), tokenizer)
    for name, values in config.eval.benchmarks.items():
        _check_benchmark(values, f"eval.benchmarks.{name}")


def _check_benchmark(values: ConfigDict, key: str) -> None:
    if values.framed and (values.kind != "mini" or values.path):
        raise ConfigError(
            f"config key '{key}.framed': only the benchmark 'mini' that is drawn here has canvases"
        )
    if values.kind in DRAWN and not values.path:  # made when it is needed
        if not values.count:
            raise ConfigError(f"config key '{key}.count' is 0; give the number of questions per ability")
        return
    check_paths(values, key)
    with config_key_error(key):
        benchmark = read_benchmark(
            values.kind, values.path, values.images or None, **values.options.to_dict()
        )
    if type(benchmark).read_image is not Benchmark.read_image:  # images that are not files
        return
    for question in benchmark.questions:
        for name in question.images:
            video = question.medium == VIDEOS
            file = benchmark.video_file(name) if video else benchmark.images / name
            if not (file.exists() if video else file.is_file()):
                raise FileNotFoundError(
                    f"config key '{key}': question {question.row['question_id']!r} of {values.path} needs the "
                    f"{'video' if video else 'image'} {file}, which is not there"
                )
