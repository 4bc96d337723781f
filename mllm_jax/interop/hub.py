"""Finding checkpoints: shipped assets, directories, the Hugging Face hub."""

import contextlib
import contextvars
import importlib.util
import itertools
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from mllm_jax import limits
from mllm_jax.bucket_copy import local_copy
from mllm_jax.data.preprocessing import ImageProcessor, UnsupportedProcessorError
from mllm_jax.schema import nearest
from mllm_jax.storage import BUCKET, as_path

ASSETS = pathlib.Path(__file__).parents[1] / "assets"
MINI = "mini"
OPENCLIP_CONFIG = "open_clip_config.json"
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


_LOCAL_ONLY: contextvars.ContextVar[bool] = contextvars.ContextVar("local_only", default=False)


class NotFetchedError(FileNotFoundError):
    """A checkpoint is not here, and fetching it was not asked for; the message says what would be fetched."""


@contextlib.contextmanager
def local_only() -> Iterator[None]:
    """Inside, nothing is fetched: what is neither a directory nor in the hub's cache is a `NotFetchedError`."""
    token = _LOCAL_ONLY.set(True)
    try:
        yield
    finally:
        _LOCAL_ONLY.reset(token)


def resolve_path(path: str | pathlib.Path, shipped: str = "mini_llm") -> pathlib.Path:
    """The local directory of a checkpoint.

    Args:
      path: "mini" (an asset of this package), an existing directory, one in a bucket (gs://), which is copied into
        the user's cache, or a hub id, downloaded by huggingface_hub into the user's cache with the user's token.
      shipped: which asset "mini" means: "mini_llm" or "mini_vit".

    Raises:
      FileNotFoundError: neither a directory nor reachable on the hub (`NotFetchedError` within `local_only`).
    """
    if str(path) == MINI:
        directory = ASSETS / shipped
        if not directory.is_dir():
            raise FileNotFoundError(
                f"{directory} is missing: reinstall mllm-jax or run configs/mini_foundation.py"
            )
        return directory
    if str(path).startswith(BUCKET):
        return local_copy(as_path(str(path)))
    local = pathlib.Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_file():
        raise FileNotFoundError(f"{path} is a file; give the directory of the checkpoint")
    near = _nearby(local)
    if not _is_hub_id(str(path)) or near.startswith("; did"):
        raise FileNotFoundError(f"there is no directory {str(path)!r}{near}")
    return _cached(str(path)) if _LOCAL_ONLY.get() else _fetched(str(path))


def _is_hub_id(path: str) -> bool:
    """Whether a name can only be a repository's: `owner/name` or `name`, and not a path beside what is here."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) is not None and ".." not in path and "--" not in path


def _nearby(path: pathlib.Path) -> str:
    """The directories that a mistyped path may mean, for a message."""
    parent = next((each for each in path.parents if each.is_dir()), path)
    if parent in (path, pathlib.Path()) and len(path.parts) > 1:
        return ""
    missing = path.relative_to(parent).parts[0]
    found = nearest(
        missing, (each.name for each in itertools.islice(parent.iterdir(), 1000) if each.is_dir())
    )
    return f"; did you mean {str(parent / found)!r}?" if found else f" (there is {str(parent.absolute())!r})"


def _cached(path: str) -> pathlib.Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return pathlib.Path(snapshot_download(path, allow_patterns=list(PATTERNS), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise NotFetchedError(
            f"{path!r} is neither a directory nor in the Hugging Face cache; all of it would be fetched from the hub"
        ) from error


def _fetched(path: str) -> pathlib.Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = pathlib.Path(snapshot_download(path, allow_patterns=list(PATTERNS)))
        if not any(found.glob("*.safetensors")):  # published as .bin only
            found = pathlib.Path(snapshot_download(path, allow_patterns=[*PATTERNS, "*.bin"]))
        return found
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{path!r} is not a directory and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]}). Offline: download it where there is a "
            f"network (`hf download {path} --local-dir DIR`) and give DIR; private or gated: `hf auth login`."
        ) from error


def named_by(file: pathlib.Path, key: str, name: Any) -> str:
    """Where a checkpoint is that another one's config file names: beside that one if it is there, else as named.

    Args:
      file: the config file; key: the entry, for messages.

    Raises:
      ValueError: the entry is no name.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{file}: {key}={name!r} must be the name or directory of a checkpoint")
    last = pathlib.PurePath(name).name
    for place in (file.parent / name, file.parent / last, file.parent.parent / last):
        if (
            last not in ("", ".", "..")
            and any((place / name).is_file() for name in ("config.json", OPENCLIP_CONFIG))
            and not place.samefile(file.parent)
        ):
            return str(place)
    return name


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      FileNotFoundError, ValueError: naming the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: not a Hugging Face checkpoint directory?")
    limits.check("MAX_JSON_BYTES", path.stat().st_size, path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def load_processor_config(path: str | pathlib.Path) -> dict[str, Any]:
    """The image processor's settings (image_mean, image_std, size, crop_size, ...); {} if there are none.

    Of fused towers ("A+B") the first one's.

    Raises:
      ValueError: a value of the wrong type; file and key are named.
    """
    if not pathlib.Path(path).expanduser().is_dir():
        path = str(path).split("+")[0]
    directory = resolve_path(path, "mini_vit")
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (directory / name).exists():
            fields = read_json(directory / name)
            fields = fields.get("image_processor", fields)
            if isinstance(fields, dict) and "image_mean" in fields:
                try:
                    ImageProcessor.from_hf_config(fields)
                except UnsupportedProcessorError:  # its mean and std are still of use
                    pass
                except ValueError as error:
                    raise ValueError(f"{directory / name}: {error}") from error
                return fields
    return {}


def load_tokenizer(path: str | pathlib.Path) -> Any:
    """The checkpoint's tokenizer (transformers, fast, without running code from the checkpoint).

    Raises:
      OSError: there is none, it is damaged, or it is a SentencePiece model (Vicuna, Llama 1 and 2) and the package to
        read it is missing.
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
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust library panics with an exception that is no Exception
        told = (str(error).splitlines() or [""])[0]
        raise OSError(
            f"the tokenizer in {directory} cannot be read ({type(error).__name__}: {told})"
        ) from error
