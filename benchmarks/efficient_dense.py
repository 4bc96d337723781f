"""What the efficient Dense Connector saves: visual tokens, prefill operations, cache and time, beside other connectors.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/efficient_dense.py --write

Operations and cache are counted for Vicuna-7B in bfloat16 that reads one image or video and 64 tokens of text: tower,
connector and all blocks of the LLM, and the head at the last position. The tower is CLIP ViT-L/14-336, or SigLIP where
the table says so. Efficient `dci` is Dense Connector's reduction behind the MLP, 24 x 24 tokens of a slot to 12 x 12
(SigLIP: 27 x 27 to 13 x 13); the two compressing connectors make as many. AnyRes is an image of 672 x 672 pixels: the
whole image and four tiles, in the layout `spatial_unpad`. A video is 8 frames, of whose tokens every two are pooled.

The time is measured with the mini tower and the mini LLM (random weights; 12 x 12 patches a slot in place of 24 x 24,
13 x 13 in place of 27 x 27), of what answering computes before the question: images, connector, and all visual tokens
into the cache.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import page

from mllm_jax import interop
from mllm_jax.data.anyres import Tiles
from mllm_jax.data.chat_template import resolve_template
from mllm_jax.data.conversations import Turn
from mllm_jax.data.layout import VisualLayout
from mllm_jax.data.tokens import encode_prompt
from mllm_jax.data.video_layout import Video
from mllm_jax.inference.batching import lay_out
from mllm_jax.inference.prefill import prefill_limit, without_remat
from mllm_jax.inference.prefixes import compute_prefixes
from mllm_jax.interop.published import shipped_geometry
from mllm_jax.mini.connectors import mini_options
from mllm_jax.models import mllm
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.training.flops import batch_counts, step_flops

LLM, MINI = "lmsys/vicuna-7b-v1.5", "mini"
CLIP, SIGLIP = "openai/clip-vit-large-patch14-336", "google/siglip-so400m-patch14-384"
TEXT = 64


@dataclasses.dataclass(frozen=True)
class Input:
    """What is seen.

    Attributes:
      tower: a published one; size: its input in pixels; reduced: tokens a side of the efficient connector.
      mini_size, mini_reduced: the same of the mini tower.
      tiles: of an image of twice that size; None for a single slot.
      video: None for an image.
    """

    title: str
    tower: str = CLIP
    size: int = 336
    reduced: int = 12
    mini_size: int = 84
    mini_reduced: int = 6
    tiles: Tiles | None = None
    video: Video | None = None

    def layout(self, model: ModelConfig) -> VisualLayout:
        """Of the image or video in a model."""
        if self.video:
            return model.visual_layout.of_video(self.video.frames)
        height, width = model.slot_size
        return model.visual_layout(lambda: (2 * height, 2 * width))


INPUTS = (
    Input("CLIP-L, 336 px"),
    Input("SigLIP-SO400M, 384 px", SIGLIP, 384, 13, 91, 6),
    Input("AnyRes, CLIP-L, 672 px", tiles=Tiles()),
    Input("video, CLIP-L, 8 frames", video=Video()),
)
CONNECTORS = ("mlp2x_gelu", "dci", "efficient dci", "average_pool", "c_abstractor")


def model_of(seen: Input, connector: str, mini: bool = False) -> ModelConfig:
    """The published model, or its mini counterpart."""
    side, name, options = seen.mini_reduced if mini else seen.reduced, connector, {}
    if connector == "efficient dci":
        name, options = "dci", {"reduced_grid": (side, side)}
    elif connector in ("average_pool", "c_abstractor"):
        options = mini_options(name, side**2) if mini else {"tokens": side**2}
    with shipped_geometry():
        vision = interop.vision_config(MINI if mini else seen.tower)
        llm = interop.llm_config(MINI if mini else LLM)
    return ModelConfig(
        vision=vision,
        llm=llm,
        image_size=seen.mini_size if mini else seen.size,
        connector=name,
        connector_options=tuple(sorted(options.items())),
        dtype="float32" if mini else "bfloat16",
        tiles=seen.tiles,
        video=seen.video,
    )


def counted(seen: Input, connector: str) -> tuple[int, int, float, float]:
    """Visual tokens of a slot and of the whole, operations of the prefill, and bytes of the cache."""
    model = model_of(seen, connector)
    layout, llm = seen.layout(model), model.llm
    positions = layout.num_tokens + TEXT
    flops = step_flops(model, {}, mllm.abstract_params(model))
    counts = batch_counts(model, 1, positions, 1, len(layout.slots))
    cache = 2 * jnp.dtype(model.dtype).itemsize * llm.depth * llm.kv_heads * llm.head_width * positions
    return layout.slots[0].num_tokens, layout.num_tokens, flops.forward_flops(counts), cache


class Prefill:
    """The mini counterpart, with an image or video of noise."""

    def __init__(self, seen: Input, connector: str):
        self.model = without_remat(model_of(seen, connector, mini=True))
        self.params = jax.jit(lambda key: mllm.init(self.model, key))(jax.random.key(0))
        layout, tokenizer = seen.layout(self.model), interop.load_tokenizer(MINI)
        turn = Turn("human", ("", "\n"))
        prompt = encode_prompt(
            resolve_template(MINI, tokenizer), [turn], tokenizer, [layout], sample=connector
        )
        end = int(np.flatnonzero(prompt.image_of >= 0)[-1]) + 1
        noise = np.random.default_rng(0).integers(0, 256, (1, len(layout.slots), *self.model.slot_size, 3))
        self.visual = layout.num_tokens
        self.rows = jax.device_put(
            lay_out([(prompt, 0, end)], end, 1).replace(
                images=noise.astype(np.uint8), image_mask=np.ones((1, len(layout.slots)), bool)
            )
        )

    def seconds(self) -> float:
        """Of one."""
        begin = time.perf_counter()
        jax.block_until_ready(compute_prefixes(self.model, self.params, self.rows, prefill_limit()))
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    cases = [(seen, connector) for seen in INPUTS for connector in CONNECTORS]
    runs = [Prefill(*case) for case in cases]
    taken: list[list[float]] = [[] for _ in runs]
    for number in range(
        args.rounds + 1
    ):  # in turn, so that all meet the same machine; the first round compiles
        for run, seconds in zip(runs, taken, strict=True):
            found = run.seconds()
            if number:
                seconds.append(1e3 * found)
    lines = []
    for (seen, connector), run, seconds in zip(cases, runs, taken, strict=True):
        slot, visual, flops, cache = counted(seen, connector)
        lines.append(
            (
                seen.title if connector == CONNECTORS[0] else "",
                connector,
                f"{slot:,}",
                f"{visual:,}",
                f"{flops / 1e12:.1f}",
                f"{cache / 1e6:,.0f}",
                f"{run.visual:,}",
                page.spread(seconds, 1),
            )
        )
    head = ("", "connector", "tokens a slot", "in all", "TFLOPs", "cache, MB", "mini: in all", "mini: ms")
    table = page.table(head, lines)
    print(table)
    if args.write:
        about = __doc__.split("\n\n", 2)[2]
        setting = f"Median (least–greatest) of {args.rounds}, all in turn; {page.machine('jax')}."
        page.write_section("efficient_dense", "## The efficient Dense Connector", about, setting, table)


if __name__ == "__main__":
    main()
