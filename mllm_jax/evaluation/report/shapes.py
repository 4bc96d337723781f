"""The types in JSON that comes from anywhere: run folders are given away and edited."""

from typing import Any

NUMBER = (int, float)


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Checks what JSON holds, before it is used.

    Args:
      shape: types; or `[shape of every item]`; or `{key: shape}`, where `...` means every key, and a key with "?" may
        be absent or empty.

    Raises:
      ValueError: `value` is something else; names the place in it.

    Example:
      >>> check_shape({"n": [1, 2]}, {"n": [int], "note?": str}, "summary.json")
    """
    if isinstance(shape, list | dict):
        if not isinstance(value, type(shape)):
            wanted = "a list" if isinstance(shape, list) else "an object"
            raise ValueError(f"{where} is not {wanted} but {value!r:.60}")
    elif not isinstance(value, shape) or (isinstance(value, bool) and shape in (int, NUMBER)):
        raise ValueError(f"{where} is {value!r:.60}")
    if isinstance(shape, list):
        for index, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{index}]")
    elif isinstance(shape, dict):
        inner = dict.fromkeys(value, shape[...]) if ... in shape else shape
        for key, wanted in inner.items():
            name = key.removesuffix("?")
            if name == key or value.get(name):
                if name not in value:
                    raise ValueError(f"{where} has no {name!r}")
                check_shape(value[name], wanted, f"{where}: {name!r}")
