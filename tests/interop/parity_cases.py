"""The tiny models of the parity tests, and random weights that any machine makes alike. Needs no torch."""

import zlib

import numpy as np

LLM_SIZE = {
    "vocab_size": 53,
    "hidden_size": 36,
    "intermediate_size": 31,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLMS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama-wide-heads": ("Llama", {"head_dim": 10, "num_key_value_heads": 6}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama3-rope": ("Llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}),
    "llama-linear-rope": ("Llama", {"rope_scaling": {"type": "linear", "factor": 2.5}}),
    "yi": ("Llama", {"rope_theta": 5e6, "rms_norm_eps": 1e-5}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "qwen2-yarn": ("Qwen2", {"rope_scaling": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "phi2": ("Phi", {"partial_rotary_factor": 0.4, "hidden_size": 60, "num_key_value_heads": 6}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 10,
            "sliding_window": 4,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
}

TOWER_SIZE = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "patch_size": 4,
    "image_size": 12,
}
TOWERS = {
    "clip": ("CLIPVision", {}),
    "clip-gelu": ("CLIPVision", {"hidden_act": "gelu", "layer_norm_eps": 1e-3}),
    "siglip": ("SiglipVision", {}),
    "siglip-14": ("SiglipVision", {"image_size": 14}),  # the last two pixels fill no patch
    "siglip2": ("Siglip2Vision", {"num_patches": 9}),
    "dinov2": ("Dinov2", {"mlp_ratio": 2}),
    "dinov2-giant": ("Dinov2", {"use_swiglu_ffn": True}),
    "dinov2-registers": ("Dinov2WithRegisters", {"num_register_tokens": 3}),
}

IMAGE = 40  # token id of an image in the LLaVA cases
LLAVA_VISION = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_attention_heads": 3,
    "num_hidden_layers": 5,
    "image_size": 12,
    "patch_size": 4,
}
LLAVA_TEXT = {
    "vocab_size": 43,
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LLAVAS = {
    "clip-llama": ("CLIP", "Llama", {}),
    "siglip-qwen2": ("Siglip", "Qwen2", {"vision_feature_layer": -1}),
    "clip-llama-layers": ("CLIP", "Llama", {"vision_feature_layer": [-2, 1, 3]}),
}
LLAVA_TOKENS = np.array([[3, 9, *[IMAGE] * 9, 5, 8], [7, *[IMAGE] * 9, 2, 4, 6]])


def random_tensor(name, shape):
    """Values that depend on the tensor's name and shape alone (NumPy keeps RandomState's stream for ever)."""
    seed = zlib.crc32(f"{name}{tuple(shape)}".encode())
    values = np.random.RandomState(seed).standard_normal(shape) * 0.25
    return (values + (0.5 if len(shape) == 1 else 0.0)).astype(np.float32)


def pixels(height, width, batch=2):
    """A batch of normalised pictures [B, H, W, 3]."""
    return 4 * random_tensor("pixels", (batch, height, width, 3))


def tokens(length, vocab=53, batch=2):
    """Token ids [B, T] without the special ones."""
    return np.random.RandomState(0).randint(3, vocab, (batch, length))
