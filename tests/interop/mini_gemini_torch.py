"""Mini-Gemini in plain torch, from its formulas (extensions.md 3): ConvNeXt, patch info mining, the views of an image.

Weights are a dict in the names of timm (ConvNeXt) and of Mini-Gemini (mining, projector). Nothing of ours is used.
"""

import torch
from torch.nn import functional as F


def _norm(x, weights, name, eps):
    """LayerNorm over the channels of [..., C]."""
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def _norm_2d(x, weights, name, eps):
    return _norm(x.permute(0, 2, 3, 1), weights, name, eps).permute(0, 3, 1, 2)


def _linear(x, weights, name):
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _resize(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def convnext(weights, images, depths, eps=1e-6):
    """The maps of all stages of images [B, 3, H, W] on the grid of the first: [B, C, H / 4, W / 4]."""
    x = F.conv2d(images, weights["stem.0.weight"], weights["stem.0.bias"], stride=4)
    x = _norm_2d(x, weights, "stem.1", eps)
    maps = []
    for stage, depth in enumerate(depths):
        here = f"stages.{stage}"
        if stage:
            x = _norm_2d(x, weights, f"{here}.downsample.0", eps)
            name = f"{here}.downsample.1"
            x = F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2)
        for block in range(depth):
            name = f"{here}.blocks.{block}"
            kernel, bias = weights[f"{name}.conv_dw.weight"], weights[f"{name}.conv_dw.bias"]
            y = F.conv2d(x, kernel, bias, padding=3, groups=x.shape[1]).permute(0, 2, 3, 1)
            y = _norm(y, weights, f"{name}.norm", eps)
            y = _linear(F.gelu(_linear(y, weights, f"{name}.mlp.fc1")), weights, f"{name}.mlp.fc2")
            x = x + (y * weights[f"{name}.gamma"]).permute(0, 3, 1, 2)
        maps.append(x)
    return torch.cat([maps[0], *(_resize(each, maps[0].shape[-2:]) for each in maps[1:])], dim=1)


def cells(maps, side):
    """[B, A, h, w] as [B, side * side, P, A]: the positions of each cell of a side x side grid."""
    batch, channels, height, width = maps.shape
    x = maps.reshape(batch, channels, side, height // side, side, width // side)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, side * side, -1, channels)


def mined(weights, tokens, fine):
    """What is added to tokens [B, N, C] from the fine features [B, N, P, A] of their cells."""
    query, key, value = (
        _linear(
            _norm(x, weights, f"vlm_uni_{name}_projector.0", 1e-5), weights, f"vlm_uni_{name}_projector.1"
        )
        for name, x in (("query", tokens), ("aux", fine), ("val", fine))
    )
    logits = torch.einsum("bnd,bnpd->bnp", query, key) / key.shape[-1] ** 0.5
    return torch.einsum("bnp,bnpd->bnd", logits.nan_to_num().softmax(-1), value)


def visual_tokens(weights, clip, trunk, depths, images, size, split, overview):
    """The projector's output for normalised images [B, 3, S, S].

    Args:
      clip: images -> patch features [B, N, C].
      trunk: weights of the ConvNeXt.
      size: of CLIP's input.
    """
    small = _resize(images, (size * split, size * split))
    parts = [
        small[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size]
        for i in range(split)
        for j in range(split)
    ]
    maps = convnext(trunk, images, depths)
    step = maps.shape[-1] // split
    fine = [
        maps[:, :, i * step : (i + 1) * step, j * step : (j + 1) * step]
        for i in range(split)
        for j in range(split)
    ]
    if overview:
        parts.insert(0, _resize(small, (size, size)))
        fine.insert(0, F.interpolate(maps, scale_factor=1 / split, mode="bilinear", align_corners=False))
    found = []
    for part, own in zip(parts, fine, strict=True):
        tokens = clip(part)
        x = tokens + mined(weights, tokens, cells(own, round(tokens.shape[1] ** 0.5)))
        found.append(_linear(F.gelu(_linear(x, weights, "mm_projector.0")), weights, "mm_projector.2"))
    return torch.cat(found, dim=1)
