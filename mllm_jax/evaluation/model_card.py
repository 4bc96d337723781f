"""The README.md beside an export: what the model is, how it is loaded, what it was trained on and what it scored."""

import importlib.metadata
import json
import pathlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from mllm_jax import files
from mllm_jax.config import resolved
from mllm_jax.escape import markdown
from mllm_jax.evaluation.report.runs import load_run
from mllm_jax.evaluation.tables import markdown_table
from mllm_jax.inference import runs
from mllm_jax.storage import Path, as_path
from mllm_jax.training.sources import read_noted
from mllm_jax.workdir import saved_config

FILE = "README.md"

_OURS = """import mllm_jax

model = mllm_jax.load("{place}")
print(model.generate("image.jpg", "What is this?"))"""
_PEFT = """from peft import PeftModel

model = PeftModel.from_pretrained(base, "{place}")  # base: the model that the adapter was trained on"""
LOADING = {
    "safetensors": _OURS,
    "orbax": _OURS,
    "llava-hf": """from transformers import AutoTokenizer, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")""",
    "llava": """import mllm_jax  # or LLaVA's own code: load_pretrained_model("{place}", None, "llava")

model = mllm_jax.load("{place}", template=TEMPLATE)  # the one of its training
print(model.generate("image.jpg", "What is this?"))""",
    "llm": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")""",
    "vision": """from transformers import AutoModel

model = AutoModel.from_pretrained("{place}")""",
    "connector": """# train.py starts from it, in a shell:
# python train.py --config=RECIPE --config.model.connector.path={place} ...""",
    "adapter": _PEFT,
    "llava-hf-adapter": _PEFT,
    "llava-adapter": """# first, in a shell: mllm-jax import --from {place} --base LLM --to merged
import mllm_jax

model = mllm_jax.load("merged")
print(model.generate("image.jpg", "What is this?"))""",
}


def write(target: pathlib.Path, source: str, form: str, stage: str | None = None) -> None:
    """Writes `target/README.md`, unless there is one.

    Args:
      target: the export.
      source: what it was made from; of a run, recipe, data and scores are told.
      form: a format of `mllm-jax export`.
      stage: of a run; None = the last one that is finished.
    """
    if not (target / FILE).exists():
        files.write_text(target / FILE, "\n".join(_lines(target.name, source, form, stage)) + "\n")


def version() -> str:
    """This library's version; "of a checkout" where it is not installed."""
    try:
        return importlib.metadata.version("mllm-jax")
    except importlib.metadata.PackageNotFoundError:
        return "of a checkout"


def _lines(name: str, source: str, form: str, stage: str | None) -> Iterator[str]:
    run = as_path(source) if runs.is_run(as_path(source)) else None
    yield from (
        "---",
        "library_name: mllm-jax",
        "pipeline_tag: image-text-to-text",
        "---",
        f"# {markdown(name)}",
    )
    origin = f"the run {run.name}" if run else source
    yield from ("", f"Exported from {markdown(origin)} as `{form}` by mllm-jax {version()}.")
    yield from ("", "## Loading", "", "```python", LOADING[form].format(place=name), "```")
    if run:
        config = saved_config(run)
        yield from _run_lines(run, config, stage or runs.finished_stages(run, config)[-1])


def _run_lines(run: Path, config: ConfigDict, stage: str) -> Iterator[str]:
    stages = config.stage_order[: config.stage_order.index(stage) + 1]
    yield from ("", "## Model", "", "| part | |", "|---|---|")
    for part, value in (
        ("connector", config.model.connector.name),
        ("vision encoder", config.model.vision.path),
        ("LLM", config.model.llm.path),
        ("stages", ", ".join(stages)),
        ("conversation template", config.eval.template),
    ):
        yield f"| {part} | {markdown(value)} |"

    yield from ("", "## Data", "")
    yield "A fingerprint is that of the prepared samples and images; equal ones are the same data."
    yield from ("", "| stage | source | fingerprint |", "|---|---|---|")
    noted = read_noted(run)
    for each in stages:
        for source in sorted(config.stages[each].sources):
            known = noted.get(f"{each}/{source}", "not recorded")
            yield f"| {markdown(each)} | {markdown(source)} | {markdown(known)} |"

    yield from ("", "## Scores", "")
    if stage != config.stage_order[-1]:
        yield f"None: the run's evaluation is of its last stage, and this is the model after {markdown(stage)}."
    elif not (run / "eval" / "summary.json").is_file():
        yield "None: the run was not evaluated."
    else:
        evaluated = load_run(run, run.name)
        for benchmark in evaluated.benchmarks:
            yield from (f"### {markdown(benchmark)}", "", markdown_table(evaluated.rows(benchmark)), "")

    recipe = json.dumps(resolved(config), indent=1, sort_keys=True)
    yield from ("", "## Recipe", "", "```json", recipe, "```")
