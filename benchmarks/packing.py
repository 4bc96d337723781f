"""How full packed rows are on lengths like LLaVA-665k's, and how long the plan of an epoch takes.

    python benchmarks/packing.py --samples=20000

LLaVA-665k itself is not needed: lengths are drawn per source of its mixture (number of samples in thousands as
published; log-normal text lengths whose means and deviations are our estimates of each source's conversations), with
one image of `visual` tokens except for ShareGPT's text-only conversations, and cut to LLaVA's 2,048 tokens.
"""

import argparse
import time

import numpy as np

from mllm_jax.data.packing import RowLimits, pack

# thousands of samples, mean and deviation of the logarithm of the text tokens, images
SOURCES = (
    (158, 5.75, 0.45, 1),  # LLaVA-Instruct
    (40, 6.9, 0.7, 0),  # ShareGPT
    (83, 5.6, 0.35, 1),  # VQAv2
    (72, 5.5, 0.35, 1),  # GQA
    (9, 4.6, 0.3, 1),  # OKVQA
    (80, 5.3, 0.3, 1),  # OCR-VQA
    (66, 4.9, 0.3, 1),  # A-OKVQA
    (22, 4.4, 0.2, 1),  # TextCaps
    (48, 6.0, 0.4, 1),  # RefCOCO
    (86, 6.2, 0.35, 1),  # Visual Genome
)
MOST = 2048  # tokens of a sample


def llava_like(count: int, visual: int = 576, seed: int = 0) -> np.ndarray:
    """int[count, 4], what samples need of each of `packing.RESOURCES`."""
    rng = np.random.default_rng(seed)
    shares = np.array([source[0] for source in SOURCES], float)
    chosen = np.array(SOURCES)[rng.choice(len(SOURCES), count, p=shares / shares.sum())]
    images = chosen[:, 3].astype(int)
    text = np.exp(rng.normal(chosen[:, 1], chosen[:, 2])).astype(int).clip(16, MOST - visual * images)
    return np.stack([text + visual * images, images, text // 2 + 1, np.ones(count, int)], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=20_000)
    args = parser.parse_args()
    print("| visual tokens | row length | useful, one sample a row % | useful, packed % | seconds |")
    print("|---:|---:|---:|---:|---:|")
    for visual in (576, 144):
        sizes = llava_like(args.samples, visual)
        for length in (2048, 4096, 8192):
            begin = time.perf_counter()
            limits = RowLimits(length, length // visual + 1, length, 64)
            rows = pack(sizes, limits, np.random.default_rng(0))
            took = time.perf_counter() - begin
            alone, packed = sizes[:, 0].mean() / MOST, sizes[:, 0].sum() / (len(rows) * length)
            print(f"| {visual} | {length} | {100 * alone:.1f} | {100 * packed:.1f} | {took:.1f} |")


if __name__ == "__main__":
    main()
