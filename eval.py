"""Answers benchmarks with a model, scores them, writes what servers take and the report.

    python eval.py --workdir=runs/quickstart
    python eval.py --workdir=runs/quickstart --stage=pretrain --out=runs/quickstart/after_pretrain
    python eval.py --workdir=runs/mine --benchmark=vqa --path=test.json --images=images
    python eval.py --workdir=runs/mine --benchmarks=mmbench,mme,pope --data_dir=benchmarks
    python eval.py --workdir=runs/quickstart --benchmark=mini_video --out=runs/quickstart_video
    python eval.py --model=models/llava --template=vicuna_v1 --benchmarks=vqav2:split=test-dev2015 \\
        --data_dir=benchmarks --out=runs/llava

The model is a run's (everything about it is read from the work directory) or, with --model, an imported one or a
published checkpoint (llava-hf, LLaVA, Honeybee). --benchmarks takes names of docs/benchmarks.md, each with its options
behind colons; the files of NAME are expected under DATA_DIR/NAME. What was answered before is kept, so a stopped
evaluation goes on where it was.
"""

from mllm_jax.cli import huge_pages

if __name__ == "__main__":
    huge_pages.start_again()  # before the seconds that the imports take

from absl import flags, logging
from ml_collections import ConfigDict

from mllm_jax.cli import script
from mllm_jax.config import ConfigError, benchmark_config, declared, default_config
from mllm_jax.data.templates import CHAT, check_name
from mllm_jax.evaluation import run
from mllm_jax.evaluation.own_benchmarks import eval_config
from mllm_jax.evaluation.selection import select_benchmarks
from mllm_jax.inference.load import DTYPES, load
from mllm_jax.parallel import cpu_devices, processes
from mllm_jax.parallel.mesh import ANSWERING_RULES, make_mesh, use_mesh
from mllm_jax.storage import as_path
from mllm_jax.workdir import saved_config

flags.adopt_module_key_flags(script)  # --help shows --traceback
WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a run of train.py.")
STAGE = flags.DEFINE_string("stage", None, "Evaluate the model after this stage (default: the last one).")
OUT = flags.DEFINE_string("out", None, "Where `eval/` is written (default: the work directory).")
MODEL = flags.DEFINE_string("model", None, "Instead of --workdir: a model directory or hub id; needs --out.")
TEMPLATE = flags.DEFINE_string("template", None, "Conversation template, if not the recorded one.")
ASPECT = flags.DEFINE_enum(
    "aspect", None, declared("data.aspect").choices, "How --model was shown images, if it does not record it."
)
DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Of --model's parameters and computation, if not its own.")
TOWER = flags.DEFINE_string("tower", None, "Vision tower of --model, if not the one that it names.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer of --model, if not beside it.")
BENCHMARK = flags.DEFINE_string("benchmark", None, "Kind of a benchmark to answer instead of the run's own.")
PATH = flags.DEFINE_string("path", None, "Its questions (with --benchmark).")
IMAGES = flags.DEFINE_string("images", "", "Folder of its images (with --benchmark).")
BENCHMARKS = flags.DEFINE_list(
    "benchmarks", None, "Published benchmarks: NAME or NAME:OPTION=VALUE, by commas."
)
DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Holds a folder per published benchmark (with --benchmarks)."
)
PREPARED = flags.DEFINE_string(
    "prepared",
    "",
    "Folder where --benchmarks are first written as tensorflow-datasets data, and read from then on.",
)
VIDEO = flags.DEFINE_list(
    "video",
    [],
    "How videos are read: KEY=VALUE of model.video (docs/config.md), by commas (default: the model's way).",
)
BLIND = flags.DEFINE_bool(
    "blind", True, "Also answer with the image replaced by its mean, or a video by a frame."
)
LIKELIHOOD = flags.DEFINE_bool("likelihood", False, "Also score multiple choice by the options' likelihood.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Prompts at once (default: the run's).", lower_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "Length of answers, instead of each benchmark's official limit.", lower_bound=1
)
OVERLONG = flags.DEFINE_enum(
    "overlong",
    None,
    declared("eval.overlong").choices,
    "A prompt beyond the context: stop, or count it as an empty answer (default: the run's).",
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Several hosts: join the other processes first (docs/operating.md)."
)


def check_flags() -> None:
    """Combinations of flags.

    Raises:
      ConfigError: one that makes no sense; says what is missing.
    """
    try:
        check_name(TEMPLATE.value or CHAT)
    except ValueError as error:
        raise ConfigError(f"--template: {error}") from None
    if bool(WORKDIR.value) == bool(MODEL.value):
        raise ConfigError("give either --workdir (a run of train.py) or --model (a checkpoint)")
    if MODEL.value:
        if not OUT.value:
            raise ConfigError("--model needs --out, the folder for answers, scores and report")
        if not (BENCHMARK.value or BENCHMARKS.value):
            raise ConfigError("--model has no benchmarks of its own: give --benchmarks or --benchmark")
    if BENCHMARKS.value and not DATA_DIR.value:
        raise ConfigError("--benchmarks needs --data_dir, the folder that holds a folder per benchmark")
    video_settings()
    if BENCHMARKS.value and BENCHMARK.value:
        raise ConfigError("give either --benchmarks (published ones) or --benchmark with --path (your own)")


def video_settings() -> dict[str, int | str]:
    """`--video` as keys of `model.video` and their values.

    Raises:
      ConfigError: no such key, or no value of it.
    """
    found: dict[str, int | str] = {}
    for pair in VIDEO.value:
        name, _, text = pair.partition("=")
        key = declared(f"model.video.{name}")
        value = int(text) if key.kind is int and text.isdecimal() else text
        if problem := key.problem(value):
            raise ConfigError(f"--video: {name!r} {problem}")
        found[name] = value
    return found


def main(_):
    logging.set_verbosity(logging.WARNING)
    check_flags()
    if DISTRIBUTED.value:
        processes.join()

    # ------------------------------------------------------------------------------- what to evaluate, on what
    workdir = as_path(WORKDIR.value or OUT.value)
    with processes.together("configuration read"):
        config = saved_config(workdir) if WORKDIR.value else default_config()
        cpu_devices.divide(config.mesh.cpu_devices)
    if BENCHMARK.value:
        benchmark = benchmark_config()
        benchmark.kind, benchmark.path, benchmark.images = BENCHMARK.value, PATH.value or "", IMAGES.value
        config.eval.benchmarks = ConfigDict({BENCHMARK.value: benchmark})
    elif BENCHMARKS.value:
        config.eval.benchmarks = select_benchmarks(BENCHMARKS.value, DATA_DIR.value, PREPARED.value)
    config.eval.blind, config.eval.likelihood = BLIND.value, LIKELIHOOD.value
    config.eval.batch_size = BATCH_SIZE.value or config.eval.batch_size
    config.eval.overlong = OVERLONG.value or config.eval.overlong
    if MAX_NEW_TOKENS.value:
        for benchmark in config.eval.benchmarks.values():
            benchmark.max_new_tokens = MAX_NEW_TOKENS.value

    # ---------------------------------------------------------------------------------------------- the model
    mesh = make_mesh(config.mesh.to_dict())
    with use_mesh(mesh, ANSWERING_RULES):
        model = load(
            MODEL.value or workdir,
            template=TEMPLATE.value,
            stage=STAGE.value,
            aspect=ASPECT.value,
            dtype=DTYPE.value,
            tower=TOWER.value,
            tokenizer=TOKENIZER.value,
            mesh=mesh,
        )

        # ------------------------------------------------------------------------- answers, scores and report
        out = as_path(OUT.value or workdir)
        run.evaluate(model, eval_config(config, workdir), out, video=video_settings())


if __name__ == "__main__":
    script.run(main)
