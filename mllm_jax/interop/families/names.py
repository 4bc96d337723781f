"""Words that Hugging Face configs and ours spell differently."""

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}
_SYNONYMS = {"gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "swish": "silu"}


def our_activation(name: str) -> str:
    """Our name of a `hidden_act`.

    Raises:
      ValueError: unknown.
    """
    known = {**ACTIVATIONS, **_SYNONYMS}
    if name not in known:
        raise ValueError(f"hidden_act={name!r} is not supported; known: {', '.join(known)}")
    return known[name]


def activation_name(ours: str) -> str:
    """The `hidden_act` of our activation."""
    return {value: key for key, value in ACTIVATIONS.items()}[ours]
