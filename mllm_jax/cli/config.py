"""Print every configuration key with its type, default and meaning, as Markdown.

mllm-jax config > docs/config.md
mllm-jax config --only stages
"""

import argparse

from mllm_jax.config import SCHEMA
from mllm_jax.schema import Key, Named, walk

INTRODUCTION = """# Configuration keys

Made by `mllm-jax config > docs/config.md`. A recipe in `configs/` sets keys, and the command line sets any of them:
`--config.stages.finetune.learning_rate=1e-4`. `*` stands for a name that the recipe chooses. Sources and benchmarks can
be added on the command line by giving a new name its `json` (or `path`, or `kind`).

Keys marked with ↻ may differ when a stopped run is continued: they change speed, memory, logging or evaluation, not
what is trained (apart from rounding). Any other difference is refused.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `mllm-jax config`."""
    parser.add_argument(
        "--only", default="", metavar="KEY", help="only the keys below this one, such as stages.*.lora"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the reference; 1 if there is no such key."""
    rows = [
        row
        for path, node in walk(SCHEMA)
        if f"{path}.".startswith(f"{args.only}.".lstrip("."))
        for row in _rows(path, node)
    ]
    if not rows:
        print(f"there is no config key {args.only!r}")
        return 1
    if not args.only:
        print(INTRODUCTION)
    print("| key | type | default | meaning |\n|---|---|---|---|")
    print("\n".join(rows))
    return 0


def _rows(path: str, node: object) -> list[str]:
    if isinstance(node, Named):
        return [f"| `{path}` | named{' ↻' if node.resumable else ''} | | {node.help} |"]
    if not isinstance(node, Key):
        return []
    kind = {"str": "string", "dict": "options"}.get(node.kind.__name__, node.kind.__name__)
    valid = f"; {node.valid}" if node.valid and path != "model.connector.name" else ""
    cells = (f"`{path}`", f"{kind}{valid}{' ↻' if node.resumable else ''}", f"`{node.default!r}`", node.help)
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"]
