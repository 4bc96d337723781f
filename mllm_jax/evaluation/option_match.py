"""From a free-text answer to one option of a multiple-choice question.

`match_option` is the project's own strict rule (`mini`): it never takes the article "A" for the letter A.
`infer_option` is the heuristic that MMBench numbers come from (VLMEvalKit's, before its GPT matcher).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_BARE = re.compile(r"\(?([A-Za-z])\)?[.:,]?", re.ASCII)
_LEADING = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])[.:)])(?=\s)", re.ASCII)
_PHRASE = re.compile(
    r"\b(?:answer|option|choice)(?:\s+is|\s*:)?\s+(?:\(([A-Za-z])\)|([A-Z])\b(?!['’]))", re.ASCII | re.I
)


def plain(text: str) -> str:
    """Lower case, white space collapsed, no surrounding quotes and no closing punctuation."""
    return " ".join(text.casefold().split()).strip("\"'`“”‘’ ").rstrip(".!,;: ")


def match_option(text: str, options: Sequence[str]) -> tuple[int | None, str]:
    """The option that an answer names, and how it was found.

    Rules in order: the answer is exactly one option's text (`option_text`); it is, starts with or
    announces one letter as in `B`, `(b)`, `B. dog`, `the answer is B` (`letter`); exactly one
    option's text occurs in it as whole words (`contained_text`); else `unparsed`. A longer option
    hides a shorter one inside it.

    Example:
        >>> match_option("It is a dark red ball.", ["red", "dark red"])
        (1, 'contained_text')
        >>> match_option("A red ball", ["blue", "red"])
        (1, 'contained_text')
    """
    answer = plain(text)
    names = [plain(option) for option in options]
    if answer and names.count(answer) == 1:
        return names.index(answer), "option_text"
    stripped = text.strip()
    for rule, search in ((_BARE, _BARE.fullmatch), (_LEADING, _LEADING.match), (_PHRASE, _PHRASE.search)):
        if found := search(stripped):
            letter = next(group for group in found.groups() if group)
            # In running text ("the answer is a dog") only a capital is a letter of an option.
            if rule is _PHRASE and found.group(1) is None and not letter.isupper():
                continue
            index = LETTERS.index(letter.upper())
            if index < len(options):
                return index, "letter"
    rest, hits = answer, []
    for index in sorted(range(len(names)), key=lambda i: -len(names[i])):
        pattern = rf"(?<!\w){re.escape(names[index])}(?!\w)"
        if names[index] and re.search(pattern, rest):
            hits.append(index)
            rest = re.sub(pattern, "\0", rest)
    return (hits[0], "contained_text") if len(hits) == 1 else (None, "unparsed")
