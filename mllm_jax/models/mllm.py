"""The multimodal LLM: vision encoder -> connector -> decoder, behind a functional boundary."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from mllm_jax import connectors
from mllm_jax.data.anyres import AnyRes, Tiles
from mllm_jax.data.batch import SEPARATOR, Batch, Size
from mllm_jax.data.layout import LayoutRule, Slot, WholeImage
from mllm_jax.data.naflex import NativeAspect
from mllm_jax.data.video_layout import Video, WithVideo
from mllm_jax.models.decoder import Cache, Decoder, DecoderConfig, init_cache
from mllm_jax.models.encoders import Encoder, EncodersConfig, vision_encoder
from mllm_jax.models.features import kept_shapes, stack, unstack
from mllm_jax.models.lora import LoRA
from mllm_jax.models.slots import for_each_slot

Params = dict[str, Any]
LATER = ("max_patches", "tiles", "video")  # fields that `ModelConfig` did not have from the beginning


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the model's computation (hashable).

    Attributes:
      image_size: pixels per side of an image slot, or (height, width): the encoder's input, or the largest of several.
      select_layer: hidden state that is the feature F; may be negative.
      connector: exact name; connector_options: (key, value) pairs.
      dtype: computation dtype.
      param_dtype: dtype of freshly initialised parameters.
      remat: rematerialisation of decoder blocks ("none", "full", "dots"); vision_remat: of encoder blocks.
      lora: scale and dropout of the adapters, if the parameters hold any (`lora.add`).
      max_patches: most patches of an image, which is seen at its own aspect ratio (NaFlex; `image_size` then means
        nothing); 0 = images are brought to `image_size`.
      tiles: how images are cut into tiles; None = every image is one slot.
      video: how videos are read; None = there are none.

    Raises:
      ValueError: settings that do not go together.

    Examples:
      The configuration of a recipe, here of the mini tower and mini LLM:

      >>> from mllm_jax.inference.runs import model_config
      >>> from mllm_jax.recipes.mini import mini_config
      >>> config = model_config(mini_config("average_pool"))
      >>> config.slot_size, config.vision_spec.grid, config.visual_layout.most_tokens, config.llm.width
      ((84, 84), (12, 12), 36, 128)
    """

    vision: Encoder | EncodersConfig
    llm: DecoderConfig
    image_size: int | Size
    select_layer: int = -2
    connector: str = "mlp2x_gelu"
    connector_options: tuple[tuple[str, Any], ...] = ()
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "full"
    vision_remat: str = "full"
    attention: str = "xla"
    lora: LoRA | None = None
    max_patches: int = 0
    tiles: Tiles | None = None
    video: Video | None = None

    def __post_init__(self):
        if self.max_patches and not getattr(self.vision, "native", False):
            raise ValueError(
                f"vision.max_patches={self.max_patches}: this encoder sees images of one size; images at their own "
                "aspect ratio need a NaFlex encoder (siglip2_vision_model) alone"
            )
        if self.tiles and (self.max_patches or self.vision.views > 1 or not self.vision.regular):
            raise ValueError(
                "tiles are of images whose slots have one grid of patches each: not with vision.max_patches, "
                "vision.split or vision.combine='tokens'"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Fields by name; `LATER` ones only where they say something, so that files and digests stay as they were."""
        fields = {
            field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)
        }
        return {name: value for name, (value, plain) in fields.items() if name not in LATER or value != plain}

    @property
    def slot_size(self) -> Size:
        """Height and width of an image slot in pixels."""
        if self.max_patches:  # one patch high, the patches one beside the other
            return (self.vision.patch, self.vision.patch * self.max_patches)
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def vision_spec(self) -> connectors.VisionSpec:
        """What the connector is told of the encoder."""
        return connectors.VisionSpec(
            width=self.vision.width,
            depth=self.vision.depth,
            select_layer=self.vision.resolve_layer(self.select_layer),
            grid=self.vision.grid(*self.slot_size),
            regular=self.vision.regular and not self.max_patches,
            mining=self.vision.mining,
            fine=self.vision.fine(self.slot_size),
        )

    def make_connector(self, module_name: str | None = None) -> connectors.Connector:
        """The configured connector, unbound."""
        return connectors.create(
            self.connector,
            self.vision_spec,
            self.llm.width,
            dict(self.connector_options),
            jnp.dtype(self.dtype),
            jnp.dtype(self.param_dtype),
            module_name,
        )

    @property
    def features_spec(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape `[F, N, C]` and dtype of each array that `MLLM.features` gives for an image slot."""
        shapes = kept_shapes(self.vision, self.make_connector().request(), self.slot_size)
        return tuple(jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype)) for shape in shapes)

    @property
    def token_grid(self) -> Size | None:
        """Rows and columns on which the tokens of an image slot stand; None where they have no place in it."""
        if self.vision.views != 1 or not self.vision.regular:
            return None
        return self.make_connector().token_grid(self.vision_spec.grid)

    @functools.cached_property
    def image_layout(self) -> LayoutRule:
        """How an image becomes visual tokens; plain Python, for whatever needs their number."""
        num_tokens = self.make_connector().num_tokens(self.vision_spec.grid) * self.vision.views
        slot = Slot(num_tokens, size=self.slot_size, native=self.max_patches > 0)
        if slot.native:
            return NativeAspect(slot, self.vision.patch)
        return AnyRes(slot, self.tiles, self.token_grid) if self.tiles else WholeImage(slot)

    @functools.cached_property
    def visual_layout(self) -> LayoutRule:
        """How images and videos become visual tokens: that of images alone, where the model reads no videos."""
        if self.video is None:
            return self.image_layout
        return WithVideo(self.image_layout, self.video, self.token_grid)


class Separators(nn.Module):
    """Learned visual tokens that stand for no place in an image.

    Attributes:
      width: D.
      param_dtype: parameter dtype.
    """

    width: int
    param_dtype: Any

    def setup(self):
        # LLaVA-NeXT's, so that it is as long as a text embedding
        self.newline = self.param(
            "newline", nn.initializers.normal(self.width**-0.5), (self.width,), self.param_dtype
        )


class MLLM(nn.Module):
    """Parameters: `vision`, `connector`, `llm`, and `separators` where images in tiles or videos have newlines.

    Attributes:
      unroll: write the LLM's blocks out in place of a loop over them, which takes longer to compile and, where what
        each block keeps is large, saves CPUs the copies of it.
    """

    config: ModelConfig
    unroll: bool = False

    def setup(self):
        cfg = self.config
        dtype, param_dtype = jnp.dtype(cfg.dtype), jnp.dtype(cfg.param_dtype)
        self.connector = cfg.make_connector()
        self.vision = vision_encoder(
            cfg.vision,
            self.connector.request(),
            dtype,
            param_dtype,
            cfg.vision_remat,
            cfg.attention,
            cfg.lora,
        )
        self.llm = Decoder(cfg.llm, dtype, param_dtype, cfg.remat, cfg.attention, cfg.lora, self.unroll)
        if cfg.visual_layout.separated:
            self.separators = Separators(cfg.llm.width, param_dtype)

    def visual_tokens(self, batch: Batch, deterministic: bool = True) -> Float[Array, "B IM D"] | None:
        """Tokens of all slots, `I * M` per row, 0 in empty slots; None for rows without slots.

        Where the batch holds `features` in place of `images`, the vision encoder is not run.
        """
        if batch.image_mask is None:
            return None

        def encode(*slots: Array) -> Float[Array, "n M D"]:
            if batch.features is None:
                features = self.vision(*slots)
            else:
                request, kept = self.connector.request(), [x.astype(self.config.dtype) for x in slots]
                features = unstack(kept, self.config.vision, request, self.config.slot_size)
            tokens = self.connector(features, deterministic)
            return tokens.reshape(
                slots[0].shape[0], -1, tokens.shape[2]
            )  # a slot's views one after the other

        given = (batch.images, batch.grids) if batch.features is None else batch.features
        tokens = for_each_slot(encode, *(slots for slots in given if slots is not None))
        tokens = tokens * batch.image_mask[..., None, None].astype(tokens.dtype)
        return tokens.reshape(tokens.shape[0], -1, tokens.shape[3])

    def features(
        self, images: UInt8[Array, "n H W 3"], grids: Int[Array, "n 2"] | None = None
    ) -> tuple[Float[Array, "n _ _ _"], ...]:
        """What the vision encoder gives the connector of each image slot: what a feature cache keeps.

        Args:
          images, grids: as in `Batch`, without rows.
        """
        given = (images,) if grids is None else (images, grids)
        return stack(self.vision(*given), self.config.vision, self.connector.request())

    def embed(self, batch: Batch, visual: Float[Array, "B IM D"] | None) -> Float[Array, "B T D"]:
        """Token embeddings, and what is made of the row's slot tokens `visual` where visual tokens stand.

        Of `batch` only `tokens` and the fields `visual_...` are read.
        """
        embeddings = self.llm.embed(batch.tokens)
        if visual is None:
            return embeddings
        index = batch.visual_index[..., None]
        embeddings = jnp.where(index >= 0, self._combined(batch, visual), embeddings)
        if self.config.visual_layout.separated:
            newline = self.separators.newline.astype(embeddings.dtype)
            embeddings = jnp.where(index == SEPARATOR, newline, embeddings)
        return embeddings

    def _combined(self, batch: Batch, visual: Float[Array, "B IM D"]) -> Float[Array, "B T D"]:
        """The visual token of every position; anything where none stands."""

        def at(index: Int[Array, "B T"]) -> Float[Array, "B T D"]:
            return jnp.take_along_axis(visual, jnp.maximum(index, 0)[..., None], axis=1)

        if batch.visual_taps is None:
            return at(batch.visual_index)
        taps = [at(batch.visual_taps[..., k]) for k in range(batch.visual_taps.shape[-1])]
        if batch.visual_weights is None:
            return functools.reduce(jnp.maximum, taps)
        weighted = (tap * batch.visual_weights[..., k, None] for k, tap in enumerate(taps))
        return sum(weighted).astype(visual.dtype)

    def hidden_states(
        self, batch: Batch, cache: Cache | None = None, deterministic: bool = True
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Final-normed hidden states, and the cache with these positions written if there is one."""
        visual = self.visual_tokens(batch, deterministic)
        embeddings = self.embed(batch, visual)
        return self.llm(embeddings, batch.positions, batch.segment_ids, cache)

    def decode(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Cache):
        """Text-only continuation: hidden states of `tokens` and the cache with them written."""
        return self.llm(self.llm.embed(tokens), positions, jnp.ones_like(tokens), cache)

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Next-token logits, float32."""
        return self.llm.logits(hidden)

    def __call__(self, batch: Batch) -> Float[Array, "B T V"]:
        """All logits; for tests and small models (training and generation never make them all)."""
        hidden, _ = self.hidden_states(batch)
        return self.logits(hidden)


def batch_spec(config: ModelConfig, *rows: int, length: int, slots: int = 1, labels: bool = False) -> Batch:
    """Shapes and dtypes of rows with images for this model; see `Batch.spec`.

    Args:
      rows: B; more numbers for further leading axes.
      length: T, positions of a row.
      slots: I, image slots of a row.
      labels: with what training needs.

    Examples:
      >>> from mllm_jax.inference.runs import model_config
      >>> from mllm_jax.recipes.mini import mini_config
      >>> batch = batch_spec(model_config(mini_config()), 2, length=256, slots=3)
      >>> batch.tokens.shape, batch.images.shape
      ((2, 256), (2, 3, 84, 84, 3))
    """
    rule = config.visual_layout
    return Batch.spec(
        *rows,
        length=length,
        slots=slots,
        image_size=rule.slot.size,
        labels=labels,
        grids=rule.slot.native,
        combination=rule.combination,
    )


def init(config: ModelConfig, rng: Array) -> Params:
    """Random parameters as a plain nested dict; the same ones whatever computes attention."""
    config = dataclasses.replace(config, attention="xla")  # also where the configured backend cannot run
    batch = jax.tree.map(jnp.asarray, batch_spec(config, 1, length=8).empty())
    return MLLM(config).init(rng, batch)["params"]


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, without computing anything.

    Examples:
      >>> from mllm_jax.inference.runs import model_config
      >>> from mllm_jax.recipes.mini import mini_config
      >>> params = abstract_params(model_config(mini_config("linear")))
      >>> sorted(params), params["connector"]["layer_0"]["kernel"].shape
      (['connector', 'llm', 'vision'], (128, 128))
    """
    return jax.tree.map(lambda leaf: leaf, _abstract_params(config))  # whoever asks may change the dicts


@functools.lru_cache(maxsize=8)  # a run asks several times, and tracing a model takes a third of a second
def _abstract_params(config: ModelConfig) -> Params:
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))  # the key too is traced: no array is made


def apply(
    config: ModelConfig,
    params: Params,
    *args,
    method: str | Callable[..., Any] | None = None,
    rngs=None,
    unroll: bool = False,
    **kwargs,
):
    """Calls a method of `MLLM` as a pure function of `params`.

    Args:
      method: its name, or a function that takes the bound module first; None = all logits.
      unroll: see `MLLM`.
    """
    return MLLM(config, unroll).apply({"params": params}, *args, method=method, rngs=rngs, **kwargs)


def empty_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """A decode cache in the computation dtype."""
    return init_cache(config.llm, batch, length, jnp.dtype(config.dtype))
