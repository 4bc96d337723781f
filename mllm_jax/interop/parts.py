"""Parts of a checkpoint (vision tower, connector, LLM): which names are theirs, in every spelling in use."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.connectors.base import FeatureRequest
from mllm_jax.interop.assemble import Placement, Report, Shape, plan
from mllm_jax.interop.families.base import Family
from mllm_jax.interop.rules import Rule
from mllm_jax.interop.source import Source
from mllm_jax.models.decoder import Decoder, DecoderConfig
from mllm_jax.models.encoders import Encoder, EncodersConfig, vision_encoder
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.models.paths import flatten

Spelling = tuple[tuple[str, str], ...]  # (their prefix, the prefix in the table), ...

TIED = "a copy of the tied embedding"  # which is checked when the checkpoint is read
# Where a tower may hang: alone, in CLIP, in llava-hf (hub, transformers 5), in LLaVA's own layout, in Honeybee.
VISION_SPELLINGS: tuple[Spelling, ...] = tuple(
    ((prefix, ""),)
    for prefix in (
        "",
        "vision_model.",
        "vision_model.vision_model.",
        "vision_tower.",
        "vision_tower.vision_model.",
        "model.vision_tower.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.vision_tower.",
        "model.vision_tower.vision_tower.vision_model.",
    )
)
# An LLM in llava-hf (hub), in transformers 5, alone or in LLaVA's own layout, without a head.
LLM_SPELLINGS: tuple[Spelling, ...] = (
    (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")),
    (("model.language_model.", "model."), ("lm_head.", "lm_head.")),
    (("model.", "model."), ("lm_head.", "lm_head.")),
    (("", "model."), ("lm_head.", "lm_head.")),
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
      path: its key in our parameters: "vision", "connector", "llm"; "" when it is the whole tree.
      what: for messages.
      rules: weight-name table; the first row tells which spelling a checkpoint uses.
      shapes: {path: shape} below `path`.
      spellings: alternatives; the part is there if exactly one of them holds the first row's tensor.
      ignored: (regex over canonical names, why).
      blocks: how many blocks its config.json says; a tensor of a further one is refused.
    """

    path: str
    what: str
    rules: tuple[Rule, ...]
    shapes: Mapping[str, Shape]
    spellings: tuple[Spelling, ...]
    ignored: tuple[tuple[str, str], ...] = ()
    blocks: int | None = None

    def key(self, path: str) -> str:
        """A path below this part, from the root."""
        return f"{self.path}/{path}" if self.path else path

    def found(self, source: Source) -> list[Spelling]:
        """The spellings under which this part is in `source`."""
        return [s for s in self.spellings if _theirs(self.rules[0].name.replace("{i}", "0"), s) in source]

    def names(self, source: Source) -> Callable[[str], str | None]:
        """Their names -> names in the table (None: another part's).

        Raises:
          ValueError: the part is not there, or twice.
        """
        found = self.found(source)
        if len(found) != 1:
            where = f"under {len(found)} prefixes" if found else "missing"
            raise ValueError(f"{source.directory}: {self.what} is {where} (tensor {self.rules[0].name!r})")

        def canonical(name: str) -> str | None:
            fits = [(theirs, ours) for theirs, ours in found[0] if name.startswith(theirs)]
            if not fits:
                return None
            theirs, ours = max(fits, key=lambda pair: len(pair[0]))
            return ours + name[len(theirs) :]

        return canonical


def _theirs(name: str, spelling: Spelling) -> str:
    for theirs, ours in spelling:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise ValueError(f"no prefix of {spelling} fits {name!r}")


def vision_shapes(config: Encoder, depth: int | None = None) -> dict[str, Shape]:
    """{path: shape} of a tower's parameters, `depth` blocks deep (all by default)."""
    tower = vision_encoder(config, FeatureRequest(hidden=(config.depth if depth is None else depth,)))
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    params = jax.eval_shape(tower.init, jax.random.key(0), image)["params"]
    return {path: leaf.shape for path, leaf in flatten(params).items()}


def llm_shapes(config: DecoderConfig) -> dict[str, Shape]:
    """{path: shape} of an LLM's parameters."""
    ints = jnp.zeros((1, 1), jnp.int32)

    def everything(decoder: Decoder) -> Any:
        hidden, _ = decoder(decoder.embed(ints), ints, ints)
        return decoder.logits(hidden)

    params = jax.eval_shape(lambda key: Decoder(config).init(key, method=everything), jax.random.key(0))[
        "params"
    ]
    return {path: leaf.shape for path, leaf in flatten(params).items()}


def vision_part(config: Encoder, family: Family, depth: int | None = None, path: str = "") -> Part:
    """The vision tower, `depth` blocks of it."""
    return Part(
        path,
        f"a {family.model_type} tower",
        family.rules(config),
        vision_shapes(config, depth),
        (*VISION_SPELLINGS, *family.spellings),
        family.ignored,
        config.depth,
    )


def vision_parts(model: ModelConfig, towers: Sequence[Family], depth: int) -> list[Part]:
    """The vision towers of a model, as deep as its hidden state `depth` needs."""
    config = model.vision
    if not isinstance(config, EncodersConfig):
        return [vision_part(config, towers[0], depth, "vision")]
    return [
        vision_part(tower, family, config.tower_layer(i, depth), f"vision/tower_{i}")
        for i, (tower, family) in enumerate(zip(config.towers, towers, strict=True))
    ]


def llm_part(config: DecoderConfig, family: Family, path: str = "") -> Part:
    """The LLM."""
    ignored = family.ignored
    if config.tied:
        ignored += ((r"lm_head\.weight", TIED),)
    return Part(
        path,
        f"a {family.model_type} LLM",
        family.rules(config),
        llm_shapes(config),
        LLM_SPELLINGS,
        ignored,
        config.depth,
    )


def plan_parts(
    source: Source, parts: Sequence[Part], neighbours: Iterable[tuple[str, str]] = ()
) -> tuple[list[Placement], dict[str, Shape], Report]:
    """Where every tensor of `source` goes when it holds exactly these parts.

    Args:
      neighbours: (regex over full source names, why) of tensors of other parts, not wanted here.

    Returns:
      Placements, {path: shape} of all parameters, and the report.

    Raises:
      ValueError: see `plan`; a part that is missing or there twice.
    """
    names = {part.path: part.names(source) for part in parts}
    rules, shapes = [], {}
    ignored: list[tuple[str, str]] = []
    for part in parts:
        rules += [
            dataclasses.replace(
                r, path=part.key(r.path), name=f"{part.path}:{r.name}", blocks=r.blocks or part.blocks
            )
            for r in part.rules
        ]
        shapes |= {part.key(path): shape for path, shape in part.shapes.items()}
        ignored += [(f"{part.path}:{regex}", why) for regex, why in part.ignored]

    def candidates(name: str) -> list[str]:
        found = ((path, canonical(name)) for path, canonical in names.items())
        return [f"{path}:{canonical}" for path, canonical in found if canonical is not None]

    placements, report = plan(source, rules, shapes, candidates, ignored, neighbours)
    return placements, shapes, report


def check_tied(source: Source, report: Report) -> None:
    """Checks that an output head which is not read, because the embedding is tied to it, equals the embedding.

    Raises:
      ValueError: it differs, so config.json does not describe this checkpoint.
    """
    for head in (name for name, why in report.ignored.items() if why == TIED):
        embedding = next(name for name in report.used if name.endswith("embed_tokens.weight"))
        if source.shape(head) != source.shape(embedding) or not np.array_equal(
            source.read(head), source.read(embedding)
        ):
            raise ValueError(
                f"{source.directory}: config.json says tie_word_embeddings, but {head!r} differs from {embedding!r}; "
                "set tie_word_embeddings to false there if this head is meant"
            )
