"""Answers the mini world's questions from bare facts, independently of the code that makes them.

The facts come either from a scene or from the words of its long caption, so that tests can check that an
answer is right and that the caption alone suffices to find it.
"""

import re
from types import SimpleNamespace

ROWS_COLS = {
    "top left": (0, 0), "top": (0, 1), "top right": (0, 2), "left": (1, 0), "center": (1, 1), "right": (1, 2),
    "bottom left": (2, 0), "bottom": (2, 1), "bottom right": (2, 2),
}  # fmt: skip
PLACES = sorted(ROWS_COLS, key=len, reverse=True)
PLACE = f"({'|'.join(PLACES)})"
SCENES = ("beach", "forest", "city", "desert", "snow", "space", "plain")
SINGULAR = {
    "circles": "circle", "squares": "square", "triangles": "triangle", "rectangles": "rectangle",
    "stars": "star", "diamonds": "diamond", "crosses": "cross", "hearts": "heart",
}  # fmt: skip
SHAPES = "|".join(SINGULAR.values())


def facts_of_scene(scene):
    """The facts as the scene's JSON form gives them."""
    data = scene.to_json()
    things = [SimpleNamespace(**t) for t in data["things"] if t["kind"] != "bar"]
    for t in things:
        t.cell = (int(t.y * 3), int(t.x * 3))
    bars = {t["color"]: t["value"] for t in data["things"] if t["kind"] == "bar"}
    light = data["lighting"] if data["background"] not in ("plain", "space") else None
    return SimpleNamespace(
        scene=data["background"], lighting=light, style=data["style"], quality=data["quality"],
        topic=data["topic"], things=things, bars=bars,
    )  # fmt: skip


def facts_of_caption(caption):
    """The facts as read from a long caption."""

    def one(pattern):
        found = set(re.findall(pattern, caption))
        return found.pop() if len(found) == 1 else None

    things = []

    def read(pattern, **fixed):
        for match in re.finditer(rf"{pattern} at the (?P<place>{'|'.join(PLACES)})\b", caption):
            found = match.groupdict()
            cell = ROWS_COLS[found.pop("place")]
            things.append(SimpleNamespace(**{"shape": "", "cell": cell, **fixed, **found}))

    read(rf"\ba (?P<size>small|large) (?P<color>\w+) (?P<shape>{SHAPES})", kind="shape")
    read(r"number (?P<digit>\d) on a (?P<size>small|large) (?P<color>\w+) card", kind="digit")
    read(r"word (?P<word>\w+) on a (?P<color>\w+) card", kind="word")
    for t in things:
        if t.kind == "digit":
            t.digit = int(t.digit)
    bars = {}
    if chart := re.search(r"bars[^:]*: ([^.]*)\.", caption):
        bars = {color: int(value) for color, value in re.findall(r"(\w+) (\d)", chart[1])}
    return SimpleNamespace(
        scene=one(rf"\b({'|'.join(SCENES)})\b"),
        lighting=one(r"\b(?:in the (?=day)|at (?=sunset)|at (?=night))(day|sunset|night)\b"),
        style=one(r"\b(flat|sketch|mosaic|painting)\b"),
        quality=one(r"\b(clear|blurry|noisy|faded)\b"),
        topic=one(r"(?:with (?:a )?|topic is (?:a )?)(shapes|numbers|words|chart)\b"),
        things=things,
        bars=bars,
    )  # fmt: skip


def _named(facts, name):
    """The one thing a name means; fails if it means none or several."""
    things = facts.things
    if match := re.fullmatch(rf"(shape|thing) at the {PLACE}", name):
        found = [t for t in things if t.cell == ROWS_COLS[match[2]]]
    elif match := re.fullmatch(r"number (\d)", name):
        found = [t for t in things if t.kind == "digit" and t.digit == int(match[1])]
    elif name == "word":
        found = [t for t in things if t.kind == "word"]
    elif match := re.fullmatch(r"(\w+) card", name):
        found = [t for t in things if t.kind in ("digit", "word") and t.color == match[1]]
    elif match := re.fullmatch(r"(\w+) thing", name):
        found = [t for t in things if t.color == match[1]]
        assert match[1] not in facts.bars
    elif match := re.fullmatch(r"(\w+) shape", name):
        found = [t for t in things if t.kind == "shape" and t.color == match[1]]
    elif match := re.fullmatch(rf"(?:(\w+) )?({SHAPES})", name):
        found = [t for t in things if t.shape == match[2] and match[1] in (None, t.color)]
    else:
        raise AssertionError(f"no idea what {name!r} is")
    assert len(found) == 1, f"{name!r} means {len(found)} things"
    return found[0]


def _side(a, b):
    (ra, ca), (rb, cb) = a.cell, b.cell
    assert (ra == rb) != (ca == cb)
    answer = ("left" if ca < cb else "right") if ra == rb else ("above" if ra < rb else "below")
    if hasattr(a, "x"):  # and the true centres agree
        dx, dy = a.x - b.x, a.y - b.y
        true = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
        assert answer == true
    return answer


def answer(text, facts):
    """The answer to a question's text, or an AssertionError where it has none or several."""
    shapes = [t for t in facts.things if t.kind == "shape"]
    digits = [t.digit for t in facts.things if t.kind == "digit"]
    numbers = sorted(digits)

    def says(*patterns):
        for pattern in patterns:
            if match := re.fullmatch(pattern, text):
                return match
        return None

    if says(
        r"what time of day is it\?", r"is it day, sunset or night\?", r"what is the light of the scene\?"
    ):
        return facts.lighting
    if says(r"what scene is this\?", r"which scene does the picture show\?", r"where is this\?"):
        return facts.scene
    if says(r".*\bstyle\b.*"):
        return facts.style
    if says(r".*\btopic\b.*", r"what is this picture about\?"):
        return facts.topic
    if says(r".*\bquality\b.*"):
        return facts.quality
    if m := says(r"where is the (.*) relative to the (.*)\?"):
        return _side(_named(facts, m[1]), _named(facts, m[2]))
    if m := says(r"on which side of the (.*) is the (.*)\?"):
        return _side(_named(facts, m[2]), _named(facts, m[1]))
    if m := says(r"where is the (.*)\?", r"in which place is the (.*)\?", r"what is the place of the (.*)\?"):
        cell = _named(facts, m[1]).cell
        return next(place for place, where in ROWS_COLS.items() if where == cell)
    if m := says(r"wh\w+ (color|shape) .*(?:most to|at) the (?:far )?(left|right|top|bottom)\?"):
        if re.search(r"\b(most|far)\b", text):
            axis, pick = {"left": (1, min), "right": (1, max), "top": (0, min), "bottom": (0, max)}[m[2]]
            far = pick(t.cell[axis] for t in shapes)
            (only,) = [t for t in shapes if t.cell[axis] == far]
            if hasattr(only, "x"):
                assert only is pick(shapes, key=lambda t: t.x if axis else t.y)
            return getattr(only, m[1])
        thing = _named(facts, re.search(r"(?:shape|thing) at the .*(?=\?)", text)[0])
        assert thing.kind == "shape"
        return getattr(thing, m[1])
    if m := says(r"wh\w+ (shape|color) .*(largest|smallest).*", r"what is the (largest|smallest) (shape)\?"):
        field = "color" if "color" in text else "shape"
        large = "largest" in text
        (only,) = [t for t in shapes if t.size == ("large" if large else "small")]
        if hasattr(only, "w"):
            extents = sorted((t.w * t.h for t in shapes), reverse=large)
            assert extents[0] == only.w * only.h
        return getattr(only, field)
    if m := says(r"what size is the (.*)\?", r"is the (.*) small or large\?"):
        return _named(facts, m[1]).size
    if m := says(r"how many (?:bars are in the chart)\?", r"what is the number of bars\?"):
        return str(len(facts.bars))
    if m := says(r"how many (.*) are there\?", r"what is the number of (.*)\?"):
        what = m[1]
        if what == "shapes":
            return str(len(shapes))
        if what in SINGULAR:
            return str(sum(t.shape == SINGULAR[what] for t in shapes))
        attribute = what.removesuffix(" shapes")
        return str(sum(attribute in (t.color, t.size) for t in shapes))
    if m := says(r"are there more (\w+) or (\w+)\?", r"which are more, (\w+) or (\w+)\?"):
        a, b = (sum(t.shape == SINGULAR[m[i]] for t in shapes) for i in (1, 2))
        return m[1] if a > b else m[2] if b > a else "same"
    if says(r"what word is written\?", r"which word is on the card\?", r"read the word\."):
        (word,) = [t.word for t in facts.things if t.kind == "word"]
        return word
    if m := says(r"(?:what|read the) number (?:is )?on the (\w+) card[?.]"):
        return str(_named(facts, f"{m[1]} card").digit)
    if says(r".*\bsum\b.*", r"add the two numbers\.", r"what do the numbers add up to\?"):
        a, b = digits
        return str(a + b)
    if says(r"what is the difference of the numbers\?", r"how far apart are the two numbers\?"):
        a, b = numbers
        return str(b - a)
    if says(r"which number is larger\?", r"what is the larger number\?"):
        a, b = numbers
        assert a < b
        return str(b)
    if m := says(
        r"how much taller is the (\w+) bar than the (\w+) bar\?", r".*of the (\w+) bar and the (\w+) bar\?"
    ):
        assert facts.bars[m[1]] >= facts.bars[m[2]]
        return str(facts.bars[m[1]] - facts.bars[m[2]])
    if m := says(r"which bar is the (tallest|shortest)\?", r"what color is the (tallest|shortest) bar\?"):
        height = (max if m[1] == "tallest" else min)(facts.bars.values())
        (color,) = [c for c, v in facts.bars.items() if v == height]
        return color
    if m := says(r"how tall is the (\w+) bar\?", r"what is the value of the (\w+) bar\?"):
        return str(facts.bars[m[1]])
    if m := says(r"(?:what|which) (color|shape) (?:is|has) the (.*)\?"):
        thing = _named(facts, m[2])
        assert thing.kind == "shape"
        return getattr(thing, m[1])
    raise AssertionError(f"the oracle does not understand {text!r}")
