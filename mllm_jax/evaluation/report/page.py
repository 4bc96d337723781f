"""A report's sections as one HTML page that needs no other file, and as Markdown.

The templates and the style are `assets/report/`. The page fetches nothing and runs nothing: figures and examples are
data URIs, and its content security policy forbids everything else.
"""

import base64
import hashlib
import re
from collections.abc import Sequence

import jinja2
from markupsafe import Markup, escape

from mllm_jax.escape import markdown, markdown_table
from mllm_jax.evaluation.report.example_sheet import verdict
from mllm_jax.evaluation.report.sections import Section
from mllm_jax.storage import Path

_LOADER = jinja2.PackageLoader("mllm_jax", "assets/report")


def render_page(title: str, sections: Sequence[Section], folder: Path) -> str:
    """The page's text.

    Args:
      title: heading.
      sections: what it holds.
      folder: where their figures are; they are put into the page.
    """
    style = _LOADER.get_source(jinja2.Environment(), "page.css")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = _environment(autoescape=True)
    environment.filters |= {"breakable": _breakable, "data_uri": lambda file: _data_uri(folder / file)}
    environment.filters["verdict"] = verdict
    environment.tests["words"] = lambda text: any(letter.isalpha() for letter in text)
    page = environment.get_template("page.html")
    return page.render(title=title, sections=sections, style=style, digest=digest).lstrip()


def render_markdown(title: str, sections: Sequence[Section]) -> str:
    """The same as Markdown; figures stay files beside it."""
    environment = _environment(autoescape=False)
    environment.filters["markdown"] = markdown
    environment.filters["markdown_table"] = lambda table: markdown_table(table.head, table.rows, table.strong)
    return environment.get_template("page.md").render(title=title, sections=sections)


def _environment(autoescape: bool) -> jinja2.Environment:
    return jinja2.Environment(
        loader=_LOADER,
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _breakable(text: str) -> Markup:
    """Words may be broken into lines on a phone, inside of dotted names too; numbers may not."""
    if not any(letter.isalpha() for letter in text):
        return escape(text)
    return Markup(re.sub("([_.])", r"\1<wbr>", str(escape(text))))


def _data_uri(file: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
