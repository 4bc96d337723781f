"""Runs train.py, wherever it came with the library; the options are its own (`mllm-jax train --help`)."""

from mllm_jax.cli import shipped


def main(arguments: list[str]) -> int:
    """Runs the verb."""
    return shipped.run("train.py", arguments)
