"""The connector contract: what a connector asks of the vision encoder and what it gives to the LLM."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.connectors.mining import Mining
from mllm_jax.flops import count_flops
from mllm_jax.schema import Key

OPTION = "option"  # where a field's metadata keeps its `Key`
Grid = tuple[int, int]  # patch rows, patch columns

NORM_EPS = 1e-5  # of the affine-free LayerNorm behind `FeatureRequest.normalized_means`


@dataclasses.dataclass(frozen=True)
class VisionSpec:
    """What a connector knows of the vision encoder before anything is computed.

    Attributes:
      width: C, channels of every hidden state.
      depth: L, number of blocks; hidden states are hs[0] (embeddings) to hs[L].
      select_layer: the hidden state that is "the" feature F, already resolved to 0..L
        (LLaVA's -2 of a 24-block tower is 23).
      grid: patch grid at the configured resolution; only position tables may depend on it.
      mining: what the fine features of a second encoder are mined into (`models.encoders`): "selected" F alone, "all"
        everything that is read, each on its own with the same parameters, "channels" what a connector puts side by side
        on channels (of the others: F); "" where there are none.
      regular: whether patches lie on `grid`. Otherwise (an image's own grid, several encoders' tokens) `grid` is one
        row of all patches that there is room for, and only connectors that treat each patch alone can follow.
      fine: fine features of each token's cell, and their channels; (0, 0) where there are none.

    Examples:
      >>> VisionSpec(width=1024, depth=24, select_layer=23, grid=(24, 24)).grid  # CLIP-L at 336 pixels
      (24, 24)
    """

    width: int
    depth: int
    select_layer: int
    grid: Grid
    mining: str = ""
    regular: bool = True
    fine: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class FeatureRequest:
    """Hidden states (and means over groups of them) that a connector needs.

    Attributes:
      hidden: indices k of hs[k].
      means: groups of indices; the encoder returns the mean over each group, as a running sum.
      normalized_means: groups of indices; the encoder returns the mean over each group of `normalize(hs[k])`,
        as a running sum. A LayerNorm whose scale, bias and any linear map after it are shared by the group
        can be applied to that mean instead of to each state.

    Examples:
      >>> FeatureRequest(hidden=(23,), means=((0, 1, 2), (3, 4))).deepest
      23
    """

    hidden: tuple[int, ...]
    means: tuple[tuple[int, ...], ...] = ()
    normalized_means: tuple[tuple[int, ...], ...] = ()

    @property
    def deepest(self) -> int:
        """The deepest hidden state used: blocks after it are not built."""
        grouped = (k for group in (*self.means, *self.normalized_means) for k in group)
        return max((*self.hidden, *grouped))


@flax.struct.dataclass
class VisionFeatures:
    """What the encoder returns for a `FeatureRequest`: patch tokens in row-major order.

    Attributes:
      hidden: {k: hs[k]}, each [B, N, C].
      means: one [B, N, C] per requested group.
      grid: (rows, columns), rows * columns = N.
      normalized_means: one [B, N, C] per requested group.
      fine: features of the P positions of each token's cell, of another encoder; None where there is none.
      maps: what `fine` is made of, every map [b, y, x, a] at its encoder's own resolution; also a ConvNeXt's stages.

    Examples:
      >>> features = VisionFeatures(hidden={5: jnp.ones((1, 4, 8))}, grid=(2, 2))
      >>> features.hidden[5].shape
      (1, 4, 8)
    """

    hidden: dict[int, Float[Array, "B N C"]]
    means: tuple[Float[Array, "B N C"], ...] = ()
    grid: Grid = flax.struct.field(pytree_node=False, default=(0, 0))
    normalized_means: tuple[Float[Array, "B N C"], ...] = ()
    fine: Float[Array, "B N P A"] | None = None
    maps: tuple[Float[Array, "_ _ _ _"], ...] = ()


def normalize(x: Float[Array, "*b C"]) -> Float[Array, "*b C"]:
    """LayerNorm without scale and bias: zero mean and unit variance over channels, in float32.

    Examples:
      >>> normalize(jnp.array([[1.0, 3.0]])).round(3).tolist()
      [[-1.0, 1.0]]
    """
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + NORM_EPS)


def collect(request: FeatureRequest, states: Sequence[Float[Array, "B N C"]], grid: Grid) -> VisionFeatures:
    """The meaning of a request, from a list of all hidden states hs[0], hs[1], ... of patch tokens.

    Encoders return the same without keeping all states; this is for features computed elsewhere and for
    tests.

    Args:
      states: as many as the deepest one requested needs, and one more, since hs[0] are the embeddings.
      grid: (rows, columns) of the N patches.

    Examples:
      >>> states = [jnp.full((1, 4, 8), 1.0 * k) for k in range(7)]
      >>> found = collect(FeatureRequest(hidden=(5,), means=((1, 2, 3),)), states, grid=(2, 2))
      >>> float(found.hidden[5].max()), float(found.means[0].max())
      (5.0, 2.0)
    """
    dtype = states[0].dtype

    def mean(group: tuple[int, ...], of: Any) -> Array:
        return (sum(of(states[k]) for k in group) / len(group)).astype(dtype)

    return VisionFeatures(
        hidden={k: states[k] for k in request.hidden},
        means=tuple(mean(group, lambda x: x.astype(jnp.float32)) for group in request.means),
        grid=grid,
        normalized_means=tuple(mean(group, normalize) for group in request.normalized_means),
    )


def option(default: Any, **declaration: Any) -> Any:
    """A connector's field with choices or a range that its default does not tell.

    Args:
      declaration: fields of `mllm_jax.schema.Key`.

    Examples:
      >>> class Pool(Connector):
      ...     mode: str = option("2d", choices=("1d", "2d"))
      >>> Pool.mode
      '2d'
    """
    return dataclasses.field(default=default, metadata={OPTION: Key(default, **declaration)})


class Connector(nn.Module):
    """Base of all connectors. Subclasses live in one file each and stand in the table of `connectors`.

    The fields below are given by the model; a subclass adds its options as further fields, each with a
    default, and these (and only these) are what `config.model.connector.<name>` may set. `option` declares
    choices or a range.

    Attributes:
      vision: the encoder.
      width: D, width of the LLM's embeddings.
      dtype: computation dtype.
      param_dtype: parameter dtype.

    Examples:
      >>> class Mean(Connector):
      ...     "One token: the mean of all patches."
      ...
      ...     @nn.nowrap
      ...     def num_tokens(self, grid):
      ...         return 1
      ...
      ...     @nn.compact
      ...     def __call__(self, features, deterministic=True):
      ...         mean = self.selected(features).mean(axis=1, keepdims=True)
      ...         return nn.Dense(self.width)(mean)
      >>> mean = Mean(vision=VisionSpec(width=8, depth=6, select_layer=5, grid=(2, 2)), width=12)
      >>> features = VisionFeatures(hidden={5: jnp.ones((3, 4, 8))}, grid=(2, 2))
      >>> tokens, params = mean.init_with_output(jax.random.key(0), features)
      >>> tokens.shape, mean.num_tokens((2, 2)), mean.token_grid((2, 2))
      ((3, 1, 12), 1, None)
    """

    vision: VisionSpec
    width: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def request(self) -> FeatureRequest:
        """Hidden states needed; plain Python. Default: the selected feature F alone.

        Raises:
          ValueError: the options ask for hidden states that the encoder does not have.
        """
        return FeatureRequest(hidden=(self.vision.select_layer,))

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        """M, the visual tokens for one image with this patch grid; plain Python, no tracing.

        Raises:
          ValueError: the connector is not defined on this grid.
        """
        raise ValueError(f"{type(self).__name__} does not define num_tokens")

    @nn.nowrap
    def treats_patches_alone(self) -> bool:
        """Whether each token is made of the patch at its place and of no other."""
        return False

    @nn.nowrap
    def flops(self, grid: Grid, params: bool = False, features: bool = False) -> int:
        """Floating-point operations for one image: of the forward pass, and of the gradients that are asked for.

        Counted from the traced computation, so a new connector need not say anything. Override it where that cannot
        see the work (a kernel, a loop of unknown length).

        Args:
          params: gradients of the connector's parameters too.
          features: gradients of the vision features too (a trained encoder).
        """
        request = self.request()
        state = jax.ShapeDtypeStruct((1, grid[0] * grid[1], self.vision.width), self.dtype)
        states = [state] * (request.deepest + 1)
        if self.vision.mining:
            states.append(jax.ShapeDtypeStruct((1, grid[0] * grid[1], *self.vision.fine), self.dtype))
        connector = self.clone(parent=None, name=None)

        def given(states):
            hidden, fine = (states[:-1], states[-1]) if self.vision.mining else (states, None)
            return collect(request, hidden, grid).replace(fine=fine)

        def forward(variables, states):
            return connector.apply(variables, given(states))

        def run(variables, states):
            if params and features:
                out, pull = jax.vjp(forward, variables, states)
            elif params:
                out, pull = jax.vjp(lambda own: forward(own, states), variables)
            elif features:
                out, pull = jax.vjp(lambda seen: forward(variables, seen), states)
            else:
                return forward(variables, states)
            return pull(out)

        def init(key, states):
            return connector.init(key, given(states))

        return count_flops(run, jax.eval_shape(init, jax.random.key(0), states), states)

    @nn.nowrap
    def token_grid(self, grid: Grid) -> Grid | None:
        """Rows and columns of the image that the visual tokens stand for, row-major; plain Python.

        None for tokens without a place in the image, such as those of learned queries. Tiles of one image can be put
        together to one grid only where there is one (`data.anyres`).
        """
        return None

    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        """Maps encoder features to LLM-width visual tokens, row-major.

        Args:
          features: what `request` asked for.
          deterministic: no dropout; otherwise a "dropout" rng is needed.
        """
        raise ValueError(f"{type(self).__name__} does not define __call__")

    def selected(self, features: VisionFeatures) -> Float[Array, "B N C"]:
        """The feature F, with the fine features mined into it if there are any."""
        return self.mined(features).hidden[self.vision.select_layer]

    def mined(self, features: VisionFeatures) -> VisionFeatures:
        """The features with the fine ones mined into F, or into all of them; as they are where there are no fine ones.

        A connector that reads more than F calls this first and goes on with the result.
        """
        if features.fine is None:
            return features
        mining, every = self._mining(), self.vision.mining == "all"

        def mined(state: Array, wanted: bool) -> Array:
            return mining(state, features.fine) if wanted else state

        hidden = {k: mined(x, every or k == self.vision.select_layer) for k, x in features.hidden.items()}
        means = tuple(mined(mean, every) for mean in features.means)
        return features.replace(hidden=hidden, means=means, fine=None)

    def side_by_side(
        self, features: VisionFeatures, states: Callable[[VisionFeatures], Sequence[Array]]
    ) -> Float[Array, "B N E"]:
        """States of the features on the channel axis, mined before or after that (`VisionSpec.mining`).

        Args:
          states: gives them, each [B, N, C], of features that are mined as far as they are to be.
        """
        if self.vision.mining != "channels":
            return jnp.concatenate(list(states(self.mined(features))), axis=-1)
        joined = jnp.concatenate(list(states(features)), axis=-1)
        return self._mining()(joined, features.fine)

    def _mining(self) -> Mining:
        return Mining(self.dtype, self.param_dtype, name="mining")
