"""The multimodal LLM: vision encoder -> connector -> decoder, behind a functional boundary."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mllm_jax import connectors
from mllm_jax.connectors.base import VisionFeatures
from mllm_jax.models.decoder import Cache, Decoder, DecoderConfig, init_cache
from mllm_jax.models.features import stack, unstack
from mllm_jax.models.fused import FusedVisionConfig, vision_encoder
from mllm_jax.models.lora import LoRA
from mllm_jax.models.vit import VisionConfig

Params = dict[str, Any]
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the model's computation (hashable).

    Attributes:
      image_size: input pixels per side.
      select_layer: hidden state that is the feature F; may be negative.
      connector: exact name; connector_options: (key, value) pairs.
      dtype: computation dtype.
      param_dtype: dtype of freshly initialised parameters.
      remat: rematerialisation of decoder blocks ("none", "full", "dots"); vision_remat: of encoder blocks.
      lora: scale and dropout of the adapters, if the parameters hold any (`lora.add`).
    """

    vision: VisionConfig | FusedVisionConfig
    llm: DecoderConfig
    image_size: int
    select_layer: int = -2
    connector: str = "mlp2x_gelu"
    connector_options: tuple[tuple[str, Any], ...] = ()
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "full"
    vision_remat: str = "full"
    attention: str = "xla"
    lora: LoRA | None = None

    @property
    def vision_spec(self) -> connectors.VisionSpec:
        """What the connector is told of the encoder."""
        return connectors.VisionSpec(
            width=self.vision.width,
            depth=self.vision.depth,
            select_layer=self.vision.resolve_layer(self.select_layer),
            grid=self.vision.grid(self.image_size),
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

    @functools.cached_property
    def tokens_per_image(self) -> int:
        """M: visual tokens of one image slot; plain Python, used by the data pipeline."""
        return self.make_connector().num_tokens(self.vision_spec.grid)


class MLLM(nn.Module):
    """Parameters: `vision`, `connector`, `llm`."""

    config: ModelConfig

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
        self.llm = Decoder(cfg.llm, dtype, param_dtype, cfg.remat, cfg.attention, cfg.lora)

    def encode_images(
        self, images: Array, image_mask: Bool[Array, "B I"], deterministic: bool = True
    ) -> Float[Array, "B IM D"]:
        """Visual tokens of every slot, I*M per row; empty slots give zeros.

        Args:
          images: uint8[B, I, S, S, 3], or float and already normalised.
          image_mask: which slots hold an image.
        """
        features = self.vision(images.reshape(-1, *images.shape[2:]))
        return self._connect(features, image_mask, deterministic)

    def features(self, images: Array) -> Float[Array, "B F N C"]:
        """What the tower gives the connector, as one array: what a feature cache keeps of pictures [B, S, S, 3]."""
        return stack(self.vision(images), self.connector.request())

    def connect_features(
        self, stacked: Float[Array, "B I F N C"], image_mask: Bool[Array, "B I"], deterministic: bool = True
    ) -> Float[Array, "B IM D"]:
        """`encode_images` from features that were computed before; the tower is not run."""
        features = stacked.reshape(-1, *stacked.shape[2:]).astype(self.config.dtype)
        spec, request = self.config.vision_spec, self.connector.request()
        return self._connect(unstack(features, request, spec.grid), image_mask, deterministic)

    def _connect(
        self, features: VisionFeatures, image_mask: Bool[Array, "B I"], deterministic: bool
    ) -> Float[Array, "B IM D"]:
        tokens = self.connector(features, deterministic)
        tokens = tokens * image_mask.reshape(-1, 1, 1).astype(tokens.dtype)
        return tokens.reshape(image_mask.shape[0], -1, tokens.shape[2])

    def embed(
        self, tokens: Int[Array, "B T"], visual_index: Int[Array, "B T"], visual: Float[Array, "B IM D"]
    ) -> Float[Array, "B T D"]:
        """Token embeddings with visual tokens put where `visual_index` >= 0."""
        index = jnp.maximum(visual_index, 0)[..., None]
        at_place = jnp.take_along_axis(visual, index, axis=1)
        return jnp.where(visual_index[..., None] >= 0, at_place, self.llm.embed(tokens))

    def hidden_states(self, batch: Batch, cache: Cache | None = None, deterministic: bool = True):
        """Final-normed hidden states [B, T, D] and the cache, for a Batch of the design's contract.

        A batch may hold `features` in place of `images`.
        """
        if "features" in batch:
            visual = self.connect_features(batch["features"], batch["image_mask"], deterministic)
        else:
            visual = self.encode_images(batch["images"], batch["image_mask"], deterministic)
        embeddings = self.embed(batch["tokens"], batch["visual_index"], visual)
        return self.llm(embeddings, batch["positions"], batch["segment_ids"], cache)

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


def example_batch(config: ModelConfig, batch: int = 1, length: int = 8) -> Batch:
    """Zeros of the right shapes, for initialisation."""
    ints = jnp.zeros((batch, length), jnp.int32)
    return {
        "tokens": ints,
        "positions": ints,
        "segment_ids": ints,
        "visual_index": ints - 1,
        "images": jnp.zeros((batch, 1, config.image_size, config.image_size, 3), jnp.uint8),
        "image_mask": jnp.zeros((batch, 1), bool),
    }


def init(config: ModelConfig, rng: Array) -> Params:
    """Random parameters as a plain nested dict."""
    return MLLM(config).init(rng, example_batch(config))["params"]


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, without computing anything."""
    return jax.eval_shape(lambda key: init(config, key), jax.random.key(0))


def apply(
    config: ModelConfig,
    params: Params,
    *args,
    method: str | Callable[..., Any] | None = None,
    rngs=None,
    **kwargs,
):
    """Calls a method of `MLLM` as a pure function of `params`.

    Args:
      method: its name, or a function that takes the bound module first; None = all logits.
    """
    return MLLM(config).apply({"params": params}, *args, method=method, rngs=rngs, **kwargs)


def empty_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """A decode cache in the computation dtype."""
    return init_cache(config.llm, batch, length, jnp.dtype(config.dtype))
