"""The chat page: what it is allowed to load, and the attention that it shows."""

import base64
import io
import re

import numpy as np
import pytest
import tiny
from PIL import Image
from starlette.testclient import TestClient

from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.inference.model import Model
from mllm_jax.serve import page
from mllm_jax.serve.app import create_app
from mllm_jax.serve.served import Served
from mllm_jax.serve.settings import Settings

ANSWER = {"role": "assistant", "content": "a"}


@pytest.fixture(scope="module")
def model(tiny_model, tiny_params, tiny_tokenizer):
    return Model(tiny_model, tiny_params, tiny_tokenizer, ImageProcessor.clip(tiny.IMAGE_SIZE), "vicuna_v1")


@pytest.fixture(scope="module")
def client(model):
    app = create_app(Served({"tiny": model}, Settings(slots=2, most_tokens=256)), extend=[page.mount])
    with TestClient(app) as client:
        yield client


def test_the_page_loads_only_its_own_files(client):
    start = client.get("/")
    assert start.headers["content-type"].startswith("text/html")
    seen, names = {}, ["/"]
    while names:
        name = names.pop()
        seen[name] = answer = client.get(name)
        assert answer.status_code == 200, name
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", answer.text)
        links = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
        links += [f"/page/{found}" for found in re.findall(r'from "\./([^"]+)"', answer.text)]
        assert all(link.startswith("/page/") for link in links), links
        names += [link for link in links if link not in seen]
    assert len(seen) >= 6
    assert "on" not in {
        attribute[:2] for attribute in re.findall(r"\s(\w+)=", start.text)
    }  # no inline handlers
    for name in ("/page/__init__.py", "/page/../app.py", "/page/nothing.js"):
        assert client.get(name).status_code == 404


def test_attention_is_that_of_the_model(client, model):
    images = [tiny.png(index, (30, 20)) for index in range(2)]
    urls = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [
        {"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "so"},
    ]
    maps = model.attention_maps(images, "why?", "so", history=[("what?", "a cat")])
    for layer, weights in ((None, maps.weights.mean(axis=0)), (1, maps.weights[1])):
        answer = client.post("/v1/attention", json={"model": "tiny", "messages": messages, "layer": layer})
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert "".join(found["pieces"]) == "so"
        assert (found["layers"], found["place"], len(found["views"])) == (2, "grid", 2)
        np.testing.assert_allclose(found["visual"], weights, atol=2e-6)
        for view, grid in zip(found["views"], maps.on_views(weights), strict=True):
            np.testing.assert_allclose(view["weights"], grid.reshape(len(grid), -1), atol=2e-6)
            assert view["columns"] == 2
            file = io.BytesIO(base64.b64decode(view["url"].partition(",")[2]))
            assert Image.open(file).size == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"model": "other"}, 404, "no model 'other'"),
        ({"layer": 2}, 400, "blocks 0 to 1"),
        ({"messages": [{"role": "user", "content": "what?"}] * 2}, 400, "the assistant's"),
        ({"messages": [{"role": "user", "content": "what? " * 60}, ANSWER]}, 400, "at most 256"),
        ({"layers": 1}, 400, "layers"),
    ],
)  # fmt: skip
def test_impossible_requests(client, changes, status, words):
    messages = [{"role": "user", "content": "what?"}, ANSWER]
    answer = client.post("/v1/attention", json={"model": "tiny", "messages": messages} | changes)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]
