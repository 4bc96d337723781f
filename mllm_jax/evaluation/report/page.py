"""A report's sections as one HTML page that needs no other file: pictures inside, light and dark, narrow and wide."""

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.report.sections import Examples, Part, Picture, Section, Table

_LONG = 120  # characters
_STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --dim: #5c5c5c; --back: #ffffff; --card: #f4f5f7; --line: #d9dce1;
  --right: #0072b2; --wrong: #c04a00; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --dim: #a5a9b0; --back: #15171a; --card: #212429; --line: #3a3f46;
    --right: #5db7f0; --wrong: #ff9255; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; margin: .5rem 0 1rem; } h2 { font-size: 1.3rem; margin: 2.2rem 0 .6rem;
  border-bottom: 1px solid var(--line); padding-bottom: .2rem; } h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
p { color: var(--dim); margin: .4rem 0; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
thead th { color: var(--dim); font-weight: 600; white-space: normal; vertical-align: bottom; overflow-wrap: normal; }
tr.strong td { font-weight: 700; }
.plots { display: flex; flex-wrap: wrap; gap: .8rem; justify-content: center; align-items: flex-start;
  margin: .8rem 0; }
.plots img { flex: 1 1 18rem; min-width: 0; max-width: min(100%, 40rem); height: auto; background: #fff;
  border-radius: .6rem; padding: .3rem; }
summary { cursor: pointer; margin: 1.2rem 0 .5rem; font-weight: 600; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.4rem, 1fr)); gap: .8rem; }
.example { background: var(--card); border-radius: .6rem; overflow: hidden; border-top: 4px solid var(--line); }
.example.right { border-top-color: var(--right); } .example.wrong { border-top-color: var(--wrong); }
.example img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #8884; }
.example img.small { image-rendering: pixelated; }
.example div { margin: 0 .65rem; font-size: .9rem; line-height: 1.4; white-space: pre-line; max-height: 9.8em;
  overflow-y: auto; } .example img + div { margin-top: .45rem; } .example div:last-child { margin-bottom: .6rem; }
.example div[tabindex] { border-bottom: 1px dashed var(--dim); }
.example .ability { color: var(--dim); font-size: .8rem; } .example .said { font-weight: 700; max-height: 5.6em; }
.right .said { color: var(--right); } .wrong .said { color: var(--wrong); }
@media (prefers-color-scheme: dark) { .plots img { filter: invert(.91) hue-rotate(180deg); } }
wbr { display: none; }
@media (max-width: 40rem) { wbr { display: inline; }
  body { padding: .8rem; } table { font-size: .82rem; } th, td { padding: .3rem .4rem; }
  td.words { white-space: normal; overflow-wrap: break-word; }
  td.words:first-child { min-width: 6.6rem; } }
"""


def render_page(title: str, sections: Sequence[Section], folder: Path) -> str:
    """The page's text.

    Args:
      title: heading.
      sections: what it holds.
      folder: where their pictures lie; they are put into the page.
    """
    body = [f"<h1>{escape(title)}</h1>"]
    for section in sections:
        parts = [_part(part, folder) for part in section.parts]
        if section.folded:
            parts = [f"<details><summary>{escape(section.title)}</summary>", *parts, "</details>"]
        else:
            body.append(f"<h{section.level}>{escape(section.title)}</h{section.level}>")
        body += parts
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _part(part: Part, folder: Path) -> str:
    if isinstance(part, str):
        return f"<p>{escape(part)}</p>"
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Examples):
        return '<div class="examples">' + "".join(_example(one) for one in part.items) + "</div>"
    return '<div class="plots">' + "".join(_picture(one, folder) for one in part.pictures) + "</div>"


def _picture(picture: Picture, folder: Path) -> str:
    data = base64.b64encode((folder / picture.file).read_bytes()).decode()
    return f'<img alt="{escape(picture.description)}" src="data:image/png;base64,{data}">'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "".join(
        f"<tr{' class=strong' if index in table.strong else ''}>" + "".join(map(_cell, row)) + "</tr>"
        for index, row in enumerate(table.rows)
    )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(text: str) -> str:
    """Text may be broken into lines on a phone, inside of dotted names too; numbers may not."""
    if any(letter.isalpha() for letter in text):
        breakable = re.sub("([_.])", r"\1<wbr>", escape(text))
        return f'<td class="words">{breakable}</td>'
    return f"<td>{escape(text)}</td>"


def _example(one: dict[str, Any]) -> str:
    state, sign = {None: ("", ""), True: ("right", " ✓"), False: ("wrong", " ✗")}[one["right"]]
    images = "".join(
        f'<img{" class=small" if uri.startswith("data:image/png") else ""} alt="" src="{escape(uri)}">'
        for uri in one["pictures"]
    )
    blocks = [("ability", one["ability"].replace("_", " ")), ("question", one["question"])]
    if one["right"] is False:
        blocks.append(("answer", "right: " + " / ".join(one["answers"])))
    elif one["right"] is None and one["answers"]:
        blocks.append(("answer", "reference: " + one["answers"][0]))
    blocks.append(("said", (one["text"] or "(nothing)") + sign))
    texts = "".join(
        f'<div class="{kind}"{_focus(text)}>{escape(text)}</div>' for kind, text in blocks if text
    )
    return f'<div class="example {state}">{images}{texts}</div>'


def _focus(text: str) -> str:
    """Long texts get a scroll bar; it should be reachable with the keyboard."""
    return ' tabindex="0"' if len(text) > _LONG else ""
