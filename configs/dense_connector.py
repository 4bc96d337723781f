"""Dense Connector (arXiv 2405.13800): all blocks of the vision encoder seen by the LLM, through a two-layer MLP.

    python train.py --config=configs/dense_connector.py:llama3-8b --workdir=runs/dense_8b \
        --config.stages.pretrain.sources.main.json=blip_laion_cc_sbu_558k.json \
        --config.stages.pretrain.sources.main.images=pretrain/images \
        --config.stages.finetune.sources.main.json=llava_v1_5_mix665k.json \
        --config.stages.finetune.sources.main.images=finetune/images

The argument is the LLM: phi-2, vicuna-7b, vicuna-13b, llama3-8b (the default), yi-34b or llama3-70b. As in the paper,
the two largest are fine-tuned by LoRA and the others whole. The connector is `dci`; its siblings are
`--config.model.connector.name=sti` and `sci`, the efficient variant `--config.model.connector.dci.reduction=2`.
Vicuna sees through CLIP-L/14 at 336 and the others through SigLIP so400m/14 at 384 (which encoder the paper pairs
with which LLM is from memory); `--config.model.vision.path=... --config.model.vision.image_size=...` sets another
one.

With `-anyres` behind it (`--config=configs/dense_connector.py:yi-34b-anyres`) images are cut into tiles, and the LLM is
fine-tuned whole, as the paper's Yi-34B. Its training code is not public: canvases and rates are those of LLaVA-1.6 and
of the other models here.

    mllm-jax sweep --config=configs/dense_connector.py:mini --workdir=runs/dense_connector

is the paper's ablations at quarter scale, on two CPU cores: the same instantiations, layer sets and groups on a tower
of 6 blocks instead of 24. Without `:mini`, on Vicuna-7B with CLIP-L, and MLP and DCI with the paper's other encoders
and LLMs. `mini-rates`: see configs/preserve_or_compress.py.
"""

import pathlib

from ml_collections import ConfigDict

from mllm_jax.config import ConfigError
from mllm_jax.evaluation.study.findings import Finding, difference, faster
from mllm_jax.recipes.llava import two_stage_config
from mllm_jax.recipes.mini import study_config
from mllm_jax.sweep.overrides import Overrides, Sweep, chain, changes
from mllm_jax.sweep.rates import SUFFIX, grid, with_chosen

RATES = pathlib.Path(__file__).with_name("dense_connector_rates.json")
VALIDATION_SEED = 1  # of the questions by which learning rates are chosen; those of the study are of seed 0

ENCODERS = {
    "clip": ("openai/clip-vit-large-patch14-336", 336),
    "siglip": ("google/siglip-so400m-patch14-384", 384),
}
# LLM: its checkpoint, the encoder, the template of stage 2, whether it is fine-tuned by LoRA
LLMS = {
    "phi-2": ("microsoft/phi-2", "siglip", "phi", False),
    "vicuna-7b": ("lmsys/vicuna-7b-v1.5", "clip", "vicuna_v1", False),
    "vicuna-13b": ("lmsys/vicuna-13b-v1.5", "clip", "vicuna_v1", False),
    "llama3-8b": ("meta-llama/Meta-Llama-3-8B-Instruct", "siglip", "llama_3", False),
    "yi-34b": ("NousResearch/Nous-Hermes-2-Yi-34B", "siglip", "chatml_direct", True),
    "llama3-70b": ("meta-llama/Meta-Llama-3-70B-Instruct", "siglip", "llama_3", True),
}
ABLATED = ("clip", "vicuna-7b")
# From memory: which encoders and LLMs the paper puts together beside those of its ablations.
PAIRS = (
    ("siglip", "vicuna-7b"), ("clip", "vicuna-13b"), ("siglip", "vicuna-13b"), ("siglip", "phi-2"),
    ("siglip", "llama3-8b"), ("siglip", "yi-34b"), ("siglip", "llama3-70b"),
)  # fmt: skip

# Cell: connector and its options. Layers are the paper's, 4 to 24 of CLIP-L (the stem is its layer 1, so that layer n
# is hs[n - 1]); layer 24, the selected one, is always there. Where a tower has another depth they are in proportion.
VARIANTS = {
    "mlp2x_gelu": ("mlp2x_gelu", {}),
    "sti": ("sti", {}),
    "sti-8+16+20+24": ("sti", {"layers": (8, 16, 20)}),
    "sti-learnable": ("sti", {"learnable": True}),
    "sci": ("sci", {}),  # 8, 16, 24
    "sci-16+24": ("sci", {"layers": (16,)}),
    "sci-8+16+20+24": ("sci", {"layers": (8, 16, 20)}),
    "sci-4+8+16+24": ("sci", {"layers": (4, 8, 16)}),
    "sci-8+12+16+24": ("sci", {"layers": (8, 12, 16)}),
    "sci-learnable": ("sci", {"learnable": True}),
    "dci": ("dci", {}),  # two groups
    "dci-3groups": ("dci", {"groups": 3}),
    "dci-learnable": ("dci", {"learnable": True}),
    "dci-efficient": ("dci", {"reduction": 2}),  # a quarter of the tokens
}
MINI = ("mini", f"mini{SUFFIX}")
DEPTH = {"full": 24, "mini": 6}  # blocks up to the selected layer, the stem counted


def get_config(llm: str = "llama3-8b") -> ConfigDict:
    if llm in MINI:
        config = study_config("mlp2x_gelu")
        if llm.endswith(SUFFIX):
            config.eval.benchmarks.mini.seed = VALIDATION_SEED
        return config
    llm, anyres = llm.removesuffix("-anyres"), llm.endswith("-anyres")
    if llm not in LLMS:
        raise ConfigError(f"configs/dense_connector.py:{llm}: choose {', '.join((*LLMS, *MINI))}")
    if anyres and llm == "phi-2":
        raise ConfigError(
            "configs/dense_connector.py:phi-2-anyres: an image in tiles takes up to 3,699 tokens, and Phi-2 has 2,048 "
            "positions; choose another LLM"
        )
    return _published(llm, LLMS[llm][1], anyres)


def _published(llm: str, encoder: str, anyres: bool = False) -> ConfigDict:
    path, _, template, lora = LLMS[llm]
    config = two_stage_config(*ENCODERS[encoder], path, template, lora and not anyres)
    config.model.connector.name = "dci"
    if anyres:
        config.model.tiles.merge = "spatial_unpad"
        config.data.image_slots = 5  # the whole image and four tiles
        config.data.seq_len = 4096
        for stage in config.stages.values():
            stage.trainable += ("separators/.*",)
    return config


def get_sweep(argument: str = "llama3-8b", added: tuple[str, ...] = ()) -> Sweep:
    """The paper's tables; with the connectors `added`, with their defaults.

    Raises:
      ConfigError: they have no cells with tiles.
    """
    if argument.endswith("-anyres"):
        raise ConfigError(
            f"configs/dense_connector.py:{argument}: the paper's tables are without tiles, so there is no sweep with "
            "them; leave -anyres out"
        )
    base = get_config(argument)
    variants = {**VARIANTS, **{name: (name, {}) for name in added}}
    if argument in MINI:
        if argument.endswith(SUFFIX):
            # Learnable ones have parameters that their connector's own rate was not chosen for.
            variants = {n: each for n, each in variants.items() if n == each[0] or "learnable" in each[1]}
        cells = {name: _mini(base, *each) for name, each in variants.items()}
        return grid(cells) if argument.endswith(SUFFIX) else with_chosen(cells, RATES, "mini")
    cells = {f"{'-'.join(ABLATED)}-{name}": _full(base, *ABLATED, *each) for name, each in variants.items()}
    pairs = chain(
        *(
            {f"{encoder}-{llm}-{name}": _full(base, encoder, llm, name, {})}
            for encoder, llm in PAIRS
            for name in ("mlp2x_gelu", "dci", *added)
        )
    )
    return with_chosen(chain(cells, pairs), RATES, "full")


def get_findings(argument: str = "llama3-8b") -> list[Finding]:
    """What the paper found, as differences of cells."""
    if argument.endswith(SUFFIX):
        return []
    here = "" if argument.startswith("mini") else f"{'-'.join(ABLATED)}-"
    claims = (  # in words, one cell, the other
        ("DCI is not lower than SCI", "dci", "sci"),
        ("SCI is not lower than one layer", "sci", "mlp2x_gelu"),
        ("DCI is not lower than one layer", "dci", "mlp2x_gelu"),
        ("two groups are not lower than three", "dci", "dci-3groups"),
        ("STI is not lower than learnable STI", "sti", "sti-learnable"),
        ("SCI is not lower than learnable SCI", "sci", "sci-learnable"),
        ("DCI is not lower than learnable DCI", "dci", "dci-learnable"),
        (
            "DCI with a quarter of the tokens is not lower than one layer with all",
            "dci-efficient",
            "mlp2x_gelu",
        ),
    )
    found = [difference(claim, here + one, here + other, "all", "at least") for claim, one, other in claims]
    quicker = "DCI with a quarter of the tokens trains faster than one layer with all"
    return [*found, faster(quicker, here + "dci-efficient", here + "mlp2x_gelu", "step_seconds/finetune")]


def _mini(base: ConfigDict, connector: str, options: dict) -> Overrides:
    config = study_config(connector, options=_at_depth(options, DEPTH["mini"]))
    config.eval = base.eval
    return {"model.connector.name": connector, **changes(base, config)}


def _full(base: ConfigDict, encoder: str, llm: str, connector: str, options: dict) -> Overrides:
    config = _published(llm, encoder)
    config.model.connector.name = connector
    if options:  # a connector without options has no place for them
        config.model.connector[connector].update(_at_depth(options, DEPTH["full"]))
    return {"model.connector.name": connector, **changes(base, config)}


def _at_depth(options: dict, depth: int) -> dict:
    """The paper's layers as hidden states of a tower of this depth."""
    if "layers" not in options:
        return options
    return {**options, "layers": tuple(layer * depth // 24 - 1 for layer in options["layers"])}
