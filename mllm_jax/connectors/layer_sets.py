"""Which hidden states the multi-layer connectors read, for any encoder depth; plain Python.

The papers fix sets for CLIP-L (24 blocks, F = hs[23]) and SigLIP-so400m (27 blocks, F = hs[26]). The rules
below give those sets and extend them to other depths s, where F = hs[s]:

* `spread_layers` (STI, SCI): the ends of the first two thirds of hs[0..s], that is hs[floor(k*(s+1)/3) - 1]
  for k = 1, 2. CLIP-L: 7, 15. SigLIP-so400m is an exception: the released code reuses 7, 15.
* `equal_groups` (DCI): G groups of floor((s+1)/G) consecutive states from hs[0] on; deepest states left over
  are in no group. CLIP-L: 0-11, 12-23, or 0-7, 8-15, 16-23. SigLIP-so400m: 0-12, 13-25.
* `token_packer_layers`: hs[round(s*k/23)] for k = 12, 16, 22, 23. CLIP-L: 12, 16, 22, 23.
"""

import itertools
from collections.abc import Sequence

from mllm_jax.connectors.base import VisionSpec


def _is_siglip_so400m(vision: VisionSpec) -> bool:
    # Dense Connector deletes the last of the 27 blocks; towers loaded either way have the same F.
    return vision.depth in (26, 27) and vision.select_layer == 26


def spread_layers(vision: VisionSpec, option: str) -> tuple[int, ...]:
    """Extra layers of STI and SCI, shallow to deep, without F.

    Raises:
      ValueError: F is the embedding output, so nothing lies before it.
    """
    if _is_siglip_so400m(vision):
        return (7, 15)
    ends = (k * (vision.select_layer + 1) // 3 - 1 for k in (1, 2))
    layers = tuple(sorted({k for k in ends if 0 <= k < vision.select_layer}))
    if not layers:
        raise ValueError(f"{option}: no preset for select_layer={vision.select_layer}; give the layers")
    return layers


def equal_groups(vision: VisionSpec, groups: int, option: str) -> tuple[tuple[int, ...], ...]:
    """DCI's groups, shallow to deep.

    Raises:
      ValueError: fewer states than groups.
    """
    size = (vision.select_layer + 1) // groups if groups > 0 else 0
    if not size:
        raise ValueError(f"{option}={groups} groups cannot be made of hs[0..{vision.select_layer}]")
    return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(groups))


def groups_between(edges: Sequence[int], vision: VisionSpec, option: str) -> tuple[tuple[int, ...], ...]:
    """Groups hs[edges[g]] .. hs[edges[g+1] - 1].

    Raises:
      ValueError: edges do not increase or leave the encoder.
    """
    pairs = list(itertools.pairwise(edges))
    if not pairs or any(a >= b for a, b in pairs) or edges[0] < 0 or edges[-1] > vision.depth + 1:
        raise ValueError(f"{option}={tuple(edges)} must increase within 0..{vision.depth + 1}")
    return tuple(tuple(range(a, b)) for a, b in pairs)


def token_packer_layers(vision: VisionSpec) -> tuple[int, ...]:
    """TokenPacker's detail layers; distinct ones, shallow to deep."""
    return tuple(sorted({round(vision.select_layer * k / 23) for k in (12, 16, 22, 23)}))


def check_layers(layers: Sequence[int], vision: VisionSpec, option: str) -> tuple[int, ...]:
    """The given layers, if they are distinct hidden states of the encoder.

    Raises:
      ValueError: they are not.
    """
    if len(set(layers)) != len(layers) or any(not 0 <= k <= vision.depth for k in layers):
        raise ValueError(f"{option}={tuple(layers)} must be distinct indices of hs[0..{vision.depth}]")
    return tuple(layers)
