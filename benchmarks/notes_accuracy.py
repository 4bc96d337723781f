"""What a mini LLM answers about scenes that it reads as notes, by question form: no image, no tower.

    python benchmarks/notes_accuracy.py --scenes=100
    python benchmarks/notes_accuracy.py --llm=runs/foundation/assets/mini_llm

The scenes are of a seed that the LLM was not trained on. Each question is asked open and as multiple choice; an answer
counts as right when every one of its tokens is the likeliest next one, which is what greedy decoding would say. The
columns are for scenes with so many things beside a chart's bars: an LLM that reads every word of a note but mixes up
which belong together is right about one thing and falls off with their number.
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
from mllm_jax.mini.foundation.llm import note_embeddings
from mllm_jax.mini.foundation.notes import NotedSample, cells, turns_of
from mllm_jax.mini.foundation.text import layout_notes
from mllm_jax.mini.world import make_questions, prompt_choice, prompt_open, sample_scene
from mllm_jax.models.decoder import Decoder

SEED = 90_001  # of the scenes; the recipe's is 0
GRID, LENGTH, BATCH = 12, 256, 32
COLUMNS = ("all", "0", "1", "2", "3", "4", "5+")


def noted_questions(tokenizer, scenes):
    """Yields (form, number of things, sample) of every question about the scenes, open and as multiple choice."""
    for index in range(scenes):
        rng = np.random.default_rng([SEED, index])
        scene = sample_scene(SEED, index, "foundation")
        things = len(scene.things) - len(scene.bars)
        bags = cells(scene, GRID, rng, tokenizer)
        note = WholeImage(Slot(len(bags)))()  # it stands for an image
        for question in make_questions(scene, rng):
            for prompt in (prompt_open(question), prompt_choice(question)):
                turns = turns_of([(prompt, question.answer)])
                turns[0] = Turn("human", ("", "\n" + prompt))
                encoded = encode_sample(render("mini", turns), tokenizer, [note], sample=str(index))
                yield question.form, str(things) if things < 5 else "5+", NotedSample(encoded, bags)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--llm", default="mini", help="directory of a mini LLM (default the shipped one)")
    args = parser.parse_args()
    tokenizer, decoder = interop.load_tokenizer(args.llm), Decoder(interop.llm_config(args.llm))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), interop.load_llm(args.llm))

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
        rows = [layout_notes([sample], LENGTH) for *_, sample in some]
        rows += [rows[-1]] * (BATCH - len(rows))
        batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        found = np.asarray(answers_right(params, batch | {"noise_seed": np.int32(start)}))
        for (form, things, _), value in zip(some, found, strict=False):
            for column in ("all", things):
                asked[form, column] += 1
                right[form, column] += int(value)

    def share(form: str, column: str) -> str:
        n = asked[form, column]
        return f"{100 * right[form, column] / n:.0f} ({n})" if n else ""

    print(
        f"{len(questions)} answers about {args.scenes} scenes in notes of {GRID} x {GRID} cells: % right (n)\n"
    )
    print(f"| question form | {' | '.join(COLUMNS)} |\n|---|{'---:|' * len(COLUMNS)}")
    forms = {form for form, _ in asked}
    for form in sorted(forms, key=lambda form: (-right[form, "all"] / asked[form, "all"], form)):
        print(f"| {form} | {' | '.join(share(form, column) for column in COLUMNS)} |")


if __name__ == "__main__":
    main()
