"""Keeps libraries that can do without an installed PyTorch from importing it, which takes seconds."""

import sys


def block() -> None:
    """Makes `import torch` fail from now on, unless torch is there already.

    For programs only: what else runs in the process may want it.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


def unblock() -> None:
    """Takes `block` back; to be called before scipy or scikit-learn is imported.

    They look torch up among the imported modules and take whatever stands there for it.
    """
    if sys.modules.get("torch", ...) is None:
        del sys.modules["torch"]
