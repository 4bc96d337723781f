"""Time and memory of one attention, forward and backward, by `blockwise` and by `xla`.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/attention.py --write

Both compute the same in one process, in turn, in float32. Rows are one sample (`whole`), packed samples of 60 to 260
tokens, or one sample and three quarters padding (`padded`); a tower's rows attend from everything to everything.
"""

import argparse
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import page

from mllm_jax.models.attention import BACKENDS, AttentionMask

# rows, positions, heads, kv heads, head width; kinds of rows
CASES = (
    (16, 512, 6, 6, 64, ("whole", "packed", "padded")),
    (16, 256, 4, 2, 32, ("whole", "packed")),
    (4, 2048, 6, 6, 64, ("whole", "packed")),
    (1, 4096, 6, 6, 64, ("whole", "packed")),
    (4, 577, 16, 16, 64, ("tower",)),
    (16, 144, 4, 4, 64, ("tower",)),
)
NAMES = ("xla", "blockwise")


def segments_of(kind: str, rows: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """int32[rows, length], 0 = padding."""
    found = np.zeros((rows, length), np.int32)
    for row in found:
        if kind == "whole":
            row[:] = 1
        elif kind == "padded":
            row[: length // 4] = 1
        else:
            ends = np.cumsum(rng.integers(60, 260, length // 60 + 1))
            row[:] = 1 + np.searchsorted(ends, np.arange(length), side="right")
    return found


def measure(case: tuple, kind: str, turns: int) -> dict[str, tuple[list[float], float]]:
    """Seconds of each turn, and MiB besides arguments and results, of each backend."""
    rows, length, heads, kv_heads, width = case
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (
        jnp.asarray(rng.standard_normal((rows, length, count, width)), jnp.float32)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    mask = None
    if kind != "tower":
        segments = jnp.asarray(segments_of(kind, rows, length, rng))
        mask = AttentionMask(segments, segments)
        cotangent = cotangent * (segments != 0)[..., None, None]

    def compiled(name: str) -> jax.stages.Compiled:
        def step(q, k, v):
            return jax.vjp(lambda *a: BACKENDS[name].attend(*a, mask, width**-0.5, None), q, k, v)[1](
                cotangent
            )

        return jax.jit(step).lower(q, k, v).compile()

    steps = {name: compiled(name) for name in NAMES}
    seconds = {name: [] for name in NAMES}
    for turn in range(turns + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            jax.block_until_ready(step(q, k, v))
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {
        name: (seconds[name], step.memory_analysis().temp_size_in_bytes / 2**20)
        for name, step in steps.items()
    }


def table(turns: int) -> Iterator[str]:
    """The lines of a Markdown table, printed as they are measured."""
    yield "| rows | positions | heads | kind | xla ms | blockwise ms | times as fast | xla MiB | blockwise MiB |"
    yield "|---:|---:|---|---|---:|---:|---:|---:|---:|"
    for *case, kinds in CASES:
        rows, length, heads, kv_heads, width = case
        for kind in kinds:
            (slow, large), (fast, small) = measure(tuple(case), kind, turns).values()
            ratio = np.median(slow) / np.median(fast)
            told = [page.spread([1e3 * second for second in seconds], 0) for seconds in (slow, fast)]
            yield (
                f"| {rows} | {length} | {heads}/{kv_heads} of {width} | {kind} | {' | '.join(told)} | {ratio:.1f} | "
                f"{large:.0f} | {small:.0f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    args = parser.parse_args()
    lines = []
    for line in table(args.turns):
        print(line, flush=True)
        lines.append(line)
    if args.write:
        page.write_section(
            "attention",
            "## Attention on a CPU",
            "One attention forward and backward in float32: median and spread of milliseconds, and memory besides "
            f"arguments and results. {page.machine('jax')}.",
            "`GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/attention.py --write`",
            "\n".join(lines),
        )


if __name__ == "__main__":
    main()
