"""Step time against the amount of work: visual tokens, depth, batch and row length, one at a time; a table and a plot.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/cost.py --write
    python benchmarks/cost.py --sweeps=depth,batch --store=cost.json    # in parts, which are kept in a file
    python benchmarks/cost.py --sweeps= --store=cost.json --write       # from the file alone

A stage-2 step (connector and LLM trained in float32 with AdamW, tower frozen) of a random model: tower of 2 blocks of
width 128 on 224-pixel images (1,024 patches), average pooling, LLM of width 256. The base is 4 rows of one sample with
256 visual tokens and 128 of text, half of it supervised, and 4 LLM blocks. Rows are full; along "row length" the text
grows. *Growth* is the exponent of time in the quantity from the point before: 1 is proportional; above 1 a step costs
more than its work.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import time

import jax
import numpy as np
import page
from trainer import Trainer

from mllm_jax.data.batch import Batch
from mllm_jax.models import mllm
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.vit import VisionConfig

SIDE = 224
VISION = VisionConfig(width=128, depth=2, heads=2, mlp_width=512, patch=7, image_size=SIDE)
LLM = DecoderConfig(
    4096, 256, depth=4, heads=4, kv_heads=4, head_width=64, mlp_width=704, max_positions=4096, tied=True
)
PLOT = page.ROOT / "docs" / "images" / "cost.png"


@dataclasses.dataclass(frozen=True)
class Point:
    """A step: `rows` samples of `visual` tokens and `text` others, `depth` LLM blocks."""

    visual: int = 256
    text: int = 128
    rows: int = 4
    depth: int = 4


BASE = Point()
SWEEPS: dict[str, dict[int, Point]] = {
    "visual tokens": {n: dataclasses.replace(BASE, visual=n) for n in (64, 144, 256, 576, 1024)},
    "depth": {n: dataclasses.replace(BASE, depth=n) for n in (2, 4, 8)},
    "batch": {n: dataclasses.replace(BASE, rows=n) for n in (1, 4, 16)},
    "row length": {n: dataclasses.replace(BASE, visual=64, text=n - 64) for n in (256, 512, 1024, 2048)},
}


class Step:
    """One point, compiled."""

    def __init__(self, point: Point, attention: str):
        model = mllm.ModelConfig(
            vision=VISION,
            llm=dataclasses.replace(LLM, depth=point.depth),
            image_size=SIDE,
            connector="average_pool",
            connector_options=(("tokens", point.visual),),
            remat="none",
            vision_remat="none",
            attention=attention,
        )
        self.trainer = Trainer(model, jax.jit(lambda key: mllm.init(model, key))(jax.random.key(0)))
        length = point.visual + point.text
        rows = Batch.spec(point.rows, length=length, slots=1, image_size=(SIDE, SIDE)).empty()
        rows.tokens[:, point.visual :] = np.random.default_rng(0).integers(
            3, LLM.vocab, (point.rows, point.text)
        )
        rows.positions[:] = np.arange(length)
        rows.segment_ids[:] = 1
        rows.visual_index[:, : point.visual] = np.arange(point.visual)
        rows.loss_weights[:, -(point.text // 2) :] = 1
        rows.image_mask[:] = True
        self.batch = self.trainer.to_device(rows)
        self.compiled = self.trainer.compile(self.batch, label_tokens=point.text // 2)

    def seconds(self) -> float:
        """Of one step."""
        begin = time.perf_counter()
        self.trainer.run(self.compiled, self.batch)
        return time.perf_counter() - begin


def measure(sweep: dict[int, Point], attention: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of steps at each point, in turn, so that all meet the same machine; the first round warms up."""
    steps = {str(value): Step(point, attention) for value, point in sweep.items()}
    taken: dict[str, list[float]] = {value: [] for value in steps}
    for number in range(rounds + 1):
        for value, step in steps.items():
            seconds = step.seconds()
            if number:
                taken[value].append(seconds)
    return taken


def draw(measured: dict[str, dict[int, float]]) -> None:
    """A panel for each sweep, on logarithmic axes, beside a line of proportional cost."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = {"figsize": (3 * len(measured), 3.2), "sharey": True, "layout": "constrained"}
    figure, (panels,) = plt.subplots(1, len(measured), squeeze=False, **size)
    for panel, (name, points) in zip(panels, measured.items(), strict=True):
        xs, ys = list(points), list(points.values())
        panel.loglog(xs, ys, "o-", label="measured")
        panel.loglog(xs, [ys[-1] * x / xs[-1] for x in xs], ":", color="gray", label="proportional")
        panel.set_xticks(xs, map(str, xs), minor=False)
        panel.minorticks_off()
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds a step")
    panels[0].legend(frameon=False)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attention", default="auto", help="backend (config key model.attention)")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md, and the plot")
    parser.add_argument("--sweeps", default=",".join(SWEEPS), help="those to measure, with commas between")
    parser.add_argument(
        "--store", type=pathlib.Path, help="JSON file: keep the measurements, and go on from it"
    )
    args = parser.parse_args()
    taken: dict[str, dict[str, list[float]]] = {}
    if args.store and args.store.exists():
        taken = json.loads(args.store.read_text(encoding="utf-8"))
    for name in filter(None, args.sweeps.split(",")):
        taken[name] = measure(SWEEPS[name], args.attention, args.rounds)
        if args.store:
            args.store.write_text(json.dumps(taken), encoding="utf-8")
    lines = ["| | | seconds a step | growth |", "|---|---:|---:|---:|"]
    measured: dict[str, dict[int, float]] = {}
    for name in [name for name in SWEEPS if name in taken]:
        before = None
        measured[name] = {}
        for value in SWEEPS[name]:
            seconds = taken[name][str(value)]
            middle = measured[name][value] = statistics.median(seconds)
            growth = f"{math.log(middle / before[1]) / math.log(value / before[0]):.2f}" if before else ""
            lines.append(f"| {name} | {value:,} | {page.spread(seconds, 3)} | {growth} |")
            before = value, middle
    table = "\n".join(lines)
    print(table)
    if args.write:
        draw(measured)
        about = __doc__.split("\n\n", 2)[2]
        setting = (
            f"Median (least–greatest) of {len(seconds)} steps in turn, `attention={args.attention}`; "
            f"{page.machine('jax')}."
        )
        plot = f"![Seconds a step over visual tokens, depth, batch and row length](images/{PLOT.name})"
        page.write_section("cost", "## Cost against work", about, setting, table, plot)


if __name__ == "__main__":
    main()
