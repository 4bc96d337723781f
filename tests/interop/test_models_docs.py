"""docs/models.md names every family that we read."""

import pathlib

from mllm_jax.cli.export import FORMATS
from mllm_jax.data.templates import CHAT, TEMPLATES
from mllm_jax.interop import families
from mllm_jax.models.rope import SCALINGS

DOCS = (pathlib.Path(__file__).parents[2] / "docs" / "models.md").read_text()


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
