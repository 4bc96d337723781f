"""What tests ask a server."""

import base64

import tiny

from mllm_jax.serve.schema import Message


def data_uri(seed, size=(30, 20)):
    return f"data:image/png;base64,{base64.b64encode(tiny.png(seed, size)).decode()}"


def question(words, *seeds):
    """A user's message about random images."""
    shown = [{"type": "image_url", "image_url": {"url": data_uri(seed)}} for seed in seeds]
    return {"role": "user", "content": [*shown, {"type": "text", "text": words}]}


def messages(*given):
    return [Message.model_validate(each) for each in given]
