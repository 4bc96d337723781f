"""Configurations: strict checks that name the key, and a golden file for every recipe.

After changing a recipe or a default on purpose: `pytest tests/test_config.py --update-goldens`, and read the diff.
"""

import importlib.util
import json
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from mllm_jax.cli.main import main
from mllm_jax.config import (
    ATTENTION,
    MERGES,
    NEWLINES,
    PINPOINTS,
    POOLS,
    REMAT,
    SAMPLINGS,
    SCHEMA,
    TIMES,
    ConfigError,
    benchmark_config,
    check,
    check_key,
    default_config,
    default_of,
    resolved,
    stage_config,
)
from mllm_jax.data import anyres, images, video, video_layout
from mllm_jax.models.attention import BACKENDS
from mllm_jax.models.layers import REMAT_POLICIES
from mllm_jax.parallel.mesh import make_mesh
from mllm_jax.schema import Key, walk

ROOT = pathlib.Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens" / "configs"
# Every recipe and the arguments that are worth a golden of their own; "" is the recipe without argument.
RECIPES = {
    "dense_connector": ("", "phi-2", "vicuna-7b", "yi-34b", "llama3-70b", "yi-34b-anyres", "mini"),
    "llava15": ("", "lora"),
    "mini_gemini": ("", "hd"),
    "llava_next": ("", "mini"),
    "mini_foundation": ("",),
    "own_data": ("", "pretrain", "finetune"),
    "preserve_or_compress": ("", "mini"),
    "quickstart": ("", "average_pool"),
}
EVERY_RECIPE = [(name, argument) for name, arguments in RECIPES.items() for argument in arguments]


def load_recipe(name, argument=""):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def set_key(config, path, value):
    """Sets a key as a careless recipe would: new keys and other types are let through."""
    *parents, last = path.split(".")
    for parent in parents:
        config = config[parent]
    with config.unlocked(), config.ignore_type():
        config[last] = value


def test_choices_are_the_tables_of_what_stands_above():
    assert (MERGES, PINPOINTS) == (anyres.MERGES, anyres.LLAVA_16)
    theirs = tuple(video.SAMPLINGS), video_layout.POOLS, video_layout.TIMES, video_layout.NEWLINES
    assert theirs == (SAMPLINGS, POOLS, TIMES, NEWLINES)
    assert ("auto", *BACKENDS) == ATTENTION
    assert tuple(REMAT_POLICIES) == REMAT


# ---------------------------------------------------------------------------------------------------- recipes


def test_every_recipe_has_a_golden():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == set(RECIPES)
    names = {"-".join(filter(None, pair)) for pair in EVERY_RECIPE}
    assert {path.stem for path in GOLDENS.glob("*.json")} == names


@pytest.mark.parametrize(("name", "argument"), EVERY_RECIPE)
def test_recipe_equals_its_golden(name, argument, request):
    config = load_recipe(name, argument)
    if "stages" in config:
        values = resolved(config)
        for stage in config.stages.values():
            for source in stage.sources.values():
                source.json = source.json or "given on the command line"
        check(config)
    else:  # the foundation's recipe has a schema of its own
        values = config.to_dict()
    values = json.loads(json.dumps(values))  # tuples as lists
    path = GOLDENS / f"{'-'.join(filter(None, (name, argument)))}.json"
    if request.config.getoption("--update-goldens"):
        path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
    assert values == json.loads(path.read_text()), f"differs from {path}; see the top of this file"


def test_the_reference_is_up_to_date(request, capsys):
    assert main(["config"]) == 0
    text = capsys.readouterr().out
    path = ROOT / "docs" / "config.md"
    if request.config.getoption("--update-goldens"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "make it again: mllm-jax config > docs/config.md"


def test_the_reference_of_a_part(capsys):
    assert main(["config", "--only", "stages.*.lora"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 5
    assert lines[2].startswith("| `stages.*.lora.rank` | int; at least 0 | `0` | ")
    assert main(["config", "--only", "stages.*.lor"]) == 1


def test_resolved_keeps_only_the_chosen_connector(tiny_config):
    values = resolved(tiny_config)
    assert set(values["model"]["connector"]) == {"name", "path", "average_pool"}
    assert values["stages"]["finetune"]["trainable"] == ["connector/.*", "llm/.*"]
    assert json.loads(json.dumps(values)) == values


def test_validate_has_the_pixel_limit_of_training():
    assert default_config().data.max_image_pixels == images.MAX_PIXELS


# --------------------------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("sed", "unknown config key 'sed'; did you mean 'seed'?"),
        ("model.conector", "unknown config key 'model.conector'; did you mean 'model.connector'?"),
        ("model.connector.nam", "did you mean 'model.connector.name'?"),
        ("model.connector.average_pool.token", "did you mean 'model.connector.average_pool.tokens'?"),
        ("model.vision.remart", "did you mean 'model.vision.remat'?"),
        ("stages.pretrain.lerning_rate", "did you mean 'stages.pretrain.learning_rate'?"),
        ("stages.pretrain.sources.captions.image", "did you mean 'stages.pretrain.sources.captions.images'?"),
        ("eval.max_tokens", "did you mean 'eval.max_new_tokens'?"),
        ("stages.pretrain.lr", "did you mean 'stages.pretrain.learning_rate'?"),
        ("stages.pretrain.LR", "did you mean 'stages.pretrain.learning_rate'?"),
        ("stages.pretrain.bs", "did you mean 'stages.pretrain.batch_size'?"),
        ("stages.pretrain.gradient_accumulation_steps", "did you mean 'stages.pretrain.accumulation'?"),
        ("model.llm.gradient_checkpointing", "did you mean 'model.llm.remat'?"),
        ("stages.pretrain.lora.r", "did you mean 'stages.pretrain.lora.rank'?"),
        ("lr", "unknown config key 'lr'; there is 'stages.*.learning_rate'; valid here: data"),
        ("connector", "there is 'model.connector'; valid here: data"),
        ("num_workers", "there is 'data.threads'; valid here: data"),
        (
            "weight_decay",
            "unknown config key 'weight_decay'; there is 'stages.*.weight_decay'; valid here: data",
        ),
        ("zzzz", "unknown config key 'zzzz'; valid here: data, eval, mesh"),
    ],
)
def test_unknown_key_names_the_nearest(tiny_config, path, message):
    set_key(tiny_config, path, 1)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(tiny_config)


def test_check_key_walks_the_given_config(tiny_config):
    check_key(tiny_config, "stages.pretrain.sources.captions.json")
    with pytest.raises(ConfigError, match=r"'stages\.pretrian'; did you mean 'stages\.pretrain'"):
        check_key(tiny_config, "stages.pretrian.steps")
    with pytest.raises(ConfigError, match=r"'seed' holds a value, so there is no 'seed\.x'"):
        check_key(tiny_config, "seed.x")


def test_no_synonym_hides_a_key_beside_it():
    """A synonym leads to one key, and is no valid key of the same place itself."""
    places = {}
    for path, node in walk(SCHEMA):
        parent, _, name = path.rpartition(".")
        places.setdefault(parent, []).append((name, *getattr(node, "synonyms", ())))
    for parent, words in places.items():
        flat = [word for group in words for word in group]
        assert len(flat) == len(set(flat)), (parent, {word for word in flat if flat.count(word) > 1})
        assert all(word == word.lower() for word in flat)


def test_every_key_says_what_it_means_and_has_a_valid_default():
    for path, node in walk(SCHEMA):
        if isinstance(node, Key):
            assert node.problem(node.default) is None, path
            assert node.help, path


def test_missing_key_is_named(tiny_config):
    with tiny_config.unlocked():
        del tiny_config.data.overlong
    with pytest.raises(ConfigError, match=r"'data\.overlong' is missing"):
        check(tiny_config)


# ---------------------------------------------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.attention", "flash", "'model.attention' is 'flash'; did you mean 'splash'?"),
        ("seed", "a", "'seed' must be of type int, not 'a'"),
        ("seed", True, "'seed' must be of type int"),
        ("seed", -1, "'seed' must be at least 0, not -1"),
        ("data", 3, "'data' must be a dict with aspect,"),
        ("data.seq_len", 12.5, "'data.seq_len' must be of type int"),
        ("data.seq_len", 0, "'data.seq_len' must be at least 1, not 0"),
        ("data.label_tokens", 0, "'data.label_tokens' must be at least 1"),
        ("data.aspect", "pat", "'data.aspect' is 'pat'; did you mean 'pad'?"),
        ("data.overlong", "cut", "valid: 'error', 'skip'"),
        ("model.dtype", "bf16", "did you mean 'bfloat16'?"),
        ("model.connector.name", "mlp2_gelu", "did you mean 'mlp2x_gelu'?"),
        (
            "model.connector.average_pool.mode",
            "3d",
            "'model.connector.average_pool.mode' is '3d'; valid: '1d', '2d'",
        ),
        (
            "model.connector.sti.layers",
            (3, "4"),
            "'model.connector.sti.layers' must be of type tuple of integers",
        ),
        ("model.connector.resampler.depth", 0, "'model.connector.resampler.depth' must be at least 1, not 0"),
        (
            "eval.benchmarks",
            ConfigDict({"mine": {**benchmark_config(), "images": "gs://bucket/data"}}),
            "'eval.benchmarks.mine.images' is 'gs://bucket/data': it is object storage",
        ),
        ("mesh.data", 0, "'mesh.data' must be at least 1 or -1, not 0"),
        ("eval.blind", 1, "'eval.blind' must be of type bool"),
        (
            "eval.benchmarks",
            ConfigDict({"mine": {**benchmark_config(), "options": 3}}),
            "'eval.benchmarks.mine.options' must be of type dict, not 3",
        ),
        ("eval.overlong", "skip", "valid: 'error', 'empty'"),
        ("stages", 1, "'stages' must be a dict of named entries"),
        ("stages.pretrain", 1, "'stages.pretrain' must be a dict with"),
        ("stages.pretrain.steps", 0, "'stages.pretrain.steps' must be at least 1"),
        ("stages.pretrain.steps", "9", "'stages.pretrain.steps' must be of type int"),
        ("stages.pretrain.seq_len", -5, "'stages.pretrain.seq_len' must be at least 1"),
        ("stages.pretrain.learning_rate", "1e-3", "must be of type float"),
        (
            "stages.pretrain.learning_rate",
            float("nan"),
            "'stages.pretrain.learning_rate' must be above 0, not nan",
        ),
        ("stages.pretrain.warmup_ratio", 1.5, "must be at least 0 and below 1"),
        ("stages.pretrain.clip_norm", -1.0, "must be at least 0, not -1.0"),
        ("stages.pretrain.schedule", "linear", "valid: 'cosine', 'constant'"),
        ("stages.pretrain.trainable", (1,), "must be of type tuple of strings, not (1,)"),
        ("stages.pretrain.trainable", "connector/.*", "must be of type tuple"),
        ("stages.pretrain.trainable", (), "is empty: nothing would be trained"),
        (
            "stages.pretrain.trainable",
            ("(",),
            "'stages.pretrain.trainable' holds '(', which is not a regular expression",
        ),
        ("stages.pretrain.lora.rnk", 1, "did you mean 'stages.pretrain.lora.rank'?"),
        ("stages.pretrain.lora", 8, "'stages.pretrain.lora' must be a dict with alpha, dropout, rank"),
        ("stages.pretrain.lora.rank", -1, "'stages.pretrain.lora.rank' must be at least 0"),
        ("stages.pretrain.lora.rank", 1.5, "'stages.pretrain.lora.rank' must be of type int"),
        ("stages.pretrain.lora.alpha", 0.0, "'stages.pretrain.lora.alpha' must be above 0"),
        ("stages.pretrain.lora.dropout", 1.0, "must be at least 0 and below 1"),
        (
            "stages.pretrain.lora.targets",
            "llm/(",
            "'stages.pretrain.lora.targets' holds 'llm/(', which is not a regular",
        ),
        ("stages.pretrain.quantize_base", "int4", "did you mean 'int8'?"),
        ("stages.pretrain.aspect", "crop", "'stages.pretrain.aspect' is 'crop'"),
        ("stages.pretrain.learning_rates", (("a",),), "must hold (path regex, positive rate) pairs"),
        ("stages.pretrain.learning_rates", (("a", 0.0),), "must hold (path regex, positive rate) pairs"),
        (
            "stages.pretrain.learning_rates",
            (("[", 1.0),),
            "'stages.pretrain.learning_rates' holds '[', which is not a regular",
        ),
        ("stages.pretrain.batch_size", 5, None),
        ("stages.finetune.batch_size", 5, "must be a multiple of 'stages.finetune.accumulation' (2)"),
        ("stages.pretrain.keep_last", 0, "'stages.pretrain.keep_last' must be at least 1"),
        ("stages.pretrain.sources", ConfigDict(), "'stages.pretrain.sources' is empty"),
        ("stages.pretrain.sources.captions.weight", 0.0, "must be above 0, not 0.0"),
        ("stages.pretrain.sources.captions.json", "", "'stages.pretrain.sources.captions.json' is empty"),
        ("stages.pretrain.sources.captions.kind", "miniworld", "did you mean 'mini_world'?"),
        ("stage_order", ("pretrain",), "must name each of the stages"),
        ("stage_order", ("pretrain", "finetune", "finetune"), "must name each of the stages"),
    ],
)
def test_wrong_values_name_the_key(tiny_config, path, value, message):
    set_key(tiny_config, path, value)
    if message is None:
        check(tiny_config)
        return
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(tiny_config)


def test_values_that_are_as_good_as_their_type(tiny_config):
    set_key(tiny_config, "stages.pretrain.learning_rate", 1)
    set_key(tiny_config, "stage_order", ["pretrain", "finetune"])
    set_key(tiny_config, "stages.pretrain.learning_rates", [["connector/.*", 1]])
    check(tiny_config)


def test_adapters_alone_are_enough_to_train(tiny_config):
    tiny_config.stages.finetune.trainable = ()
    with pytest.raises(ConfigError, match="nothing would be trained"):
        check(tiny_config)
    tiny_config.stages.finetune.lora.rank = 2
    check(tiny_config)


def test_defaults_are_found_by_path():
    assert default_of("seed") == 42
    assert default_of("stages.any.lora.rank") == 0
    assert default_of("stages.any.sources.main.weight") == 1.0
    assert default_of("stages.any.trainable") == ["connector/.*"]
    assert default_of("eval.benchmarks.vqa.kind") == "mini"
    for path in ("sed", "stages.any.lora.rnk", "seed.x"):
        with pytest.raises(ConfigError, match=f"no config key '{path}'"):
            default_of(path)


def test_no_stage_is_an_error():
    with pytest.raises(ConfigError, match="'stages' is empty"):
        check(default_config())


def test_names_that_cannot_be_directories_are_refused(tiny_config):
    with tiny_config.unlocked():
        tiny_config.stages["a/b"] = stage_config()
    with pytest.raises(ConfigError, match=r"'a/b' in config key 'stages' cannot be a name"):
        check(tiny_config)


# ---------------------------------------------------------------------------------------- impossible combinations


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data.seq_len", 4, "'data.seq_len' is 4, but one image already takes 4 tokens"),
        ("data.seq_len", 513, "'data.seq_len' is 513, more than the LLM's 512 positions"),
        ("stages.finetune.seq_len", 3, "'stages.finetune.seq_len' is 3, but one image"),
        ("model.vision.image_size", 6, "'model.vision.image_size' is 6, less than one patch of 7"),
        (
            "model.vision.select_layer",
            3,
            "'model.vision.select_layer': vision.select_layer=3 is outside hs[0..2]",
        ),
        ("model.vision.select_layer", -4, "is outside hs[0..2]"),
        ("model.connector.average_pool.tokens", 5, "average_pool.tokens=5"),
        ("model.connector.average_pool.tokens", 25, "average_pool.tokens=25"),
    ],
)
def test_impossible_models_are_named(tiny_config, path, value, message):
    from mllm_jax.inference import runs

    set_key(tiny_config, path, value)
    check(tiny_config)
    with pytest.raises(ConfigError, match=re.escape(message)):
        runs.model_config(tiny_config)


def test_missing_checkpoint_is_named(tiny_config, tmp_path):
    from mllm_jax.inference import runs

    (tmp_path / "empty").mkdir()
    tiny_config.model.llm.path = str(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"empty/config\.json is missing"):
        runs.model_config(tiny_config)
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(ConfigError, match=r"'model\.llm\.path': .*resnet"):
        runs.model_config(tiny_config)


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        ("stages.finetune.trainable", ("llm/.*", "conector/.*"), ConfigError,
         "'stages.finetune.trainable': pattern 'conector/.*' matches no parameter"),
        ("stages.finetune.learning_rates", (("vision/.*", 1e-5),), ConfigError,
         "'stages.finetune.learning_rates': learning_rates: 'vision/.*' matches no trained parameter"),
        ("stages.finetune.template", "vicuna", ConfigError,
         "'stages.finetune.template': unknown template 'vicuna'; did you mean 'vicuna_v1'?"),
        ("stages.finetune.template", "llama_3", ConfigError, "is not a token of this tokenizer"),
        ("stages.finetune.sources.instructions.json", "nowhere.json", FileNotFoundError,
         "'stages.finetune.sources.instructions.json': there is no nowhere.json"),
        ("stages.finetune.sources.instructions.kind", "mini_world", ConfigError,
         "'stages.finetune.sources.instructions.split' is ''; valid: 'foundation', 'pretrain', 'finetune'"),
        ("stages.finetune.lora", {"targets": "llm/blocks/query/kernel"}, ConfigError,
         "'stages.finetune.lora.targets': lora.targets='llm/blocks/query/kernel' matches no kernel; kernels: llm"),
        ("stages.finetune.lora", {}, ConfigError,
         "'stages.finetune.trainable': 'llm/blocks/down/kernel' is trained itself and adapted by lora.targets"),
        ("stages.finetune.quantize_base", "int8", ConfigError,
         "quantisation pattern 'llm/blocks/.*/kernel' matches no kernel"),
        ("model.attention", "splash", ConfigError,
         "'model.attention': attention backend 'splash' cannot compute causal"),
        ("stages.finetune.batch_size", 6, None, ""),
    ],
)  # fmt: skip
def test_what_would_stop_the_second_stage_is_found_before_the_first(tiny_config, path, value, error, message):
    import jax

    from mllm_jax.inference import runs
    from mllm_jax.interop import load_tokenizer
    from mllm_jax.training import preflight

    source = tiny_config.stages.finetune.sources.instructions
    source.count, source.form = 3, "caption"
    if path.endswith("lora"):
        tiny_config.stages.finetune.lora.update({"rank": 2, **value})
    else:
        set_key(tiny_config, path, value)
    check(tiny_config)
    tokenizer = load_tokenizer(tiny_config.model.llm.path)
    mesh = make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    arguments = (tiny_config, runs.model_config(tiny_config), tokenizer, mesh)
    if error is None:
        preflight.check_stages(*arguments)
        return
    with pytest.raises(error, match=re.escape(message)):
        preflight.check_stages(*arguments)
