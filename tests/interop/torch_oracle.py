"""Helpers of the parity tests: tiny random torch models, our forward passes."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from parity_cases import random_tensor

from mllm_jax.connectors.base import FeatureRequest
from mllm_jax.data.batch import Batch
from mllm_jax.models.decoder import Decoder, init_cache
from mllm_jax.models.vit import VisionTransformer

TOLERANCE = 1e-4


def randomize(model):
    """Random values everywhere (by name), so that biases, norms and tables all count."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(random_tensor(name, parameter.shape)))
    return model.eval()


def save(model, directory):
    """Saves as transformers does, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)


def vision_states(config, params, images):
    """All hidden states hs[0..L] of float images [B, H, W, 3], class token and registers kept."""
    request = FeatureRequest(hidden=tuple(range(config.depth + 1)))
    run = jax.jit(lambda p, x: VisionTransformer(config, request).apply({"params": p}, x, keep_prefix=True))
    features = run(params, jnp.asarray(images))
    return [features.hidden[k] for k in range(config.depth + 1)]


def decoder_states(config, params, tokens):
    """[hs[0] .. hs[L-1], normed hs[L]] and logits, as transformers gives them."""
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def run(decoder):
        embeddings = decoder.embed(tokens)
        hidden, _ = decoder(embeddings, positions, jnp.ones_like(tokens))
        return embeddings, hidden, decoder.logits(hidden)

    @jax.jit
    def apply(params):
        return Decoder(config).apply({"params": params}, method=run, mutable=["intermediates"])

    (first, last, logits), kept = apply(params)
    blocks = kept["intermediates"]["hidden"][0]
    return [first, *blocks[:-1], last], logits


def assert_close(ours, theirs, what):
    """Within the tolerance of the parity tests."""
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else theirs
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE, err_msg=what)


def greedy(config, params, tokens, count):
    """`count` greedy tokens after `tokens` [B, T] through the KV cache: one prefill, then single steps."""
    tokens = jnp.asarray(tokens)
    batch, length = tokens.shape

    def run(decoder, tokens, positions, cache):
        hidden, cache = decoder(decoder.embed(tokens), positions, jnp.ones_like(tokens), cache)
        return jnp.argmax(decoder.logits(hidden[:, -1]), axis=-1).astype(tokens.dtype), cache

    @jax.jit
    def generate(params):
        apply = functools.partial(Decoder(config).apply, {"params": params}, method=run)
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        token, cache = apply(tokens, positions, init_cache(config, batch, length + count, jnp.float32))

        def step(carry, position):
            token, cache = carry
            following, cache = apply(token[:, None], jnp.full((batch, 1), position), cache)
            return (following, cache), token

        _, found = jax.lax.scan(step, (token, cache), length + jnp.arange(count))
        return found.T

    return generate(params)


def tower_states(model, images):
    """A torch tower's hidden_states of float images [B, H, W, 3]."""
    import torch

    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    kwargs = {}
    if type(model).__name__ in ("CLIPVisionModel", "SiglipVisionModel"):
        kwargs["interpolate_pos_encoding"] = images.shape[1:3] != (model.config.image_size,) * 2
    if type(model).__name__ == "Siglip2VisionModel":  # takes patches, as its image processor cuts them
        batch, rows, columns = len(images), images.shape[1] // 4, images.shape[2] // 4
        patches = images[:, : rows * 4, : columns * 4].reshape(batch, rows, 4, columns, 4, 3)
        pixels = torch.tensor(patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1))
        kwargs["pixel_attention_mask"] = torch.ones(batch, rows * columns, dtype=torch.int32)
        kwargs["spatial_shapes"] = torch.tensor([[rows, columns]] * batch)
    with torch.no_grad():
        return model(pixels, output_hidden_states=True, **kwargs).hidden_states


def llava_batch(tokens, images, image_token):
    """Our batch of token ids [B, T] with image placeholders and one picture [B, S, S, 3] per row."""
    tokens = np.asarray(tokens)
    visual = tokens == image_token
    return Batch(
        tokens=np.where(visual, 0, tokens).astype(np.int32),
        positions=np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        segment_ids=np.ones_like(tokens, dtype=np.int32),
        visual_index=np.where(visual, np.cumsum(visual, axis=1) - 1, -1).astype(np.int32),
        images=images[:, None],
        image_mask=np.ones((len(tokens), 1), bool),
    )
