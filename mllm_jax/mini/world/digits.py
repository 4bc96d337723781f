"""The handwritten digits that scikit-learn brings along (UCI's optical recognition data), 8 x 8 pixels."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8


@functools.cache
def digits() -> tuple[UInt8[np.ndarray, "n 8 8"], Int[np.ndarray, " n"]]:
    """Brightness from 0 to 16 and class of each digit, as `sklearn.datasets.load_digits` has them.

    The file is read here, because importing scikit-learn takes longer than drawing a hundred images.
    """
    package = importlib.util.find_spec("sklearn").submodule_search_locations[0]
    table = np.loadtxt(Path(package, "datasets", "data", "digits.csv.gz"), np.uint8, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)
