"""Runs eval.py, wherever it came with the library; the options are its own (`mllm-jax eval --help`)."""

from mllm_jax.cli import shipped


def main(arguments: list[str]) -> int:
    """Runs the verb."""
    return shipped.run("eval.py", arguments)
