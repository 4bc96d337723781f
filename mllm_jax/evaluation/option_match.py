"""From a free-text answer to one option of a multiple-choice question.

`match_option` is the project's own strict rule (`mini`): it never takes the article "A" for the letter A.
`infer_option` is the heuristic that MMBench numbers come from (VLMEvalKit's, before its GPT matcher).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

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


# VLMEvalKit's pattern: any case and no word boundary, so "the answer is blue" is read as B. Kept as it is.
_ANSWER_IS = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
_API_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_TOKENS = 4


def infer_option(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that MMBench's heuristic (VLMEvalKit, exact matching) reads, `Z` for a refusal, or None.

    A single option letter among the last four tokens; else "answer is X"; else the one option whose
    text occurs, if the answer is at most twice as long as all options together.

    Args:
        text: the raw answer.
        options: letter -> option text.

    Example:
        >>> options = {"A": "cat", "B": "dog"}
        >>> [infer_option(t, options) for t in ("B. dog", "A dog is here now ok", "A or B")]
        ['B', 'B', None]
    """
    letter = _infer_letter(text, options)
    if letter is not None:
        return letter
    lower = text.lower()
    if len(lower) > 2 * sum(len(option) for option in options.values()):
        return None
    found = [key for key, option in options.items() if option.lower() in lower]
    return found[0] if len(found) == 1 else None


def _infer_letter(text: str, options: Mapping[str, str]) -> str | None:
    if _API_FAILED in text:
        return None
    if any(refusal in text for refusal in _REFUSALS):
        return "Z"
    tokens = text.translate(_SEPARATORS).split()
    named = [letter for letter in options if letter in tokens]
    if len(named) == 1:
        if tokens.index(named[0]) > len(tokens) - _LAST_TOKENS - 1:
            return named[0]
    elif not named and "Z" in tokens:
        return "Z"
    phrase = _ANSWER_IS.search(text)
    if phrase and phrase[1].upper() in options:
        return phrase[1].upper()
    return None
