"""What the shipped mini LLM answers about scenes that it reads as notes, by question form: no image, no tower.

    python benchmarks/notes_accuracy.py --scenes=100

The scenes are of a seed that the LLM was not trained on. Each question is asked open and as multiple choice; an answer
counts as right when every one of its tokens is the likeliest next one, which is what greedy decoding would say.
"""

import argparse
import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import interop
from mllm_jax.data.conversations import Turn, render
from mllm_jax.data.layout import Slot, WholeImage
from mllm_jax.data.tokens import encode_sample
from mllm_jax.mini.foundation.notes import NotedSample, cells, turns_of
from mllm_jax.mini.foundation.text import layout_notes
from mllm_jax.mini.foundation.train import note_embeddings
from mllm_jax.mini.world import make_questions, prompt_choice, prompt_open, sample_scene
from mllm_jax.models.decoder import Decoder

SEED = 90_001  # of the scenes; the recipe's is 0
GRID, LENGTH, BATCH = 12, 256, 32


def noted_questions(tokenizer, scenes):
    """Yields (question form, sample) of every question about the scenes, open and as multiple choice."""
    for index in range(scenes):
        rng = np.random.default_rng([SEED, index])
        scene = sample_scene(SEED, index, "foundation")
        bags = cells(scene, GRID, rng, tokenizer)
        note = WholeImage(Slot(len(bags)))()  # it stands for an image
        for question in make_questions(scene, rng):
            for prompt in (prompt_open(question), prompt_choice(question)):
                turns = turns_of([(prompt, question.answer)])
                turns[0] = Turn("human", ("", "\n" + prompt))
                encoded = encode_sample(render("mini", turns), tokenizer, [note], sample=str(index))
                yield question.form, NotedSample(encoded, bags)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=100)
    args = parser.parse_args()
    tokenizer, decoder = interop.load_tokenizer("mini"), Decoder(interop.llm_config("mini"))
    params = interop.load_llm("mini")

    @jax.jit
    def answers_right(params, batch):
        apply = functools.partial(decoder.apply, {"params": params})
        embeddings = apply(batch["tokens"], method="embed")
        notes = note_embeddings(apply, batch)
        embeddings = jnp.where((batch["visual_index"] >= 0)[..., None], notes, embeddings)
        hidden, _ = apply(embeddings, batch["positions"], batch["segment_ids"])
        best = apply(hidden[:, :-1], method="logits").argmax(-1)
        return ((best == batch["tokens"][:, 1:]) | (batch["loss_weights"][:, 1:] == 0)).all(-1)

    right, asked = collections.Counter(), collections.Counter()
    questions = list(noted_questions(tokenizer, args.scenes))
    for start in range(0, len(questions), BATCH):
        some = questions[start : start + BATCH]
        rows = [layout_notes([sample], LENGTH) for _, sample in some]
        rows += [rows[-1]] * (BATCH - len(rows))
        batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        found = np.asarray(answers_right(params, batch | {"noise_seed": np.int32(start)}))
        for (form, _), value in zip(some, found, strict=False):
            asked[form] += 1
            right[form] += int(value)
    print(f"{sum(asked.values())} answers about {args.scenes} scenes in notes of {GRID} x {GRID} cells\n")
    print("| question form | n | right % |\n|---|---:|---:|")
    for form in sorted(asked, key=lambda form: -right[form] / asked[form]):
        print(f"| {form} | {asked[form]} | {100 * right[form] / asked[form]:.1f} |")


if __name__ == "__main__":
    main()
