r"""Text of unknown origin (ids, abilities, answers, error bodies), made harmless for where it is shown.

One function per medium: `terminal`, `markdown`, `spreadsheet`. HTML is escaped by the template engine (autoescape).
"""

import re
import unicodedata
from collections.abc import Collection, Sequence

# Apart from line breaks and tabs: control characters (ESC begins terminal commands, some of which write the clipboard),
# marks that reorder or hide text, and lone surrogates, which no encoding can write.
_HIDDEN = frozenset(("Cc", "Cs", "Cf", "Zl", "Zp"))
_JOINERS = "\u200c\u200d"  # belong to emoji and to several scripts
_MARKDOWN = re.compile(
    r"([\\`*{}\[\]<>#|~$&]|(?<![^\W_])_|_(?![^\W_]))"
)  # an underscore inside a word is no markup
_BLOCK_MARK = re.compile(r"^(\d*)([-+=.)])(?=[\s=-]|$)")  # begins a list or underlines a heading
_NO_CELL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")  # not in XML, so not in XLSX


def terminal(text: str) -> str:
    r"""Text without terminal commands: control characters are spelled out; line breaks and tabs stay.

    Example:
      >>> terminal("a\x1b[31mb")
      'a\\x1b[31mb'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(char) for char in text)


def _visible(char: str) -> str:
    if char in "\n\t" or char in _JOINERS or unicodedata.category(char) not in _HIDDEN:
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def markdown(text: str) -> str:
    """One line of text for a paragraph, heading or cell of Markdown: no markup, link, HTML or formula in it.

    Example:
      >>> markdown("<script> [a](b)")
      '\\\\<script\\\\> \\\\[a\\\\](b)'
    """
    flat = " ".join(terminal(text).split())
    return _BLOCK_MARK.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\1", flat))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], strong: Collection[int] = ()) -> str:
    """A Markdown table: the first column is text, the others are numbers.

    Args:
      head: names of the columns.
      rows: cells, as many as `head` in each row.
      strong: indices of the rows in bold.
    """

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    texts = [[markdown(cell) for cell in row] for row in rows]
    bold = [
        [f"**{cell}**" if cell and index in strong else cell for cell in row]
        for index, row in enumerate(texts)
    ]
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([line([markdown(cell) for cell in head]), rule, *map(line, bold)])


def spreadsheet(text: str) -> str:
    """Text that an XLSX cell can hold: a blank for each character that the format has no place for.

    A cell with it must be typed as a string (`cell.data_type = "s"`), so that a leading "=" begins no formula.
    """
    return _NO_CELL.sub(" ", text)
