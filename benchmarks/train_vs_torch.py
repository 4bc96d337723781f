"""Useful tokens per second of stage-2 training against transformers' LLaVA in torch, from the same weights.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/train_vs_torch.py --write

Both sides train connector and LLM (tower frozen) in float32 with AdamW and gradients clipped to norm 1, on all cores
and with huge pages. Two processes take turns in one run, so that both meet the same machine. The model
(`tiny_llava.py`) has 18 M parameters; the losses of the first step must agree. Cases, 16 samples a step:

* `fixed`: 512 tokens a sample: nothing is padded on either side.
* `LLaVA-like`: lengths of LLaVA-665k's mixture, at most 512. torch pads to the longest sample of the batch, as
  transformers does. Ours packs rows, and a step takes as many rows as hold 16 samples on average.
* `grouped`: the same, but torch's batches are of samples of similar length, as LLaVA's own script groups them.
"""

import argparse
import os
import tempfile
import time
from typing import Any

import numpy as np
import page
from tiny_llava import IMAGE, LENGTH, SIDE, VISUAL, Sample, fixed_samples, llava_like_samples, make_checkpoint
from turns import Side

from mllm_jax.data.packing import RowLimits, pack

BATCH, SAMPLES = 16, 256  # samples of a step and of an epoch
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Ours -> torch's that take turns with it, and steps of a turn.
CASES = {"fixed": (("fixed",), 1), "LLaVA-like": (("LLaVA-like", "grouped"), 2)}


class Torch:
    """transformers' LLaVA as its Trainer trains it by default: SDPA, fused AdamW."""

    def __init__(self, directory: str):
        import torch
        import transformers

        self.torch = torch
        self.model = transformers.LlavaForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        ).train()
        self.model.model.vision_tower.requires_grad_(False)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-4, weight_decay=0.0, fused=True)
        samples = llava_like_samples(SAMPLES)
        by_length = sorted(samples, key=lambda sample: len(sample.tokens))
        cases = {"fixed": fixed_samples(BATCH), "LLaVA-like": samples, "grouped": by_length}
        self.batches = {
            case: [self._batch(given[i : i + BATCH]) for i in range(0, len(given), BATCH)]
            for case, given in cases.items()
        }
        np.random.default_rng(0).shuffle(self.batches["grouped"])

    def _batch(self, samples: list[Sample]) -> tuple[Any, int]:
        longest = max(len(sample.tokens) for sample in samples)
        ids = np.zeros((len(samples), longest), np.int64)
        mask, labels = np.zeros_like(ids), np.full_like(ids, -100)
        for row, (tokens, supervised, _) in enumerate(samples):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            labels[row, : len(tokens)] = np.where(supervised, tokens, -100)
        images = np.stack([sample.image for sample in samples if sample.image is not None])
        pixels = (images / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "pixel_values": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)),
        }
        return {key: self.torch.tensor(value) for key, value in batch.items()}, int(mask.sum())

    def run(self, case: str, first: int, count: int) -> tuple[float, int, float]:
        """(seconds, useful tokens, the last loss) of `count` steps from batch `first` on."""
        chosen = [self.batches[case][i % len(self.batches[case])] for i in range(first, first + count)]
        begin = time.perf_counter()
        for batch, _ in chosen:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.model(**batch, use_cache=False).loss
            loss.backward()
            self.torch.nn.utils.clip_grad_norm_(self.params, 1.0)
            self.optimizer.step()
            value = loss.item()
        return time.perf_counter() - begin, sum(tokens for _, tokens in chosen), value


class Ours:
    """This library's step on the same checkpoint."""

    def __init__(self, directory: str, attention: str, row_length: int, devices: int):
        import dataclasses

        from trainer import Trainer

        from mllm_jax.interop.checkpoints import load_model
        from mllm_jax.parallel import cpu_devices

        cpu_devices.divide(devices)

        model, params, _ = load_model(directory)
        model = dataclasses.replace(model, remat="none", vision_remat="none", attention=attention)
        self.trainer, self.devices = Trainer(model, params, devices), devices
        alone = RowLimits(LENGTH, 1, (LENGTH - VISUAL) // 2, 1)
        packed = RowLimits(row_length, row_length // 200, max(row_length // 3, LENGTH // 2), 64)
        self.cases = {
            "fixed": self._case(fixed_samples(BATCH), alone),
            "LLaVA-like": self._case(llava_like_samples(SAMPLES), packed),
        }

    def _case(self, samples: list[Sample], limits: RowLimits) -> tuple[Any, list[tuple[Any, int]]]:
        """The compiled step, and (batch, useful tokens) of an epoch's steps."""
        import jax

        from mllm_jax.data.batch import Batch
        from mllm_jax.data.tokens import EncodedSample, layout_row

        layout = self.trainer.model.visual_layout
        spec = Batch.spec(length=limits.tokens, slots=limits.image_slots, image_size=layout.slot.size)

        def encode(sample: Sample) -> EncodedSample:
            visual = sample.tokens == IMAGE
            return EncodedSample(
                sample="",
                tokens=np.where(visual, 0, sample.tokens).astype(np.int32),
                loss_weights=sample.supervised.astype(np.float32),
                visual_index=np.where(visual, np.cumsum(visual) - 1, -1).astype(np.int32),
                image_of=np.where(visual, 0, -1).astype(np.int32),
                layouts=(layout(lambda: (SIDE, SIDE)),) if visual.any() else (),
            )

        def row_of(numbers: list[int]) -> Batch:
            row, images = layout_row([encode(samples[i]) for i in numbers], spec)
            for which, _, slots in images:
                row.images[slots] = samples[numbers[which]].image
            return row

        sizes = np.array([(len(s.tokens), s.image is not None, s.supervised.sum(), 1) for s in samples])
        rows = pack(sizes, limits, np.random.default_rng(0))
        per_step = max(1, round(BATCH * len(rows) / len(samples) / self.devices)) * self.devices
        batches = []
        for start in range(0, len(rows) - per_step + 1, per_step):
            stacked = jax.tree.map(
                lambda *leaves: np.stack(leaves), *map(row_of, rows[start : start + per_step])
            )
            batches.append((self.trainer.to_device(stacked), int((stacked.segment_ids != 0).sum())))
        return self.trainer.compile(batches[0][0], limits.label_tokens), batches

    def run(self, case: str, first: int, count: int) -> tuple[float, int, float]:
        """(seconds, useful tokens, the last loss) of `count` steps from batch `first` on."""
        compiled, batches = self.cases[case]
        chosen = [batches[i % len(batches)] for i in range(first, first + count)]
        begin = time.perf_counter()
        for batch, _ in chosen:
            value = self.trainer.run(compiled, batch)
        return time.perf_counter() - begin, sum(tokens for _, tokens in chosen), value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attention", default="auto", help="backend (config key model.attention)")
    parser.add_argument("--row-length", type=int, default=1024, help="of packed rows")
    parser.add_argument("--devices", type=int, default=os.cpu_count(), help="of the CPU, as mesh.cpu_devices")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        make_checkpoint(directory)
        torch, ours = (
            Side(Torch, directory),
            Side(Ours, directory, args.attention, args.row_length, args.devices),
        )
        first = [side.call("run", "fixed", 0, 1)[2] for side in (torch, ours)]  # which warms up
        if abs(first[0] - first[1]) > 1e-4:
            raise SystemExit(f"the first losses differ: torch {first[0]}, ours {first[1]}")
        speeds: dict[str, tuple[list[float], list[float]]] = {}
        for case, (theirs, steps) in CASES.items():
            turns = [(torch, name) for name in theirs] + [(ours, case)]
            found: list[list[float]] = [[] for _ in turns]
            for number in range(args.rounds):
                for (side, name), speed in zip(turns, found, strict=True):
                    seconds, tokens, _ = side.call("run", name, steps * number, steps)
                    speed.append(tokens / seconds)
            speeds |= {name: (speed, found[-1]) for name, speed in zip(theirs, found[:-1], strict=True)}
        torch.close()
        ours.close()
    lines = [
        "| batches | torch, useful tokens/s | ours, useful tokens/s | ratio |",
        "|---|---:|---:|---:|",
    ]
    for case, (theirs, mine) in speeds.items():
        ratios = [one / other for one, other in zip(mine, theirs, strict=True)]
        lines.append(
            f"| {case} | {page.spread(theirs, 0)} | {page.spread(mine, 0)} | {page.spread(ratios)} |"
        )
    table = "\n".join(lines)
    print(table)
    if args.write:
        about = __doc__.split("\n\n", 2)[2]
        setting = (
            f"Median (least–greatest) of {args.rounds} rounds, `attention={args.attention}`, packed rows of "
            f"{args.row_length}, the CPU as {args.devices} devices; {page.machine('jax', 'torch', 'transformers')}."
        )
        page.write_section("train_vs_torch", "## Training against torch", about, setting, table)


if __name__ == "__main__":
    main()
