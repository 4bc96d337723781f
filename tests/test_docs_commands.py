"""Every command of README and docs: its program takes the arguments, and what it reads is there or made before."""

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import os
import pathlib
import re
import runpy
import sys
import tomllib

import pytest
from absl import flags
from docs_commands import PAGES, ROOT, commands, copy_library, run_page

from mllm_jax import no_torch
from mllm_jax.cli import huge_pages, main, script, shipped
from mllm_jax.config import SCHEMA, ConfigError, check, declared, source_config, stage_config
from mllm_jax.connectors import CONNECTORS, PreservingConnector
from mllm_jax.evaluation.selection import select_benchmarks
from mllm_jax.schema import find

# ml_collections loads recipes so.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

TUTORIALS = [
    ["docs/getting_started.md", "docs/tutorials/evaluator.md", "docs/tutorials/data_owner.md"],
    ["docs/tutorials/operator.md"],
    ["docs/tutorials/researcher.md"],
]
# What readers bring along: their data and images, published files, places of their own and names to fill in.
BROUGHT = re.compile(
    r"my/.*|\.\./shared/.*|/.*|gs://.*|https?://.*|[A-Z_]+|(?:cat|dog)\.jpg|clip\.mp4|questions\.txt|images|media|more"
    r"|(?:more/|coco/)?(?:images|(?:train|test|more)\.json)|benchmarks|data/pope|answers\.jsonl?|mm-vet\.json|captions\.json"
    r"|captions_val2017\.json|llava-v1\.5-13b\.jsonl|mmbench_dev_20230712\.tsv|.*_(?:558k|mix665k)\.json|[\w-]+/[\w.-]+-hf"
    r"|tests/connectors/test_connector_max_pool\.py|(?:openai|lmsys|liuhaotian)/.*|mini"
)
READ = re.compile(r"--(from|model|base|json|images|image|video|predictions|annotations|path|source|groups)")
READ_KEYS = re.compile(r"\.(path|json|images)$")
WRITTEN = {"--workdir", "--out", "--to"}
RUN = {"--config": "configs/quickstart.py", "--workdir": "runs/x"}
LEFT_OUT = {  # by "..."
    **dict.fromkeys(("train.py", "train", "prepare"), RUN),
    "plan": {"--config": "configs/llava15.py", "--topology": "v5e-16"},
    "sweep": RUN | {"--config": "configs/preserve_or_compress.py:mini"},
}
OTHERS = {
    ".",
    "cd",
    "curl",
    "echo",
    "lmms-eval",
    "mkdir",
    "pre-commit",
    "ruff",
    "tensorboard",
    "xprof",
    "mkdocs",
}


class Accepted(BaseException):
    """The program has taken its arguments."""


@contextlib.contextmanager
def stopped_at_the_arguments(monkeypatch, whole):
    """Programs stop with `Accepted` when they have read their arguments, missing ones allowed if not `whole`."""
    parse_args = argparse.ArgumentParser.parse_args

    def parsed(parser, arguments=None, namespace=None):
        for action in () if whole else parser._actions:
            action.required = False
            if not isinstance(action, argparse._SubParsersAction):
                action.type = action.choices = None
                action.nargs = "*" if action.nargs is None else action.nargs
        raise Accepted(parse_args(parser, arguments, namespace))

    def started(main, arguments):
        if "config" in flags.FLAGS:
            config = flags.FLAGS.config
            for stage in config.stages.values() if "topology" in flags.FLAGS or not whole else ():
                for source in stage.sources.values():
                    source.json = source.json or "train.json"  # which are left out there
            check(config)
        for names in (flags.FLAGS[each].value for each in ("benchmarks",) if each in flags.FLAGS):
            select_benchmarks([name for name in names or () if name != "..."], "")
        raise Accepted

    def refused(error):
        raise error

    before, environment = set(flags.FLAGS), dict(os.environ)
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        patch.setattr(no_torch, "block", lambda: None)  # other tests of this process want torch
        patch.setattr(script, "_start", started)
        patch.setattr(script, "_fail", refused)
        patch.setattr(huge_pages, "start_again", lambda: None)
        patch.setattr(shipped, "run", lambda name, given: run_file(name, given))
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.chdir(ROOT)
        try:
            yield patch
        finally:
            for flag in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, flag)
            flags.FLAGS.unparse_flags()
            os.environ.clear()
            os.environ.update(environment)


def run_file(name, arguments):
    sys.argv = [name, *arguments]
    runpy.run_path(str(ROOT / name), run_name="__main__")


def completed(words, whole):
    """The words without "...", and with what such a command leaves out."""
    if whole:
        return words
    for word in words:
        if key := re.match(r"--config\.([^=]+)=\.\.\.$", word):
            declared(key[1])
    words = [word for word in words if not re.search(r"\.\.\.$|^--config=[A-Z]+(\.py)?(:|$)", word)]
    left_out = LEFT_OUT.get(words[1], {})
    given = {word.partition("=")[0] for word in words}
    return [*words[:2], *(f"{o}={value}" for o, value in left_out.items() if o not in given), *words[2:]]


def taken(monkeypatch, command):
    """Checks that the program takes the command's arguments; raises whatever it raises if it does not."""
    words = completed(command.words, command.whole)
    with stopped_at_the_arguments(monkeypatch, command.whole) as patch, contextlib.suppress(Accepted):
        patch.setattr(sys, "argv", words[1:])
        code = main.main(words[1:]) if words[0] == "mllm-jax" else run_file(words[1], words[2:])
        assert code == 0, f"exit code {code}"


def installed(words):
    """Checks the extras that `pip install` names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"(?:\.|mllm-jax)\[([\w,-]+)\]", " ".join(words)):
        missing = set(extras.split(",")) - set(project["optional-dependencies"])
        assert not missing, f"no extra {missing}"


def read_and_written(command):
    """Paths that a command reads and writes, of options and redirections."""
    reads, writes, words = list(command.reads), list(command.writes), command.words
    for option, value in [
        *(word.split("=", 1) for word in words if re.match(r"--[\w.]+=", word)),
        *(pair for pair in itertools.pairwise(words) if pair[0].startswith("--") and "=" not in pair[0]),
    ]:
        if option in WRITTEN:
            writes.append(value)
        elif READ.fullmatch(option) or READ_KEYS.search(option):
            reads.append(re.sub(r"^\w+=", "", value))  # a name of the model's, of `serve`
        elif option == "--config":
            reads.append(value.partition(":")[0])
    return reads, writes


def is_there(path, made):
    path = path.rstrip("/")
    places = [str(each) for each in (pathlib.PurePath(path), *pathlib.PurePath(path).parents)]
    recipe = ROOT / "configs" / f"{path}.py"
    return "..." in path or (ROOT / path).exists() or recipe.is_file() or bool(made & set(places))


class MaxPool(PreservingConnector):
    """Stands for the connector of docs/connectors.md."""


@pytest.mark.parametrize("page", PAGES)
def test_commands(page, monkeypatch):
    name = SCHEMA["model"]["connector"]["name"]
    named = dataclasses.replace(name, choices=(*name.choices, "max_pool"))
    monkeypatch.setitem(SCHEMA["model"]["connector"], "name", named)
    monkeypatch.setitem(CONNECTORS, "max_pool", (MaxPool, {"reduction": 1, "reduced_grid": ()}))
    wrong, made = [], set()
    for each in PAGES[:1]:  # what README makes is there on every page
        made |= {path for command in commands(each) for path in read_and_written(command)[1]}
    for command in commands(page):
        program, *arguments = command.words
        try:
            if program == "pip":
                installed(arguments)
            elif program == "pytest":
                given = " ".join(arguments)
                reads = re.sub(r"-n 0|-k (?:'[^']*'|\S+( or \w+)*)|--?[\w-]+", "", given).split()
                there = ((ROOT / path).exists() for path in reads if not BROUGHT.fullmatch(path))
                assert all(there), "no such test"
            elif arguments[:2] == ["-m", "venv"] or arguments == ["-"]:
                pass  # the text behind it runs with the tutorials
            elif program in ("python", "mllm-jax"):
                if "gs://" in str(command) and not importlib.util.find_spec("gcsfs"):
                    continue
                taken(monkeypatch, command)
            elif program in ("sbatch", "kubectl") or program.startswith("launch/"):
                path = program if program.startswith("launch/") else arguments[-1]
                assert is_there(path, made), f"no {path}"
            else:
                assert program in OTHERS, f"unknown program {program}"
            reads, writes = read_and_written(command)
            made |= set(writes)
            missing = [path for path in reads if not is_there(path, made) and not BROUGHT.fullmatch(path)]
            assert not missing or not command.whole, f"nothing makes {missing}"
        except (Exception, SystemExit) as error:
            wrong.append(f"{command}\n    {type(error).__name__}: {error}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_the_tables_for_newcomers_name_keys_that_exist():
    page = (ROOT / "docs/coming_from.md").read_text(encoding="utf-8")
    keys = re.findall(r"`((?:model|stages|data|mesh|eval|profile|tracking)(?:\.\w+)+)", page)
    assert len(keys) > 80
    for key in set(keys):
        find(SCHEMA, key.replace("stages.S.", "stages.pretrain."))


def test_python_of_data_and_sweeps():
    """That of the other pages runs in test_python_docs.py and test_connector_docs.py."""
    (sources,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.S)
    names = {"stage": stage_config(), "source_config": source_config}
    exec(sources, names)
    assert names["stage"].sources.more.weight == 0.5
    *_, sweep = re.findall(r"```python\n(.*?)```", (ROOT / "docs/sweep.md").read_text(encoding="utf-8"), re.S)
    exec(sweep, names)
    first, second, *_ = names["get_sweep"](added=("max_pool",))
    assert f"# {first}, {second}, ..." in sweep


def test_links_lead_to_files():
    """As on GitHub; `mkdocs build --strict` checks them in the site, headings too."""
    for page in [*PAGES, "CHANGELOG.md", "SECURITY.md"]:
        text = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)\s:#]+)(?:#[^)]*)?\)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_a_wrong_command_is_found(monkeypatch):
    from docs_commands import Command

    for line, error in {
        "python train.py --config=configs/quickstart.py --workdir=x --config.model.conector.name=dci": ConfigError,
        "python train.py --config=configs/quickstart.py": SystemExit,
        "mllm-jax export --form safetensors": SystemExit,
        "mllm-jax nothing": AssertionError,
    }.items():
        with pytest.raises(error):
            taken(monkeypatch, Command("page", line.split(), [], [], True))


@pytest.mark.slow
@pytest.mark.parametrize("pages", TUTORIALS, ids=lambda pages: pages[-1].split("/")[-1])
def test_the_tutorials_run_as_written(pages, tmp_path, script_environment):
    """One after the other in one folder, as readers do; training is cut to a few steps."""
    copy_library(tmp_path)
    for page in pages:
        assert run_page(page, tmp_path, script_environment | {"JAX_PLATFORMS": "cpu"})
