"""Penn Treebank tokens of English captions, as the COCO caption metrics need them.

The official tool is Stanford's PTBTokenizer (CoreNLP 3.4.1, Java) with `-preserveLines -lowerCase`;
punctuation tokens are removed afterwards. `tokenize` reproduces its rules for English captions without
Java. Like the original lexer it takes, at each place, the longest match of all patterns.
`docs/benchmarks.md` says on which text the two were compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# Tokens that the COCO tools drop. Brackets stay: lower-cased ("-lrb-") they are no longer in the
# official list.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_FRACTIONS = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_CURRENCY = {"€": "$", "£": "#", "¢": "cents", "¥": "$"}

_NBSP = "\u00a0"  # the original joins phone numbers and mixed fractions with it
_A = "['’]"  # apostrophes
_L = r"[^\W\d_²³¹]"  # a letter
_LD = r"[^\W_²³¹]"  # a letter or digit
_NUM = r"(?:\d*(?:[.:,]\d+)+|\d+)"
_WORD = rf"{_L}{_LD}*(?:[.!?]{_L}{_LD}*)*"
_CLITIC = rf"{_A}(?:[msd]|re|ve|ll)"

# Abbreviations that keep their full stop in any context ...
_ABBREVIATIONS = """
jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri mr mrs ms messrs dr drs prof
profs sen sens rep reps gen lt col maj capt sgt gov rev hon pres cmdr adm brig cpl pvt atty supt st ste ave
blvd rd mt ft est ct sq bldg inc co cos corp ltd plc bros jr sr esq assn dept univ intl natl vs etc al cf tel
ext ala ariz calif colo conn dak fla ga ind kans ky md mich minn mo mont neb nev okla penn tenn va vt wis wyo
adj adv
"""
# ... only when capitalised, because they are words too ...
_CAPITALISED = "Ark Del Ill La Miss Ore Pa Tex Wash"
# ... and only before a number.
_BEFORE_NUMBER = "no nos art fig figs pp ca op prop"


_STARTERS = """
A About According Additionally After An As At But He Her Here However If In It Last Many More Now Once One
Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You
"""


def _any_of(words: str) -> str:
    return "(?:" + "|".join(sorted(words.split(), key=len, reverse=True)) + ")"


_ASSIMILATIONS = frozenset(
    ("cannot", "gonna", "gotta", "wanna", "lemme", "gimme")
)  # two tokens, the first of 3 letters


def _same(match: re.Match[str]) -> list[str]:
    return [match[0]]


# (pattern, tokens of the match)
_RULES: list[tuple[re.Pattern[str], Callable[[re.Match[str]], list[str]]]] = [
    (re.compile(pattern, flags), make)
    for pattern, flags, make in (
        (r"</?[A-Za-z!?][^>\r\n]*>", 0, _same),
        (rf"({_L}*?)(n){_A}(t)(?!{_LD})", re.I, lambda m: [*([m[1]] if m[1] else []), f"{m[2]}'{m[3]}"]),
        (_WORD, 0, _same),
        (rf"{_L}+[aeiou]{_A}[aeiou]{_L}*|e{_A}er", re.I, _same),
        (rf"{_CLITIC}(?!{_LD})", re.I, lambda m: ["'" + m[0][1:]]),
        (_NUM, 0, _same),
        (rf"[+-]{_NUM}", 0, _same),
        (rf"\d+{_L}{_LD}*", 0, _same),
        # Hyphenated words, and words with a slash or an apostrophe inside.
        (rf"(?:[dDoOlL]{_A}(?={_L}{_L}))?{_LD}+(?:-(?:[dDoOlL]{_A}(?={_L}{_L}))?{_LD}+)*", 0, _same),
        (r"[A-Za-z0-9][A-Za-z0-9%.,]*(?:-(?:[A-Za-z0-9]+|(?:[A-Za-z]\.)+[A-Za-z]\.))+", 0, _same),
        (rf"{_LD}+(?:-{_L}+){{0,2}}(?:/{_LD}+(?:-{_L}+){{0,2}}){{1,2}}", 0, _same),
        (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", 0, _same),
        (r"[A-Z]+(?:[+&][A-Z]+)+", 0, _same),
        (rf"(?:{_L}\.)+{_L}\.?(?!{_LD})", 0, _same),
        # An initial keeps its full stop unless a word that starts sentences follows, even on the next line.
        (rf"{_L}\.(?!\s{_any_of(_STARTERS)}\s)", 0, _same),
        (rf"{_any_of(_ABBREVIATIONS)}\.", re.I, _same),
        (rf"{_any_of(_CAPITALISED)}\.", 0, _same),
        (rf"{_any_of(_BEFORE_NUMBER)}\.(?=\s*\d)", re.I, _same),
        (r"C\+\+|[CF]#", re.I, _same),
        (rf"{_A}n{_A}|{_A}em|{_A}cause(?!{_LD})|{_A}till?(?!{_LD})|o{_A}clock|{_A}\d0s", re.I, _same),
        (r"https?://\S+|www\.\S+\.\S+", re.I, _same),
        (r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", 0, _same),
        (r"(?:[\w-]+\.)+(?:com|net|org|edu)(?:/\S*)?", re.I, _same),
        (r"@[A-Za-z]\w*|#[A-Za-z]+", 0, _same),
        (r"\w+(?:_\w+)+", 0, _same),
        (r"(?:\d{1,4}[- ])?\d{1,4}/\d{1,4}", 0, lambda m: [m[0].replace(" ", _NBSP)]),
        (r"(?:\d{2,4}[- ])?\d{2,4}[- ]\d{3,4}[- ]?\d{3,5}", 0, lambda m: [m[0].replace(" ", _NBSP)]),
        (r"\*+|#+|_+|=+|~+|\|", 0, _same),
        (r"\.{3,}|…|(?:\. ){2}\.", 0, lambda m: ["..."]),
        (r"[?!]+", 0, _same),
        (r"-{2,}|[\u2012-\u2015]", 0, lambda m: ["--"]),
        (r'"|“|”|``|\'\'', 0, lambda m: ["''"]),
        (r"['’‘`]", 0, lambda m: ["'"]),
        (r"[()\[\]{}]", 0, lambda m: [_BRACKETS[m[0]]]),
        (r"[½¼¾⅓⅔]", 0, lambda m: [_FRACTIONS[m[0]]]),
        (r"[€£¢¥]", 0, lambda m: [_CURRENCY[m[0]]]),
        (r"[A-Z]\$", 0, _same),
        (r"[\U00010000-\U0010ffff]", 0, lambda m: []),  # the original drops what is outside the first plane
        (r"\S", 0, _same),
    )
]
# Plain words before a blank, a comma or the end, by far most of a caption, need no rule.
_SIMPLE = re.compile(r"[a-zA-Z]+(?=[ \n])")
_SPACE = re.compile(r"\s+")


def _split(word: str) -> list[str]:
    return [word[:3], word[3:]] if word.lower() in _ASSIMILATIONS else [word]


def tokens(caption: str, following: str = "") -> list[str]:
    """All tokens of one caption in lower case, punctuation included.

    Args:
        caption: the text; line breaks count as blanks.
        following: the caption on the next line of the official tool's input. It matters only after an
            initial at the end, as in "plan B." before "The cat".
    """
    out: list[str] = []
    line = caption.replace("\n", " ").rstrip()
    text, at = f"{line}\n{following}", 0
    while at < len(line):
        if space := _SPACE.match(text, at):
            at = space.end()
            continue
        if plain := _SIMPLE.match(text, at):
            out.extend(part.lower() for part in _split(plain[0]))
            at = plain.end()
            continue
        end, best = at, [text[at]]
        for pattern, make in _RULES:
            match = pattern.match(text, at)
            if match is not None and match.end() > end:
                end, best = match.end(), make(match)
        for token in best:
            out.extend(part.lower() for part in _split(token))
        at = max(end, at + 1)
    return out


def tokenize(captions: Sequence[str]) -> list[str]:
    """Captions as the caption metrics see them: lower-case tokens without punctuation, joined by blanks.

    Example:
        >>> tokenize(["A half-eaten sandwich; it isn't the dog's."])
        ["a half-eaten sandwich it is n't the dog 's"]
    """
    following = [*captions[1:], ""]
    return [
        " ".join(token for token in tokens(caption, after) if token not in PUNCTUATION)
        for caption, after in zip(captions, following, strict=True)
    ]
