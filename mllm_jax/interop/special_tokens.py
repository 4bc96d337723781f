"""Ids that a tokenizer's users need beside the weights: begin, end and padding of a text, and the place of an image.

transformers 5 stops generating at the end ids of generation_config.json, and without one at those of config.json; a
checkpoint that has neither never stops.
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from mllm_jax import files
from mllm_jax.interop import native
from mllm_jax.interop.hub import read_json

FILE = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def generation(
    directory: pathlib.Path | None = None, tokenizer: Any = None, stops: Iterable[int] = ()
) -> dict[str, Any]:
    """The contents of generation_config.json for a model that comes from `directory` and uses `tokenizer`.

    Args:
      directory: its generation_config.json, else the ids in its config.json, are kept; None: there is none.
      tokenizer: its ids fill what is missing.
      stops: further ids that end an answer (of a conversation template).

    Returns:
      {} when no id is known. `eos_token_id` is a number, or a list where several ids end a text.

    Raises:
      ValueError: an id in a file that is none.
    """
    fields = _stored(directory) if directory else {}
    ends = [*_ids(fields.get("eos_token_id")), *_ids(getattr(tokenizer, "eos_token_id", None)), *stops]
    ends = list(dict.fromkeys(int(each) for each in ends))
    found = {"bos_token_id": None, "pad_token_id": None}
    for key in found:
        found[key] = fields.get(key) if fields.get(key) is not None else getattr(tokenizer, key, None)
    if ends:
        fields["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        found["pad_token_id"] = ends[0] if found["pad_token_id"] is None else found["pad_token_id"]
    return fields | {key: value for key, value in found.items() if value is not None}


def _stored(directory: pathlib.Path) -> dict[str, Any]:
    if (file := directory / FILE).is_file():
        fields = read_json(file)
    else:
        file = directory / "config.json"
        outer = read_json(file) if file.is_file() else {}
        inner = outer.get("text_config")
        inner = inner if isinstance(inner, dict) else {}
        fields = {key: inner.get(key, outer.get(key)) for key in IDS}
    for key in IDS:
        if any(type(each) is not int or each < 0 for each in _ids(fields.get(key))):
            raise ValueError(f"{file}: {key}={fields[key]!r} is no token id")
    return {key: value for key, value in fields.items() if value is not None}


def _ids(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def image_token(directory: pathlib.Path) -> int | None:
    """The id of the image token that a checkpoint names (llava-hf's config.json, or our model.json); None if none."""
    if native.is_native(directory):
        return native.load_extras(directory).get("image_token_index")
    file = directory / "config.json"
    fields = read_json(file) if file.is_file() else {}
    if fields.get("model_type") != "llava" or "text_config" not in fields:
        return None
    token = fields.get("image_token_index", fields.get("image_token_id"))
    if token is not None and (type(token) is not int or token < 0):
        raise ValueError(f"{file}: image_token_index={token!r} is no token id")
    return token


def write(directory: pathlib.Path, fields: Mapping[str, Any]) -> None:
    """Writes generation_config.json, unless nothing is known."""
    if fields:
        files.write_json(directory / FILE, dict(fields), indent=2)


def save_tokenizer(directory: pathlib.Path, tokenizer: Any) -> None:
    """Writes a tokenizer's files as transformers 4 and 5 both read them.

    Transformers 5 names a class that 4 does not have, and calls the additional special tokens otherwise, as a list.
    """
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    fields = read_json(file)
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    files.write_json(file, fields, indent=2)


def for_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The ids among `fields`, as config.json has them."""
    return {key: fields[key] for key in IDS if key in fields}
