"""Answer normalisation and soft accuracy of the VQA family (VQAv2, TextVQA, VizWiz, OK-VQA).

The rules are those of the VQA v1/v2 evaluation (Antol et al. 2015, "VQA: Visual Question Answering") in the
two forms that published numbers come from: the server's original (`vqa_punctuation`, `vqa_digits_articles`)
and the TextVQA/M4C form (`m4c_normalize`), which lower-cases and splits `'s` first. Known oddities of the
originals are kept on purpose, each with a comment: they decide published digits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Contractions whose key is the value without its apostrophe.
_REGULAR = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've
o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
something'd something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't
we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's
who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
# "<a>'<b>'ve" is also reached from "<a><b>'ve" and from "<a>'<b>ve".
_DOUBLE = """
couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've
"""
# What is written -> what it becomes.
_ODD = """
let's let's  she's she's  somebody'd somebodyd  ow's'at 'ow's'at  'ows'at 'ow's'at  'ow'sat 'ow's'at
yall'll y'all'll  y'allll y'all'll  yall'd've y'all'd've  y'alld've y'all'd've  y'all'dve y'all'd've
"""


def _contractions() -> dict[str, str]:
    table = {value.replace("'", ""): value for value in _REGULAR.split()}
    for value in _DOUBLE.split():
        stem, middle, _ = value.split("'")
        table[f"{stem}{middle}'ve"] = value
        table[f"{stem}'{middle}ve"] = value
    words = _ODD.split()
    return table | dict(zip(words[::2], words[1::2], strict=True))


CONTRACTIONS = _contractions()
NUMBER_WORDS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBER_WORDS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The original writes "(?!<=\d)(\.)(?!\d)": its malformed look-behind never rejects anything.
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED = 32  # the original passes re.UNICODE (32) where re.sub expects a count


def vqa_punctuation(text: str) -> str:
    """Deletes punctuation beside a space (all of it once digit,comma,digit occurs); other becomes a space.

    Every test looks at the text as it came in, every replacement at the text so far (as in the original).
    """
    out = text
    comma = _COMMA_IN_NUMBER.search(text) is not None
    for p in _PUNCTUATION:
        if p in text:
            delete = comma or f"{p} " in text or f" {p}" in text
            out = out.replace(p, "" if delete else " ")
    return _PERIOD.sub("", out, count=_PERIODS_REMOVED)


def vqa_digits_articles(text: str) -> str:
    """Lower-cases, maps number words to digits, drops articles, restores apostrophes of contractions."""
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def m4c_normalize(text: str) -> str:
    """The TextVQA (M4C) form, also used for VQAv2 and VizWiz uploads by LLaVA-style scripts.

    Example:
        >>> m4c_normalize("The 1,000 people - total"), m4c_normalize("U.S.A."), m4c_normalize("it's")
        ('1000 people total', 'usa', "it 's")
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return vqa_digits_articles(vqa_punctuation(text))


def soft_accuracy(answer: str, human: Sequence[str]) -> float:
    """Mean over the leave-one-out subsets of min(1, matches / 3), summed in the original's order.

    Args:
        answer: the (normalised) answer.
        human: the (normalised) human answers, usually ten.

    Returns:
        A fraction in [0, 1].
    """
    if not human:
        raise ValueError("soft accuracy needs at least one human answer")
    matches = [h == answer for h in human]
    total = sum(matches)
    scores = [min(1.0, (total - match) / 3) for match in matches]
    return sum(scores) / len(scores)
