"""Reading MMMU answers (Yue et al. 2024): the official rules for multiple choice and for open questions."""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_jax.evaluation.option_match import LETTERS
from mllm_jax.evaluation.predictions import BenchmarkError

ENDS = (",", ".", "!", "?", ";", ":", "'")
_FEW = f"1 to {len(LETTERS)}"
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # with thousands separators
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # scientific
    # The original's pattern for plain numbers: no number may be followed by a comma group or an exponent.
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def strip_ends(text: str) -> str:
    """Strips , . ! ? ; : ' from both ends, one character class after the other (the order matters)."""
    for char in ENDS:
        text = text.strip(char)
    return text


def find_choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that a multiple-choice answer names, or None where the official code draws at random.

    Candidates are letters in parentheses; else free-standing letters; else, in answers of more than
    five words, options whose text occurs. Among several the one whose last occurrence is latest.

    Args:
      options: letter -> option text.

    Example:
        >>> find_choice("I think (A) but maybe (C)", {"A": "cat", "B": "dog", "C": "cow"})
        'C'
    """
    return choose(text, options, (("({})", "({})"), (" {} ", " {} ")))


def choose(text: str, options: Mapping[str, str], forms: Sequence[tuple[str, str]]) -> str | None:
    """What MMMU's rules have in common.

    Args:
      forms: ways to write a letter, the first that occurs decides: what must occur, and what is located.
    """
    text = f" {strip_ends(text)} "
    for occurs, located in forms:
        if found := [letter for letter in options if occurs.format(letter) in text]:
            return max(found, key=lambda letter: text.rfind(located.format(letter)))
    if len(text.split()) > 5:
        lower = text.lower()
        if found := [letter for letter, option in options.items() if option.lower() in lower]:
            return max(found, key=lambda letter: lower.rfind(options[letter].lower()))
    return None


def numbers(text: str) -> list[str]:
    """Every number in a text: those with thousands separators, scientific ones, plain ones, in that order."""
    return [match for pattern in _NUMBERS for match in pattern.findall(text)]


def normalize(text: str) -> list[str | float]:
    """A number rounded to two decimals; other text in lower case, single characters padded on either side.

    Example:
        >>> normalize("1,234.567"), normalize("Yes"), normalize("C")
        ([1234.57], ['yes'], [' c', 'c '])
    """
    text = text.strip()
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
    return [round(number, 2)]


def parse_open(text: str) -> list[str | float]:
    """What an open answer may mean: tails after words such as "is" or "=", and the numbers in them.

    Example:
        >>> sorted(map(str, parse_open("The result is 36 watts.")))
        ['36 watts', '36.0']
    """
    response = text.strip().strip(".").lower()
    # The original also splits at ". " before a capital, which cannot occur after lower-casing.
    pieces = response.split("\n")
    tails = []
    for position, piece in enumerate(pieces):
        marks = _INDICATORS + (("=",) if position == len(pieces) - 1 else ())
        shortest = ""
        for mark in marks:
            if mark in piece:
                tail = piece.split(mark)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            tails.append(shortest)
    tails = tails or [response]
    candidates = tails + [number for tail in tails for number in numbers(tail)]
    return list(dict.fromkeys(value for candidate in candidates for value in normalize(candidate)))


def open_is_right(prediction: Sequence[str | float], answer: str | Sequence[str]) -> bool:
    """A text is right if a normalised answer is contained in it, a number if it equals one."""
    answers = [answer] if isinstance(answer, str) else answer
    gold = [value for one in answers for value in normalize(str(one))]
    for value in prediction:
        if isinstance(value, str):
            if any(isinstance(g, str) and g in value for g in gold):
                return True
        elif value in gold:
            return True
    return False


def read_options(value: Any, where: str) -> list[str]:
    """Options that a data set stores as a list or as the text of a Python list.

    Raises:
      BenchmarkError: neither; or none, or more than there are letters.
    """
    try:
        options = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise BenchmarkError(f"{where}: options are no list: {value[:60]!r}") from error
    if not isinstance(options, list) or not 0 < len(options) <= len(LETTERS):
        raise BenchmarkError(f"{where}: options must be a list of {_FEW} texts, found {value!r:.60}")
    return [str(option) for option in options]
