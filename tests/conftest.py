"""What all tests share: run-time checks of shapes and types, and a model and data small enough for seconds.

Every annotation of the package is checked while tests run (jaxtyping and beartype), so this file must be imported
before the package is.
"""

import os
import pathlib
import subprocess
import sys

import pytest

if not any(argument.startswith("--jaxtyping-packages") for argument in sys.argv):
    from jaxtyping import install_import_hook

    install_import_hook("mllm_jax", "beartype.beartype")

import tiny

ROOT = pathlib.Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.addoption(
        "--update-goldens", action="store_true", help="write tests/goldens/ again instead of comparing"
    )


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token per byte; `<pad>`, `<s>` and `</s>` first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>"]
    symbols = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def tiny_model():
    """`ModelConfig` of a two-block tower and a two-block LLM, 4 visual tokens per image."""
    return tiny.model_config()


@pytest.fixture(scope="session")
def tiny_params(tiny_model):
    """Parameters of `tiny_model`, NumPy arrays as from a checkpoint."""
    from mllm_jax.models import mllm

    return tiny.random_params(mllm.abstract_params(tiny_model))


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
    root = tmp_path_factory.mktemp("llava")
    captions = {f"caption{i}": (1, [("", "a picture " + "of it " * (i % 3))]) for i in range(8)}
    instructions = {
        f"sample{i}": ((0, 1, 2)[i % 3], [("what?", "it is " + "so " * (i % 4)), ("and?", "no")][: 1 + i % 2])
        for i in range(10)
    }
    return {
        "captions": tiny.write_llava(root / "captions", captions),
        "instructions": tiny.write_llava(root / "instructions", instructions),
    }


@pytest.fixture
def tiny_config(tiny_checkpoints, tiny_data):
    """A two-stage recipe on `tiny_data` that trains in seconds; free to be changed."""
    from mllm_jax.config import default_config, source_config, stage_config

    config = default_config()
    config.seed = 7
    config.model.vision.path = str(tiny_checkpoints["vision"])
    config.model.llm.path = str(tiny_checkpoints["llm"])
    config.model.vision.image_size = tiny.IMAGE_SIZE
    config.model.vision.select_layer = -1
    config.model.vision.remat = config.model.llm.remat = "none"
    config.model.connector.name = "average_pool"
    config.model.connector.average_pool.tokens = 4
    config.data.seq_len = 64
    config.data.image_slots = 2
    config.data.threads = 1
    config.eval.template = "mistral_instruct"
    for name, data, template in (
        ("pretrain", "captions", "plain"),
        ("finetune", "instructions", "mistral_instruct"),
    ):
        stage, source = stage_config(), source_config()
        source.json, source.images = (str(path) for path in tiny_data[data])
        stage.sources = {data: source}
        stage.template = template
        stage.batch_size = 4
        stage.steps = 6
        stage.learning_rate = 1e-2
        stage.warmup_ratio = 0.2
        stage.log_every = 2
        stage.checkpoint_every = 2
        config.stages[name] = stage
    config.stages.finetune.trainable = ("connector/.*", "llm/.*")
    config.stages.finetune.accumulation = 2
    config.stage_order = ("pretrain", "finetune")
    return config


@pytest.fixture(scope="session")
def script_environment(tmp_path_factory):
    """Environment for scripts in processes of their own: one compilation cache for the session, and no torch.

    torch is an oracle of tests only; a script that needed it would fail here.
    """
    root = tmp_path_factory.mktemp("environment")
    (root / "site").mkdir()
    (root / "site" / "torch.py").write_text('raise ImportError("torch must not be needed at run time")\n')
    paths = [str(root / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(root / "cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "COLUMNS": "200",
    }


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
