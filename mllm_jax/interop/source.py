"""Where tensors come from: a directory of weight files, read one tensor at a time."""

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from mllm_jax.interop.hub import read_json
from mllm_jax.interop.safetensors_io import SafetensorsFile
from mllm_jax.interop.torch_pickle import TorchFile

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Files of a directory without an index, in the order in which a kind is preferred.
KINDS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "mm_projector.bin", "*.bin")
# Beside the weights in training directories; no tensors of the model.
NOT_WEIGHTS = (
    "training_args.bin",
    "optimizer.bin",
    "scheduler.bin",
    "rng_state.bin",
    "non_lora_trainables.bin",
)


class Source:
    """All tensors of a checkpoint, by name.

    Attributes:
      directory: the checkpoint, for messages.

    Args:
      files: which weight files; by default those that `weight_files` finds.

    Raises:
      FileNotFoundError: no weights, or a shard that the index names is missing.
      ValueError: a damaged or unsafe file, or a tensor that two files hold.
    """

    def __init__(self, directory: pathlib.Path, files: Sequence[pathlib.Path] | None = None):
        self.directory = pathlib.Path(directory)
        self._files: dict[str, SafetensorsFile | TorchFile] = {}
        for path in weight_files(self.directory) if files is None else files:
            file = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
            for name in file.tensors:
                if name in self._files:
                    other = self._files[name].path.name
                    raise ValueError(f"{self.directory}: tensor {name!r} is in both {other} and {path.name}")
                self._files[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._files[name].tensors[name][1]

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor, from the header."""
        return self._files[name].tensors[name][0]

    def read(self, name: str) -> np.ndarray:
        """The tensor itself."""
        return self._files[name].read(name)


def weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The weight files of a directory: those its index names, or all of the first kind that is there.

    Raises:
      FileNotFoundError: none, or one that the index names is missing.
      ValueError: an index that points out of the directory.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory")
    for index in INDICES:
        if (directory / index).exists() and (index.startswith("model") or not any(directory.glob(KINDS[0]))):
            return _indexed(directory, index)
    for kind in KINDS:
        files = sorted(path for path in directory.glob(kind) if path.name not in NOT_WEIGHTS)
        if files:
            return files
    raise FileNotFoundError(
        f"{directory} holds no weights ({', '.join(KINDS[:2])}); download them or check the path"
    )


def _indexed(directory: pathlib.Path, index: str) -> list[pathlib.Path]:
    weight_map = read_json(directory / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{directory / index}: weight_map must say which file holds each tensor")
    names = sorted(set(weight_map.values()))
    for name in names:
        if pathlib.Path(name).name != name or name.startswith(".") or "\0" in name:
            raise ValueError(f"{directory / index} names {name!r}, which is not a file beside it")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory / index} names {missing[0]}, which is not there ({len(missing)} missing)"
        )
    return [directory / name for name in names]
