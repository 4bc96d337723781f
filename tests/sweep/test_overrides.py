"""Named overrides, and the sweeps of the recipes.

After changing a sweep on purpose: `pytest tests/sweep/test_overrides.py --update-goldens`, and read the diff.
"""

import importlib.util
import json
import pathlib

import pytest
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import config_flags

from mllm_jax.config import ConfigError, resolved
from mllm_jax.sweep import overrides, rates
from mllm_jax.sweep.cells import make_cells, read_sweep
from mllm_jax.sweep.overrides import chain, over, product, zip_

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "goldens" / "sweeps.json"
SWEEPS = (
    "preserve_or_compress:full", "preserve_or_compress:full-rates", "preserve_or_compress:mini",
    "preserve_or_compress:mini-rates", "dense_connector:llama3-8b", "dense_connector:mini",
    "dense_connector:mini-rates", "preserve_or_compress:mini-longer",
)  # fmt: skip


def recipe_of(name):
    file, _, argument = name.partition(":")
    return f"{ROOT}/configs/{file}.py:{argument}"


def base_of(name):
    file, _, argument = name.partition(":")
    spec = importlib.util.spec_from_file_location(file, ROOT / "configs" / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(argument)
    for stage in config.stages.values():
        for source in stage.sources.values():
            if source.kind == "llava":
                source.json = "given on the command line"
    return config


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The checked cells of every sweep, one seed."""
    directory = tmp_path_factory.mktemp("sweep")
    return {
        name: make_cells(read_sweep(recipe_of(name)), base_of(name), (), (0,), directory) for name in SWEEPS
    }


def test_sweeps_equal_their_goldens(cells, request):
    """Of every cell what differs from the recipe, which has a golden of its own."""
    found = {}
    for name in SWEEPS:
        base = flatten_dict(resolved(base_of(name)), sep=".")
        for cell in cells[name]:
            values = flatten_dict(resolved(cell.config), sep=".")
            found.setdefault(name, {})[cell.variant] = {
                key: value for key, value in values.items() if key not in base or base[key] != value
            }
    found = json.loads(json.dumps(found))
    if request.config.getoption("--update-goldens"):
        lines = (
            f" {json.dumps(name)}: {{\n"
            + ",\n".join(
                f"  {json.dumps(cell)}: {json.dumps(values, sort_keys=True)}"
                for cell, values in cells.items()
            )
            + "\n }"
            for name, cells in found.items()
        )
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert found == json.loads(GOLDEN.read_text())


# ml_collections loads recipes in a way that Python 3.12 warns of.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("dense_connector:llama3-8b", "siglip-yi-34b-dci"),  # LoRA: nested tuples
        ("dense_connector:llama3-8b", "clip-vicuna-7b-sci-8+16+20+24"),
        ("preserve_or_compress:mini", "q_former-16-112px"),
    ],
)
def test_options_give_train_the_same_configuration(cells, name, variant):
    (cell,) = (one for one in cells[name] if one.variant == variant)
    given = [
        f"--config.stages.{stage}.sources.main.json=given on the command line" for stage in cell.config.stages
    ]
    given = given if name.startswith("dense") else []
    argv = ["train.py", f"--config={recipe_of(name)}", *given, *cell.options]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=argv)
    values(argv)
    assert resolved(values.config) == resolved(cell.config)


def test_cells_of_a_mini_study_see_the_same_samples(cells):
    """Data, order, rows, schedule and what the LLM learns at are the same; rows are as long as visual tokens need."""
    for name in ("preserve_or_compress:mini", "dense_connector:mini"):
        same = ("data.seed", "data.label_tokens", "seed", "eval")
        for cell in cells[name]:
            config = cell.config
            visual = config.data.seq_len - 384
            for stage, text in (("pretrain", 144), ("finetune", 384)):
                values = config.stages[stage]
                assert (values.pack_by, values.cache_features) == ("text", True)
                assert values.seq_len == text + values.image_slots * visual, cell.name
            values = flatten_dict(resolved(config), sep=".")
            first = flatten_dict(resolved(cells[name][0].config), sep=".")
            for key in values:
                free = key.startswith(("model.connector", "model.vision.image_size")) or key.endswith(
                    "seq_len"
                )
                assert free or key.endswith("connector_rate_scale") or values[key] == first[key], (
                    cell.name,
                    key,
                    same,
                )


def test_combining():
    names, sizes = over("a", ["x", "y"]), over("b.c", [1, (2, 3)], "s{}")
    assert list(product(names, sizes)) == ["x-s1", "x-s2+3", "y-s1", "y-s2+3"]
    assert product(names, sizes)["y-s2+3"] == {"a": "y", "b.c": (2, 3)}
    assert zip_(names, sizes) == {"x-s1": {"a": "x", "b.c": 1}, "y-s2+3": {"a": "y", "b.c": (2, 3)}}
    assert list(chain(names, sizes)) == ["x", "y", "s1", "s2+3"]
    with pytest.raises(ConfigError, match="2, 1 cells"):
        zip_(names, over("b", [1]))
    with pytest.raises(ConfigError, match="both set 'a'"):
        product(names, over("a", ["z"]))
    with pytest.raises(ConfigError, match="two cells of the sweep are called 'x'"):
        chain(names, {"x": {"a": "other"}})


@pytest.mark.parametrize("name", ["a/b", "..", "", ".hidden", "a b", "x" * 121, "a:b", "naïve"])
def test_names_that_become_no_folder(name):
    with pytest.raises(ConfigError, match="cannot become a folder"):
        overrides.check_names({name: {}})


def test_names_that_one_file_system_takes_for_the_same():
    with pytest.raises(ConfigError, match="differ in upper and lower case alone"):
        overrides.check_names({"Linear": {}, "linear": {}})


def test_chosen_rates(tmp_path):
    file = tmp_path / "rates.json"
    cells = {"a": {"model.connector.name": "linear"}, "b": {"model.connector.name": "sci"}}
    assert rates.with_chosen(cells, file, "mini") == cells
    file.write_text(json.dumps({"mini": {"sci": {"factor": 0.3}}}))
    chosen = rates.with_chosen(cells, file, "mini")
    assert chosen["a"] == cells["a"]
    assert chosen["b"] == {
        **cells["b"], "stages.pretrain.connector_rate_scale": 0.3, "stages.finetune.connector_rate_scale": 0.3,
    }  # fmt: skip
    file.write_text(json.dumps({"mini": {"sci": {"factor": 0.3}, "b": {"factor": 3}}}))  # the cell's own
    assert rates.with_chosen(cells, file, "mini")["b"]["stages.finetune.connector_rate_scale"] == 3
    for damaged in (
        "[]",
        '{"mini": {"sci": {"factor": "3"}}}',
        '{"mini": {"sci": {"factor": true}}}',
        "[" * 99_999,
    ):
        file.write_text(damaged)
        with pytest.raises(ConfigError, match="mllm-jax study rates"):
            rates.read(file, "mini")
