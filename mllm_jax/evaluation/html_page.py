"""A report's sections as one HTML page that needs no other file: pictures inside, light and dark, narrow and wide."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.sections import Examples, Part, Section, Table

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
thead th { color: var(--dim); font-weight: 600; } tr.strong td { font-weight: 700; }
img.plot { display: block; max-width: 100%; height: auto; margin: .8rem auto; background: #fff; border-radius: .6rem;
  padding: .4rem; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.4rem, 1fr)); gap: .8rem; }
.example { background: var(--card); border-radius: .6rem; overflow: hidden; border-top: 4px solid var(--line); }
.example.right { border-top-color: var(--right); } .example.wrong { border-top-color: var(--wrong); }
.example img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #8884; }
.example img.small { image-rendering: pixelated; }
.example div { padding: .45rem .65rem .6rem; font-size: .9rem; line-height: 1.4; white-space: pre-line; }
.example .ability { color: var(--dim); font-size: .8rem; } .right b { color: var(--right); }
.wrong b { color: var(--wrong); }
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
        body.append(f"<h{section.level}>{escape(section.title)}</h{section.level}>")
        body += [_part(part, folder) for part in section.parts]
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
    data = base64.b64encode((folder / part.file).read_bytes()).decode()
    return f'<img class="plot" alt="{escape(part.description)}" src="data:image/png;base64,{data}">'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "".join(
        f"<tr{' class=strong' if index in table.strong else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for index, row in enumerate(table.rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _example(one: dict[str, Any]) -> str:
    state, sign = {None: ("", ""), True: ("right", " ✓"), False: ("wrong", " ✗")}[one["right"]]
    images = "".join(
        f'<img{" class=small" if uri.startswith("data:image/png") else ""} alt="" src="{escape(uri)}">'
        for uri in one["pictures"]
    )
    lines = [escape(one["question"])]
    if one["right"] is False:
        lines.append("right: " + escape(" / ".join(one["answers"])))
    elif one["right"] is None and one["answers"]:
        lines.append("reference: " + escape(one["answers"][0]))
    lines.append(f"<b>{escape(one['text'] or '(nothing)')}{sign}</b>")
    ability = escape(one["ability"].replace("_", " "))
    heading = f'<span class="ability">{ability}</span>\n' if ability else ""
    return f'<div class="example {state}">{images}<div>{heading}{chr(10).join(lines)}</div></div>'
