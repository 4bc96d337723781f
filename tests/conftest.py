"""What all tests share: run-time checks of shapes and types, and a model and data small enough for seconds.

Every annotation of the package is checked while tests run (jaxtyping and beartype), so this file must be imported
before the package is.
"""

import atexit
import contextlib
import datetime
import importlib.util
import os
import pathlib
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

if not any(argument.startswith("--jaxtyping-packages") for argument in sys.argv):
    from jaxtyping import install_import_hook

    install_import_hook("mllm_jax", "beartype.beartype")

import grain  # noqa: F401 (defines absl flags, which must not count as a script's)
import jax
import tiny
from absl import flags
from jax.experimental import multihost_utils

ROOT = pathlib.Path(__file__).parents[1]

# Tiny models run for milliseconds and compile for seconds, of which LLVM's optimizations are half: tests do without.
# XLA reads this at its first use; what the caller sets comes last and wins.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()

# Scripts in processes of their own, and runs that are repeated, compile the same programs again and again. Each of
# pytest-xdist's workers has a cache of its own, because JAX may read an entry that another process is still writing.
CACHES = os.environ.get("JAX_COMPILATION_CACHE_DIR")
if not CACHES:
    CACHES = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mllm_jax_tests_")
    atexit.register(shutil.rmtree, CACHES, ignore_errors=True)
CACHE = os.path.join(CACHES, os.environ.get("PYTEST_XDIST_WORKER", "main"))
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

SLOW_SHARES = 64
# Files that take longest, in this order: begun first, so that no process works at one when the others have ended.
LONG = """
    test_docs_commands.py test_train.py inference/test_model.py connectors/test_connector_contract.py
    evaluation/test_plots.py data/test_chat_template.py models/test_attention.py evaluation/test_answer.py
    training/test_lora_stage.py training/test_flops.py parallel/test_collectives.py
    training/test_packed_training.py planning/test_plan.py models/test_tiles_model.py
    cli/test_weights_cli.py parallel/test_every_mesh.py models/test_encoders.py
    inference/test_generation.py inference/test_prefill.py test_buckets.py parallel/test_devices.py
    serve/test_server.py serve/test_engine.py
""".split()
# Options that choose tests: --all, files, -k, -m, --lf, --ff, --sw and --sw-skip.
ASKED_FOR = ("all", "file_or_dir", "keyword", "markexpr", "lf", "failedfirst", "stepwise", "stepwise_skip")


def pytest_addoption(parser):
    parser.addoption(
        "--update-goldens", action="store_true", help="write tests/goldens/ again instead of comparing"
    )
    parser.addoption(
        "--all",
        action="store_true",
        help=f"run all slow tests, not one in {SLOW_SHARES} of the whole suite's",
    )


def _slow_share(config):
    """Which of `SLOW_SHARES` parts of the slow tests runs, or None for all of them.

    A run of the whole suite takes one part, and another one with other commits; tests that are asked for by file, name,
    marker or an earlier run's outcome all run.
    """
    chosen = config.option
    if any(getattr(chosen, name, False) for name in ASKED_FOR):  # pytest's cache, and its options, can be off
        return None
    command = ["git", "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # not a checkout
        return datetime.date.today().toordinal() % SLOW_SHARES
    return int(commit, 16) % SLOW_SHARES


def pytest_configure(config):
    # Workers are told, because they must agree and do not know what was asked for.
    told = getattr(config, "workerinput", None)
    config.slow_share = told["slow_share"] if told else _slow_share(config)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["slow_share"] = node.config.slow_share


def pytest_report_header(config):
    if config.slow_share is not None:
        return f"slow tests: part {config.slow_share + 1} of {SLOW_SHARES} (all with --all)"
    return None


def pytest_collection_modifyitems(config, items):
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))
    if config.slow_share is None:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    left_out = {item for index, item in enumerate(slow) if index % SLOW_SHARES != config.slow_share}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token per byte; `<pad>`, `<s>` and `</s>` first."""
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model():
    """`ModelConfig` of a two-block tower and a two-block LLM, 4 visual tokens per image."""
    return tiny.model_config()


@pytest.fixture(scope="session")
def tiny_params(tiny_model):
    """Parameters of `tiny_model`, read-only NumPy arrays."""
    from mllm_jax.models import mllm

    return tiny.read_only(tiny.random_params(mllm.abstract_params(tiny_model)))


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory, tiny_model, tiny_params, tiny_tokenizer):
    """Directories "vision" and "llm" with `tiny_model`'s tower and LLM as Hugging Face checkpoints."""
    from mllm_jax import interop

    root = tmp_path_factory.mktemp("checkpoints")
    interop.save_vision(root / "vision", tiny_model.vision, tiny_params["vision"])
    interop.save_llm(root / "llm", tiny_model.llm, tiny_params["llm"], tiny_tokenizer)
    return {"vision": root / "vision", "llm": root / "llm"}


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Two LLaVA-format data sets as (json, images): "captions" and mixed "instructions"."""
    return tiny.write_data(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def tiny_config(tiny_checkpoints, tiny_data):
    """A two-stage recipe on `tiny_data` that trains in seconds; free to be changed."""
    return tiny.recipe(tiny_checkpoints, tiny_data)


@contextlib.contextmanager
def imported_script(name):
    """train.py or eval.py as a module; its flags are taken away afterwards, because both define some names."""
    before = set(flags.FLAGS)
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)


@pytest.fixture(scope="session")
def train():
    """train.py as a module; `train.train(config, directory)` is all of it but the flags."""
    with imported_script("train") as module:
        pass
    return module


@pytest.fixture
def train_script():
    """train.py as a module, with its flags."""
    with imported_script("train") as module:
        yield module


@pytest.fixture(scope="module")
def eval_script():
    """eval.py as a module, with flags at their defaults."""
    with imported_script("eval") as module:
        flags.FLAGS(["eval.py"])
        yield module


@pytest.fixture(scope="session")
def script_environment(tmp_path_factory):
    """Environment for scripts in processes of their own: the session's compilation cache, and no torch.

    torch is an oracle of tests only; a script that needed it would fail here.
    """
    root = tmp_path_factory.mktemp("environment")
    (root / "site").mkdir()
    (root / "site" / "sitecustomize.py").write_text('import sys\n\nsys.modules["torch"] = None\n')
    paths = [str(root / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # what script.run starts a script anew for
        "COLUMNS": "200",
    }


@pytest.fixture
def run_two_processes(script_environment, coordinator):
    """Runs `python SCRIPT COORDINATOR INDEX ARGUMENTS...` as two processes; gives the lines of each."""

    def run(script, *arguments):
        runs = [
            subprocess.Popen(
                [sys.executable, script, coordinator, str(index), *map(str, arguments)],
                env=script_environment | {"JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for index in range(2)
        ]
        said = [run.communicate(timeout=300)[0] for run in runs]
        assert [run.returncode for run in runs] == [0, 0], "".join(said)
        return [lines.splitlines() for lines in said]

    return run


@pytest.fixture(scope="session")
def run_script(script_environment):
    """Runs `python SCRIPT ARGUMENTS...` from the repository's root and waits for it."""

    def run(*arguments, **environment):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=script_environment | environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run


@pytest.fixture
def coordinator():
    """Address for `jax.distributed.initialize`, on a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def as_processes(monkeypatch):
    """`as_processes(work)` calls `work(index)` in two threads that take themselves for the two processes of a run.

    What they tell each other about host values goes through; arrays on devices are each thread's own. Returns what each
    returned or raised.
    """
    me, inboxes, gone = threading.local(), [None, None], object()

    def exchange(value):
        inboxes[1 - me.index].put(value)
        other = inboxes[me.index].get(timeout=60)
        if other is gone:
            raise RuntimeError("the other process has ended")
        return (other, value) if me.index else (value, other)

    def sync(name):
        assert len(set(exchange(name))) == 1

    def process(work, index):
        me.index = index
        try:
            return work(index)
        finally:
            inboxes[1 - index].put(gone)

    def run(work):
        inboxes[:] = queue.Queue(), queue.Queue()
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(process, work, index) for index in range(2)]
            return [future.exception() or future.result() for future in futures]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: getattr(me, "index", 0))
    monkeypatch.setattr(multihost_utils, "sync_global_devices", sync)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda value: np.stack(exchange(value)))
    return run
