"""How many conversations a second `mllm-jax validate --tokenizer` reads, checks and counts.

    python benchmarks/validate_tokens.py --write

The text is English prose that comes with Python (`pydoc_data.topics`), the lengths are drawn as those of LLaVA-665k's
text (`packing.py`), in one or several rounds, and the tokenizer is a byte-level BPE of 8,000 tokens trained on that
prose. Reading the JSON and starting processes is part of the time. Beside it, what the tokenizer alone does in one
process with the same texts, one call a text: no way of counting could be faster.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from pydoc_data import topics

import numpy as np
import packing
import page
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from mllm_jax.data.layout import Slot, WholeImage
from mllm_jax.data.validate import Layout, validate

ROUND = 120  # tokens of a question and its answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=16_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write docs/performance.md's section")
    args = parser.parse_args()
    prose = "\n".join(topics.topics.values())
    words = prose.split()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.json"
        samples = _samples(words, args.samples)
        data.write_text(json.dumps(samples))
        tokenizer = _tokenizer(prose)
        layout = Layout("vicuna_v1", tokenizer, 2048, WholeImage(Slot(1)))
        rates: dict[int, list[float]] = {1: [], 2: []}
        alone = []
        for _ in range(args.rounds):
            alone.append(args.samples / _seconds_alone(tokenizer, samples))
            for workers, found in rates.items():
                begin = time.perf_counter()
                report = validate(data, None, layout=layout, workers=workers)
                found.append(args.samples / (time.perf_counter() - begin))
                assert len(report.counts) == report.sound + len(report.problems) == args.samples
    low, middle, high = report.stats["tokens"]
    rows = [("1, the tokenizer alone", page.spread(alone, 0))]
    rows += [(f"{workers}", page.spread(found, 0)) for workers, found in rates.items()]
    text = "## Counting tokens before training\n\nConversations a second that `mllm-jax validate --tokenizer` reads, "
    text += "checks and counts (`python benchmarks/validate_tokens.py --write`).\n\n"
    text += page.table(("processes", "samples/s"), rows)
    text += f"\n\n{args.rounds} rounds in turn over {args.samples:,} text conversations of {low} to {high:,} tokens "
    text += f"(median {middle}); {page.machine('transformers', 'tokenizers')}."
    print(text)
    if args.write:
        page.write_section("validate_tokens", text)


def _samples(words: list[str], count: int) -> list[dict]:
    """Text conversations; a word is about 1.5 tokens."""
    lengths, rng = packing.llava_like(count, visual=0)[:, 0], np.random.default_rng(0)
    samples = []
    for number, length in enumerate(lengths):
        turns = []
        for _ in range(max(1, round(length / ROUND))):
            ask, answer = (int(min(length, ROUND) * share / 1.5) + 1 for share in (0.3, 0.7))
            begin = int(rng.integers(len(words) - ask - answer))
            said = words[begin : begin + ask], words[begin + ask : begin + ask + answer]
            turns += [
                {"from": role, "value": " ".join(text)}
                for role, text in zip(("human", "gpt"), said, strict=True)
            ]
        samples.append({"id": str(number), "conversations": turns})
    return samples


def _seconds_alone(tokenizer: PreTrainedTokenizerFast, samples: list[dict]) -> float:
    """Seconds for the ids of the samples' texts, without a template."""
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    begin = time.perf_counter()
    for sample in samples:
        for turn in sample["conversations"]:
            assert encode([turn["value"]], add_special_tokens=False)[0].ids
    return time.perf_counter() - begin


def _tokenizer(prose: str) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(prose.split("\n"), 8000, special_tokens=["<s>", "</s>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")


if __name__ == "__main__":
    main()
