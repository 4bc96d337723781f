"""Changes to sound files: what a stranger, a broken disk or a half-written file makes of them."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEEP, LONG = "@@deep@@", "@@long@@"  # what `json.dumps` cannot write
_RAW = {f'"{DEEP}"': "[" * 100_000 + "]" * 100_000, f'"{LONG}"': "9" * 5000}
ATTACKS = [
    "../outside/secret.png", "../outside/secret.txt", "../../outside/secret.json", "{outside}/secret.png",
    "/etc/passwd", "a/../../outside/x", "..", "~/.bashrc", "C:\\x", "a\0b", "\ud800", "\x1b]52;c;aGk=\x07", "\x1b[2J",
    "a\n\n# b", "\u202ex", "<script>alert(1)</script>", "[link=file:///etc/passwd]x[/link]", "[/bold]", "=1+1",
    "@SUM(1)", "![a](http://127.0.0.1:9/x.png)", "http://127.0.0.1:9/x.png", "data:image/png;base64,AAAA",
    "data:text/html,x", "planted_module.Planted", "planted_module", "{{ ''.__class__.__mro__ }}",
    "{% for i in range(10**9) %}x{% endfor %}", "{0.__class__}", "%n%n%s",
]  # fmt: skip
PLAIN = [
    None, True, False, 0, -1, 1, 7, 10**9, 10**30, 0.5, -2.5, 1e308, float("nan"), float("inf"), float("-inf"), "", " ",
    "x", "nan", "9" * 400, "x" * 20_000, [], [1], [[]], [None], ["a"], {}, {"a": 1}, {"": None}, [0] * 5000, DEEP, LONG,
]  # fmt: skip

# Keys that change what a configuration means, where a file may not have them.
KEYS = ["quantization_config", "text_config", "vision_config", "mm_x", "rope_scaling", "auto_map"]


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


def _value(rng: random.Random, outside: Path) -> Any:
    if rng.random() < 0.4:
        return rng.choice(ATTACKS).replace("{outside}", str(outside))
    return json.loads(json.dumps(rng.choice(PLAIN)))


def _change(value: Any, rng: random.Random, outside: Path) -> Any:
    places = list(_places(value))
    if not places or rng.random() < 0.02:
        return _value(rng, outside)
    path = rng.choice(places)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, action = path[-1], rng.randrange(8)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict) and rng.random() < 0.5:
        parent[rng.choice(KEYS)] = _value(rng, outside)
    elif action == 1 and isinstance(parent, dict):
        name = _value(rng, outside)  # another name for the same
        parent[name if isinstance(name, str) else str(name)[:40]] = parent.pop(key)
    elif action == 2 and isinstance(parent, list):
        parent.insert(key, parent[key])
    elif action == 3 and isinstance(parent[key], int | float):
        parent[key] = parent[key] * rng.choice([-1, 0.5, 2, 1000, 10**6, 10**9])
    else:
        parent[key] = _value(rng, outside)
    return value


def mutated_json(text: str, rng: random.Random, outside: Path) -> bytes:
    """JSON, or JSON lines, with one to three entries removed, renamed, doubled or replaced; sometimes other bytes."""
    try:
        values = [json.loads(text)]
    except ValueError:
        values = [json.loads(line) for line in text.split("\n") if line.strip()]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        index = rng.randrange(len(values))
        values[index] = _change(values[index], rng, outside)
    written = "\n".join(map(json.dumps, values)) + "\n" * (len(values) > 1)
    for short, long in _RAW.items():
        written = written.replace(short, long)
    # Half of the lone surrogates as escapes, which JSON can hold, half as bytes that are no UTF-8.
    data = written.encode()
    if rng.random() < 0.5:
        data = data.replace(b"\\ud800", b"\xed\xa0\x80")
    return mutated_bytes(data, rng) if rng.random() < 0.15 else data


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """A file cut off, with flipped, inserted, doubled or zeroed bytes, or with a huge number in the place of eight."""
    new = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        if not new:
            break
        place, action = rng.randrange(len(new)), rng.randrange(8)
        if rng.random() < 0.3:
            place = min(place, rng.randrange(64))  # heads hold the sizes
        if action == 0:
            del new[place:]
        elif action == 1:
            new[place:place] = rng.randbytes(rng.randint(1, 8))
        elif action == 2:
            new[place : place + 8] = rng.choice([2**63 - 1, 2**40, 2**32 - 1, 2**31]).to_bytes(
                8, rng.choice(["little", "big"])
            )
        elif action == 3:
            new[place : place + 16] = bytes(16)
        elif action == 4:
            new[place:place] = new[place : place + 64]
        else:
            new[place] ^= 1 << rng.randrange(8)
    return bytes(new)
