"""Finding checkpoints: shipped assets, directories, the Hugging Face hub."""

import importlib.util
import json
import pathlib
from typing import Any

ASSETS = pathlib.Path(__file__).parents[1] / "assets"
MINI = "mini"
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def resolve_path(path: str | pathlib.Path, shipped: str = "mini_llm") -> pathlib.Path:
    """The local directory of a checkpoint.

    Args:
      path: "mini" (an asset of this package), an existing directory, or a hub id, downloaded by
        huggingface_hub into the user's cache with the user's token.
      shipped: which asset "mini" means: "mini_llm" or "mini_vit".

    Raises:
      FileNotFoundError: neither a directory nor reachable on the hub.
    """
    if str(path) == MINI:
        directory = ASSETS / shipped
        if not directory.is_dir():
            raise FileNotFoundError(
                f"{directory} is missing: reinstall mllm-jax or run configs/mini_foundation.py"
            )
        return directory
    if pathlib.Path(path).expanduser().is_dir():
        return pathlib.Path(path).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = pathlib.Path(snapshot_download(str(path), allow_patterns=list(PATTERNS)))
        if not any(found.glob("*.safetensors")):  # published as .bin only
            found = pathlib.Path(snapshot_download(str(path), allow_patterns=[*PATTERNS, "*.bin"]))
        return found
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{str(path)!r} is not a directory and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Offline: download it where there is a "
            f"network (`hf download {path} --local-dir DIR`) and give DIR; private or gated: `hf auth login`."
        ) from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      FileNotFoundError, ValueError: naming the file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: not a Hugging Face checkpoint directory?")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def load_processor_config(path: str | pathlib.Path) -> dict[str, Any]:
    """The image processor's settings (image_mean, image_std, size, crop_size, ...); {} if there are none.

    Of fused towers ("A+B") the first one's.
    """
    if not pathlib.Path(path).expanduser().is_dir():
        path = str(path).split("+")[0]
    directory = resolve_path(path, "mini_vit")
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (directory / name).exists():
            fields = read_json(directory / name)
            fields = fields.get("image_processor", fields)
            if "image_mean" in fields:
                return fields
    return {}


def load_tokenizer(path: str | pathlib.Path) -> Any:
    """The checkpoint's tokenizer (transformers, fast, without running code from the checkpoint).

    Raises:
      OSError: it is a SentencePiece model (Vicuna, Llama 1 and 2) and the package to read it is missing.
    """
    from transformers import AutoTokenizer

    directory = resolve_path(path, "mini_llm")
    alone = (directory / "tokenizer.model").exists() and not (directory / "tokenizer.json").exists()
    if (
        alone and importlib.util.find_spec("sentencepiece") is None
    ):  # transformers' own message is about tiktoken
        raise OSError(
            f"{directory / 'tokenizer.model'} is a SentencePiece tokenizer: `pip install sentencepiece` to read it"
        )
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
