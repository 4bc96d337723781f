"""Recipe of the mini vision tower and the mini LLM that ship in the package.

    mllm-jax foundation --config configs/mini_foundation.py --workdir runs/foundation

takes about an hour and a half on two CPU cores; `--only tower` or `--only llm` runs one part. A stopped run goes on
where it was. The shipped LLM is this recipe's; the shipped tower is of an earlier one (docs/results.md).
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
                # (step, weight in the loss): where things are is learned first, then what they are
                "emphasis": {
                    "digit": ((600, 1), (700, 4)),
                    "word": ((600, 1), (700, 2)),
                    "shape": ((1600, 1), (1620, 4)),
                },
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
                    # (step, share of the rates), straight lines between; the loss hardly falls at a constant rate
                    "schedule": (
                        (0, 0),
                        (50, 1),
                        (100, 1),
                        (600, 0.87),
                        (1200, 0.609),
                        (1600, 0.3224),
                        (1950, 0),
                    ),
                    "b2": 0.98,
                    "weight_decay": 0.01,
                    "log_every": 50,
                    "save_every": 100,
                },
            },
            "llm": {
                "seed": 0,
                "first_text": 10_000_000,  # scenes that the tower never sees
                # short contexts first: looking words up is learned there many times sooner
                "phases": (
                    _phase(250, rows=26, length=192, things=2, grids=(6,)),
                    _phase(1000, rows=26, length=192, things=9, grids=(6,)),
                    _phase(4350, rows=16, length=320, things=9, grids=(6, 8, 12)),
                ),
                "embedding_std": 0.1,
                "geometry": {
                    "width": 128,
                    "depth": 4,
                    "heads": 4,
                    "kv_heads": 2,
                    "head_width": 32,
                    "mlp_width": 384,
                    "max_positions": 2048,
                },
                "fit": {
                    # AdamW learned to look words up in the context many times more slowly
                    "optimizer": "muon",
                    "learning_rate": 5e-4,
                    "matrix_learning_rate": 0.02,
                    # Most is learned below a third of the highest rates.
                    "schedule": ((0, 0), (50, 1), (400, 1), (1000, 0.35), (5600, 0)),
                    "b2": 0.98,
                    "weight_decay": 0.1,
                    "log_every": 25,
                    "save_every": 100,
                },
            },
        }
    )


def _phase(steps: int, *, rows: int, length: int, things: int, grids: tuple[int, ...]) -> dict:
    """A phase of the LLM, see `foundation.text.phased_batches`; short rows get short sentences."""
    return {
        "steps": steps,
        "batch": rows,
        "length": length,
        "context_weight": 0.02,
        "notes": 0.9,
        "short": length < 320,
        "things": things,
        "grids": grids,
        "questions": 6,
        "describe": 0.1,
        "describe_weight": 0.1,
    }
