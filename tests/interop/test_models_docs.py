"""docs/models.md names every family that we read, and gives each published model's size and parity cases."""

import pathlib
import re
import sys

import parity_cases
import pytest

from mllm_jax.cli.export import FORMATS
from mllm_jax.data.templates import CHAT, TEMPLATES
from mllm_jax.interop import families
from mllm_jax.models.rope import SCALINGS

DOCS = (pathlib.Path(__file__).parents[2] / "docs" / "models.md").read_text()


sys.path.append(str(pathlib.Path(__file__).parents[1] / "models"))
import test_published_sizes as sizes  # noqa: E402

# Mistral 7B v0.2 has no window, and is then Llama in all but name.
OTHER_CLASS = {("Mistral 7B v0.2", "llama")}


@pytest.mark.parametrize(
    ("heading", "published", "cases"),
    [
        ("encoder", sizes.TOWERS, parity_cases.TOWERS | {"convnext": ("timm ConvNeXt", {})}),
        ("LLM", sizes.LLMS, parity_cases.LLMS),
    ],
)
def test_every_published_model_has_a_row(heading, published, cases):
    table = DOCS.split(f"| {heading} | published as | parameters | parity cases |\n")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ([^`|]+) \| .*`[^|]* \| ([\d,]+) \| ([^|]+) \|$", table, re.M)
    assert {name: int(number.replace(",", "")) for name, number, _ in rows} == {
        name: parameters for name, (_, _, parameters) in published.items()
    }
    for name, _, named in rows:
        family = getattr(families, "VISION" if heading == "encoder" else "LLMS")[published[name][0]]
        for case in named.split(", "):
            ours = re.sub("(ForCausalLM|Model)$", "", family.architecture)
            assert cases[case][0] == ours or (name, case) in OTHER_CLASS, (name, case)
        assert any((name, case) not in OTHER_CLASS for case in named.split(", ")), name


def test_every_family_has_a_row():
    for model_type in [*families.VISION, *families.LLMS]:
        assert f"\n| `{model_type}` |" in DOCS


def test_templates_are_named():
    for name in [*TEMPLATES, CHAT]:
        assert f"`{name}`" in DOCS


def test_formats_and_rope_types_are_named():
    for name in FORMATS:
        assert f"`{name}`" in DOCS
    for name in SCALINGS:
        assert name in DOCS
