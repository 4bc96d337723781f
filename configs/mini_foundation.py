"""Recipe of the mini vision tower and the mini LLM that ship in the package.

    mllm-jax foundation --config configs/mini_foundation.py --workdir runs/foundation

takes about three hours of processor time; `--only tower` or `--only llm` runs one part, with one core each they can
run at once. A stopped run goes on where it was. The shipped tower and LLM are this recipe's (docs/results.md).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "tokenizer": {"vocab": 1024, "samples": 4000, "seed": 0},
            "tower": {
                "seed": 0,
                "first_picture": 0,
                # 84 px is the quarter-scale counterpart of 336; the others are seen too, so that the interpolated
                # position table works at each of them.
                "sizes": (84, 56, 112),
                "pictures": (24000, 4000, 4000),
                "dense": 0.7,  # share of crowded scenes; most patches of the others show no thing
                "shares": (6, 1, 1),  # batches of each size in a cycle
                "batch": 32,
                # Where things are is learned first, then what is written on cards, then what is hard to tell beside it.
                # `cards`: shares of digits and words among the things of crowded scenes. `rates`: (step, share of the
                # rates), straight lines between; the loss hardly falls at a constant rate. `emphasis`: (step, weight in
                # the loss). A label on the mean of the patches, as "position" is, slows all else down when it comes
                # first.
                "phases": (
                    {
                        "cards": (0.6, 0.15),
                        "rates": ((0, 0), (50, 1), (100, 1), (600, 0.87), (1200, 0.609), (1600, 0.3224)),
                        "emphasis": {
                            "digit": ((600, 1), (700, 4)),
                            "word": ((600, 1), (700, 2)),
                            "position": ((0, 0),),
                        },
                    },
                    {
                        "cards": (0.45, 0.15),
                        "rates": ((0, 0.5), (1200, 0)),
                        "emphasis": {
                            "digit": ((0, 4),),
                            "word": ((0, 2),),
                            "shape": ((0, 1), (20, 4)),
                            "position": ((0, 0), (50, 0.25), (500, 0.25), (520, 1)),
                        },
                    },
                ),
                "geometry": {
                    "width": 128,
                    "depth": 6,
                    "heads": 4,
                    "mlp_width": 512,
                    "patch": 7,
                    "image_size": 84,
                },
                "fit": {
                    "optimizer": "muon",
                    "learning_rate": 2e-3,
                    "matrix_learning_rate": 0.02,
                    "b2": 0.98,
                    "weight_decay": 0.01,
                    "log_every": 50,
                    "save_every": 100,
                },
            },
            "llm": {
                "seed": 0,
                "first_text": 10_000_000,  # scenes that the tower never sees
                # An answer about one of several things takes steps that are of no use without each other: fetch the
                # words of its name, look the thing up, carry what is found to the end of the prompt. Drills need them
                # one at a time (`foundation.notes.drill`), in short notes; each phase ends when its answers are right.
                "phases": (
                    _phase(
                        2000,
                        until=0.88,
                        rates=((0, 0), (30, 1), (800, 1), (2000, 0.3)),
                        rows=8,
                        length=160,
                        things=3,
                        grids=(3, 4),
                        questions=18,
                        abilities=LOOKUPS,
                        drill=1.0,
                    ),
                    _phase(
                        2000,
                        until=0.9,
                        rates=((0, 1), (400, 1), (2000, 0.3)),
                        rows=12,
                        length=192,
                        things=5,
                        grids=(3, 4),
                        questions=12,
                        abilities=LOOKUPS,
                        drill=0.5,
                    ),
                    _phase(
                        2000,
                        until=0.9,
                        rates=((0, 0.7), (2000, 0.3)),
                        rows=16,
                        length=224,
                        grids=(4, 6),
                        questions=10,
                        drill=0.3,
                        bare=0.7,
                        crowded=0.4,
                    ),
                    _phase(
                        4000,
                        rates=((0, 0.5), (4000, 0)),
                        rows=16,
                        length=320,
                        grids=(6, 8, 12),
                        questions=8,
                        drill=0.1,
                        bare=0.4,
                        crowded=0.25,
                        keep=0.85,
                        notes=0.9,
                        describe=0.1,
                    ),
                ),
                "embedding_std": 0.1,
                "geometry": {
                    "width": 128,
                    "depth": 4,
                    "heads": 4,
                    "kv_heads": 4,
                    "head_width": 32,
                    "mlp_width": 336,
                    # With 1e4 six of a head's 16 channel pairs turn by less than a radian over a note of 12 x 12 cells
                    # and a question, with 1e6 nine: those are the ones that compare words whatever their distance.
                    "rope_theta": 1e6,
                    "tied": True,
                    "max_positions": 2048,
                },
                "fit": {
                    # AdamW learned to look words up in the context many times more slowly
                    "optimizer": "muon",
                    "learning_rate": 5e-4,
                    "matrix_learning_rate": 0.02,
                    "b2": 0.98,
                    "weight_decay": 0.1,
                    "log_every": 25,
                    "save_every": 100,
                },
            },
        }
    )


LOOKUPS = ("localization", "attribute", "reading", "structured_reading")


def _phase(steps: int, *, rows: int, length: int, until: float | None = None, **others) -> dict:
    """A phase of the LLM, see `foundation.text.packed_batches`; short rows get short sentences.

    Args:
      until: share of the answers that are right, at which it ends.
    """
    return {
        "steps": steps,
        "until": None if until is None else ("answer_accuracy", until),
        "batch": rows,
        "length": length,
        "context_weight": 0.02,
        "notes": 1.0,
        "short": length < 320,
        "things": 9,
        "crowded": 0.5,
        "keep": 1.0,
        "abilities": (),
        "bare": 1.0,
        "describe": 0.0,
        "describe_weight": 0.1,
        **others,
    }
