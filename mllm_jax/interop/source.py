"""Where tensors come from: a directory of Hugging Face weight files, read one tensor at a time."""

import json
import pathlib
from collections.abc import Iterator

import numpy as np

from mllm_jax.interop.safetensors_io import SafetensorsFile


class Source:
    """All tensors of a checkpoint directory, by name.

    Attributes:
      directory: the checkpoint.

    Raises:
      FileNotFoundError: no weights, or a shard that the index names is missing.
      ValueError: a damaged file, or a tensor that two files hold.
    """

    def __init__(self, directory: pathlib.Path):
        self.directory = pathlib.Path(directory)
        self._files: dict[str, SafetensorsFile] = {}
        for path in weight_files(self.directory):
            file = SafetensorsFile(path)
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
    """The weight files of a directory: those its index names, or every *.safetensors in it.

    Raises:
      FileNotFoundError: none, or one that the index names is missing.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory")
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (directory / name).exists()]
        if missing:
            raise FileNotFoundError(
                f"{index} names {missing[0]}, which is not there ({len(missing)} missing)"
            )
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory} holds no *.safetensors; download the weights or check the path")
    return files
