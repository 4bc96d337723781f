"""Greedy answers per second against transformers' `generate` in torch, from the same weights, images and prompts.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/generate_vs_torch.py --write
    python benchmarks/generate_vs_torch.py --cases "fixed, batch 8" --store=it.json    # in parts, kept in a file
    python benchmarks/generate_vs_torch.py --cases --store=it.json --write             # from the file alone

Both sides compute in float32 on all cores and with huge pages, from image pixels and token ids to the ids of the
answers; two processes take turns in one run. The model (`tiny_llava.py`) has 18 M parameters and makes 144 visual
tokens of an image. **The answers must be the same, token for token**, or the script stops. Cases:

* `fixed`: every row has its own image and a question of 36 to 84 tokens, and gets 128 tokens.
* `answering`: a benchmark end to end: 128 questions about 16 images, 16 tokens an answer. torch's batches are sorted by
  length; it encodes an image for every question, as `generate` does.
"""

import argparse
import json
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import page
from tiny_llava import IMAGE, SIDE, VISUAL, make_checkpoint
from turns import Side

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Case(NamedTuple):
    """Questions, images they are about in turn, rows of a batch, tokens of an answer."""

    questions: int
    images: int
    batch_size: int
    new_tokens: int


CASES = {
    "fixed, batch 1": Case(1, 1, 1, 128),
    "fixed, batch 8": Case(8, 8, 8, 128),
    "fixed, batch 64": Case(64, 64, 64, 128),
    "answering, batch 8": Case(128, 16, 8, 16),
    "answering, batch 64": Case(128, 16, 64, 16),
}


def make_images(case: Case) -> np.ndarray:
    """uint8[images, SIDE, SIDE, 3]."""
    return np.random.default_rng(1).integers(0, 256, (case.images, SIDE, SIDE, 3), np.uint8)


def make_prompts(case: Case) -> list[np.ndarray]:
    """Token ids: 32 of a template, an image, the question and 4 more."""
    rng = np.random.default_rng(2)
    template = rng.integers(3, IMAGE, 36)
    lengths = rng.integers(4, 53, case.questions)
    return [
        np.concatenate([template[:32], [IMAGE] * VISUAL, rng.integers(3, IMAGE, length), template[32:]])
        for length in lengths
    ]


class Torch:
    """transformers' LLaVA, SDPA, left-padded batches."""

    def __init__(self, directory: str):
        import torch
        import transformers

        self.torch = torch
        self.model = transformers.LlavaForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    def run(self, name: str) -> tuple[float, list[list[int]]]:
        """(seconds, the answers' ids)."""
        case = CASES[name]
        prompts, images = make_prompts(case), make_images(case)
        pixels = (images / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
        pixels = self.torch.tensor(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        order = sorted(range(case.questions), key=lambda index: len(prompts[index]))
        answers: list[list[int]] = [[]] * case.questions
        begin = time.perf_counter()
        for start in range(0, case.questions, case.batch_size):
            chosen = order[start : start + case.batch_size]
            longest = max(len(prompts[index]) for index in chosen)
            ids = np.zeros((len(chosen), longest), np.int64)
            mask = np.zeros_like(ids)
            for row, index in enumerate(chosen):
                prompt = prompts[index]
                ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
            with self.torch.inference_mode():
                found = self.model.generate(
                    input_ids=self.torch.tensor(ids),
                    attention_mask=self.torch.tensor(mask),
                    pixel_values=pixels[[index % case.images for index in chosen]],
                    do_sample=False,
                    max_new_tokens=case.new_tokens,
                    eos_token_id=None,
                    pad_token_id=0,
                ).tolist()
            for index, row in zip(chosen, found, strict=True):
                answers[index] = row[longest:]
        seconds = time.perf_counter() - begin
        return seconds, answers


class Ours:
    """This library's `generate`, as the benchmarks and `Model.generate` call it."""

    def __init__(self, directory: str):
        from mllm_jax.interop.checkpoints import load_model

        self.config, self.params, _ = load_model(directory)

    def run(self, name: str) -> tuple[float, list[list[int]]]:
        """(seconds, the answers' ids)."""
        from mllm_jax.inference.generate import generate

        case = CASES[name]
        images = make_images(case)
        requests = [self._request(i, prompt, case) for i, prompt in enumerate(make_prompts(case))]
        begin = time.perf_counter()
        found = generate(
            self.config,
            self.params,
            requests,
            _NoText(),
            load_image=lambda index, _: images[index][None],
            max_new_tokens=case.new_tokens,
            batch_size=case.batch_size,
            stop_ids=[],
        )
        answers = [list(answer.tokens) for answer in found]
        return time.perf_counter() - begin, answers

    def _request(self, index: int, prompt: np.ndarray, case: Case) -> Any:
        from mllm_jax.data.tokens import EncodedSample
        from mllm_jax.inference.batching import Request

        visual = prompt == IMAGE
        sample = EncodedSample(
            sample=f"{index}",
            tokens=np.where(visual, 0, prompt).astype(np.int32),
            loss_weights=np.zeros(len(prompt), np.float32),
            visual_index=np.where(visual, np.cumsum(visual) - 1, -1).astype(np.int32),
            image_of=np.where(visual, 0, -1).astype(np.int32),
            layouts=(self.config.visual_layout(lambda: (SIDE, SIDE)),),
        )
        return Request(f"{index}", sample, (index % case.images,))


class _NoText:
    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return ""


def measure(cases: list[str], rounds: int) -> Iterator[tuple[str, list[list[float]]]]:
    """Of each case: tokens of the answers, torch's seconds and ours, in turn."""
    with tempfile.TemporaryDirectory() as directory:
        make_checkpoint(directory)
        torch, ours = Side(Torch, directory), Side(Ours, directory)
        for name in cases:
            wanted, mine = (side.call("run", name)[1] for side in (torch, ours))  # this also warms up
            if differing := [
                i for i, pair in enumerate(zip(wanted, mine, strict=True)) if pair[0] != pair[1]
            ]:
                raise SystemExit(f"{name}: the answers of rows {differing} differ")
            theirs, own = [], []
            for _ in range(rounds):
                theirs.append(torch.call("run", name)[0])
                own.append(ours.call("run", name)[0])
            yield name, [[len(answer) for answer in mine], theirs, own]
        torch.close()
        ours.close()


def row(name: str, lengths: list[int], theirs: list[float], own: list[float]) -> tuple[str, ...]:
    """A line of the table."""
    ratios = [one / other for one, other in zip(theirs, own, strict=True)]
    shown = f"{np.mean(lengths):.0f} ({min(lengths)}–{max(lengths)})"
    return name, shown, page.spread(theirs), page.spread(own), page.spread(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES, metavar="CASE")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    parser.add_argument(
        "--store", type=pathlib.Path, help="JSON file: keep the measurements, and go on from it"
    )
    args = parser.parse_args()
    found: dict[str, list[list[float]]] = {}  # by case: tokens of the answers, torch's seconds, our seconds
    if args.store and args.store.exists():
        found = json.loads(args.store.read_text(encoding="utf-8"))
    if args.cases:
        for name, taken in measure(args.cases, args.rounds):
            found[name] = taken
            print(*row(name, *taken), sep=" | ", flush=True)
            if args.store:
                args.store.write_text(json.dumps(found), encoding="utf-8")
    rows = [row(name, *found[name]) for name in CASES if name in found]
    head = ("case", "tokens of an answer: mean (range)", "torch, s", "ours, s", "torch / ours")
    if args.write:
        about = __doc__.split("\n\n", 2)[2]
        setting = (
            f"Median (least–greatest) of the rounds, what is compiled kept in memory; "
            f"{page.machine('jax', 'torch', 'transformers')}."
        )
        page.write_section(
            "generate_vs_torch", "## Greedy decoding against torch", about, setting, page.table(head, rows)
        )


if __name__ == "__main__":
    main()
