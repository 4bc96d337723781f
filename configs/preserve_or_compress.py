"""To Preserve or To Compress (arXiv 2410.06765): five connectors, two token counts, three resolutions.

    mllm-jax sweep --config=configs/preserve_or_compress.py:mini --workdir=runs/preserve_or_compress
    mllm-jax sweep --config=configs/preserve_or_compress.py --workdir=gs://BUCKET/preserve --emit=kubernetes ...

`mini` is the study at quarter scale, on two CPU cores: 56, 84 and 112 px for 224, 336 and 448, and 16 and 36 visual
tokens for 64 and 144. `full` (the default) is CLIP-L/14 and Vicuna-7B with the two stages of LLaVA-1.5; data as for
configs/llava15.py. `mini-rates` and `full-rates` are the sweeps from which `mllm-jax study rates` chooses each
connector's learning rate, on questions of a validation split (docs/sweep.md); at full scale give them, as
`--config.eval.benchmarks.main.path=...`. `mini-longer` asks whether connectors that start from random queries or
convolutions only need more training: three times the samples of `mini`.
"""

import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from mllm_jax import connectors
from mllm_jax.evaluation.study.findings import Finding, difference, faster
from mllm_jax.recipes.llava import two_stage_config
from mllm_jax.recipes.mini import study_config
from mllm_jax.sweep.overrides import Overrides, Sweep, chain, changes
from mllm_jax.sweep.rates import SUFFIX, check_scale, grid, with_chosen

RATES = pathlib.Path(__file__).with_name("preserve_or_compress_rates.json")
VALIDATION_SEED = 1  # of the questions by which learning rates are chosen; those of the study are of seed 0

CONNECTORS = ("linear", "mlp2x_gelu", "average_pool", "q_former", "c_abstractor")
SIZES = {"full": (224, 336, 448), "mini": (56, 84, 112)}  # pixels
TOKENS = {"full": (64, 144), "mini": (16, 36)}  # of those that compress
REFERENCE = {"full": (336, 144), "mini": (84, 36)}  # where learning rates are chosen
LONGER, TIMES = "mini-longer", 3
LONG = ("mlp2x_gelu", "average_pool", "q_former", "c_abstractor")  # what trains longer

# What the paper's text and released results leave unknown (its training code is not public):
LLM = "lmsys/vicuna-7b-v1.5"  # unknown
TEMPLATE = (
    "vicuna_v1"  # unknown: its evaluation scripts name this one, and llava_llama_2 for some of the runs
)
ENCODERS = {
    224: "openai/clip-vit-large-patch14",
    336: "openai/clip-vit-large-patch14-336",
    448: "openai/clip-vit-large-patch14-336",  # unknown: its position table is interpolated here
}
SELECT_LAYER = -2  # unknown: LLaVA's
# Unknown: learning rates, batch sizes and epochs are LLaVA-1.5's. Of the connectors: average pooling in two dimensions
# before the MLP, BLIP-2's Q-Former at BERT-base's size, Honeybee's C-Abstractor, which are the options' defaults.


def get_config(scale: str = "full") -> ConfigDict:
    size = _size(scale)
    config = _config(size, "mlp2x_gelu", *REFERENCE[size])
    if scale == f"mini{SUFFIX}":
        config.eval.benchmarks.mini.seed = VALIDATION_SEED
    return config


def get_sweep(scale: str = "full", added: tuple[str, ...] = ()) -> Sweep:
    """The study's cells; with those of the connectors `added` at every size."""
    size = _size(scale)
    names, base = (*CONNECTORS, *added), get_config(scale)
    if scale.endswith(SUFFIX):
        return grid(chain(*({name: _cell(base, size, name, *REFERENCE[size])} for name in names)))
    if scale == LONGER:
        names = (*LONG, *added)
        cells = {f"{name}-{TIMES}x": _cell(base, size, name, *REFERENCE[size], TIMES) for name in names}
        return with_chosen(cells, RATES, size)
    cells: Sweep = {}
    for pixels in SIZES[size]:
        for name in names:
            compresses = "tokens" in connectors.options(name)
            for tokens in TOKENS[size] if compresses else (0,):
                title = f"{name}-{tokens}-{pixels}px" if compresses else f"{name}-{pixels}px"
                cells[title] = _cell(base, size, name, pixels, tokens)
    return with_chosen(cells, RATES, size)


def get_findings(scale: str = "full") -> list[Finding]:
    """What the paper found, as differences of cells."""
    sizes = SIZES[_size(scale)]
    if scale.endswith(SUFFIX):
        return []
    average, conv, query = "average_pool-*", "c_abstractor-*", "q_former-*"
    compressors = [
        difference("average pooling is not lower than C-Abstractor", average, conv, "all", "at least"),
        difference("C-Abstractor beats Q-Former", conv, query, "all"),
    ]
    if scale == LONGER:
        claim = "preserving beats compressing"
        return [difference(claim, "mlp2x_gelu-*", f"{average}|{conv}|{query}", "fine"), *compressors]
    kept = {px: f"linear-{px}px|mlp2x_gelu-{px}px" for px in sizes}
    compressed = {px: f"average_pool-*-{px}px|q_former-*-{px}px|c_abstractor-*-{px}px" for px in sizes}
    found = []
    for px in sizes:
        found.append(difference(f"{px} px: preserving beats compressing", kept[px], compressed[px], "fine"))
    for px in sizes:
        for group in ("coarse", "reasoning"):
            claim = f"{px} px: preserving and compressing are about as good"
            found.append(difference(claim, kept[px], compressed[px], group, "near"))
    for px in sizes:
        for what, time in (
            ("trains", "step_seconds/finetune"),
            ("reads an image and a question", "prefill_seconds"),
        ):
            found.append(faster(f"{px} px: compressing {what} faster", compressed[px], kept[px], time))
    found += compressors
    found.append(_shrinking(sizes, kept, compressed))
    if scale == "mini":
        found += _asked_later(sizes, kept)
    return found


def _shrinking(
    sizes: Sequence[int], kept: dict[int, str], compressed: dict[int, str], note: str = ""
) -> Finding:
    small, large = sizes[0], sizes[-1]
    terms = ((1, kept[small]), (-1, compressed[small]), (-1, kept[large]), (1, compressed[large]))
    return Finding(f"the gap is larger at {small} px than at {large} px{note}", terms, "fine")


def _asked_later(sizes: Sequence[int], kept: dict[int, str]) -> list[Finding]:
    """Asked after the results were seen, to tell what decides: C-Abstractor learns little here (docs/results.md)."""
    average = {px: f"average_pool-*-{px}px" for px in sizes}
    others = {px: f"{average[px]}|q_former-*-{px}px" for px in sizes}
    note, found = " (asked later, without C-Abstractor)", []
    for px in sizes:
        found.append(difference(f"{px} px: preserving beats compressing{note}", kept[px], others[px], "fine"))
    for px in sizes:
        claim = f"{px} px: preserving beats average pooling (asked later)"
        found.append(difference(claim, kept[px], average[px], "fine"))
    for px in sizes:
        claim = f"{px} px: preserving and compressing are about as good{note}"
        found.append(difference(claim, kept[px], others[px], "reasoning", "near"))
    return [*found, _shrinking(sizes, kept, others, note)]


def _size(argument: str) -> str:
    return check_scale(argument, SIZES, "configs/preserve_or_compress.py", {LONGER: "mini"})


def _cell(base: ConfigDict, size: str, connector: str, pixels: int, tokens: int, times: int = 1) -> Overrides:
    config = _config(size, connector, pixels, tokens)
    if times > 1:  # only of data that are drawn
        for stage in config.stages.values():
            for source in stage.sources.values():
                source.count *= times
    config.eval = base.eval
    return {"model.connector.name": connector, **changes(base, config)}


def _config(size: str, connector: str, pixels: int, tokens: int) -> ConfigDict:
    if size == "mini":
        return study_config(connector, pixels, tokens)
    config = two_stage_config(ENCODERS[pixels], pixels, LLM, TEMPLATE)
    config.model.vision.select_layer = SELECT_LAYER
    config.model.connector.name = connector
    if "tokens" in connectors.options(connector):
        config.model.connector[connector].tokens = tokens
    return config
