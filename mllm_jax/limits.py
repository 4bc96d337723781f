"""How much a file from elsewhere may make this library allocate: named limits, each raised by an environment variable.

A limit is checked before the allocation. The message says what was found, and which variable raises the limit:
`MLLM_JAX_MAX_LAYERS=10000 mllm-jax inspect DIR`.
"""

import os

PREFIX = "MLLM_JAX_"

# name -> (default, what is counted). Each default is several times what any published file needs.
LIMITS: dict[str, tuple[int, str]] = {
    "MAX_JSON_BYTES": (64 << 20, "bytes of a JSON file of a checkpoint"),
    "MAX_HEADER_BYTES": (32 << 20, "bytes of a safetensors header"),
    "MAX_PICKLE_BYTES": (16 << 20, "bytes of the pickle in a .bin file"),
    "MAX_PICKLE_STEPS": (1 << 20, "opcodes of the pickle in a .bin file"),
    "MAX_UNPACK_RATIO": (8, "times the size of a .bin file that its tensors take in memory"),
    "MAX_LAYERS": (1024, "layers of a model"),
    "MAX_WIDTH": (1 << 20, "channels, heads or tokens of one kind in a model"),
    "MAX_VOCABULARY": (1 << 24, "tokens of a vocabulary"),
    "MAX_POSITIONS": (1 << 28, "positions of an LLM"),
    "MAX_IMAGE_SIDE": (1 << 14, "pixels per side of a model's image"),
    "MAX_TEXT_BYTES": (8 << 30, "bytes of a data file"),
    "MAX_IMAGE_FILE_BYTES": (512 << 20, "bytes of an image file"),
    "MAX_DECODING_BYTES": (4 << 30, "bytes of images that are decoded at the same time"),
    "MAX_UNPACKED_BYTES": (64 << 30, "bytes that an archive unpacks to"),
    "MAX_ARCHIVE_RATIO": (100, "times the size of an archive that it unpacks to"),
    "MAX_INDEX_BYTES": (16 << 20, "bytes of the index of a shard of prepared data"),
    "MAX_TABLE_BYTES": (2 << 30, "bytes of a table in memory"),
    "MAX_TEMPLATE_SECONDS": (20, "seconds that a chat template takes"),
    "MAX_TEMPLATE_BYTES": (1 << 30, "bytes of memory that a chat template takes"),
}


class LimitError(ValueError):
    """A file asks for more than a limit allows; the message names both, and the variable that raises the limit."""


def limit(name: str) -> int:
    """The limit in force: the environment's, or the default.

    Raises:
      LimitError: the environment variable is not a positive whole number.
    """
    text = os.environ.get(PREFIX + name)
    if text is None:
        return LIMITS[name][0]
    if not text.isdecimal() or not int(text):
        raise LimitError(f"environment variable {PREFIX}{name}={text!r} must be a positive whole number")
    return int(text)


def check(name: str, value: int, where: object) -> None:
    """Refuses a value above its limit.

    Args:
      where: the file, and the key in it, for the message.

    Raises:
      LimitError: `value` is above `limit(name)`.

    Example:
        >>> check("MAX_LAYERS", 32, "config.json")
    """
    if value > limit(name):
        raise LimitError(
            f"{where}: {value:,} {LIMITS[name][1]}, more than {limit(name):,}; if the file can be trusted, set "
            f"{PREFIX}{name}={value}"
        )
