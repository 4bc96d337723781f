"""The server over HTTP: OpenAI's own client, many at once, and everything that is refused."""

import asyncio
import base64
import contextlib
import dataclasses
import http.server
import json
import pathlib
import re
import shutil
import socket
import subprocess
import threading
import time

import httpx
import openai
import pytest
import tiny
from asking import data_uri, messages, question
from pydantic import ValidationError

from mllm_jax.inference.slots import Slots
from mllm_jax.serve.answers import _event
from mllm_jax.serve.app import create_app
from mllm_jax.serve.errors import ApiError
from mllm_jax.serve.listen import make_server
from mllm_jax.serve.media import Media
from mllm_jax.serve.messages import build_prompt
from mllm_jax.serve.schema import ChatRequest
from mllm_jax.serve.served import Served
from mllm_jax.serve.settings import Settings

LIMITS = {"slots": 2, "queue": 3, "most_tokens": 256, "answer_tokens": 6, "most_images": 3}
LIMITS |= {"most_body_bytes": 60_000, "most_image_pixels": 10_000, "body_seconds": 2, "hosts": ("127.0.0.1",)}
CHAT = "/v1/chat/completions"
ROOT = pathlib.Path(__file__).parents[2]


class Live:
    """A server on a free port, in a thread of its own."""

    def __init__(self, model, **settings):
        self.served = Served({"tiny": model}, Settings(**LIMITS | settings))
        self.server = make_server(create_app(self.served), connections=64, drain_seconds=20)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    def __enter__(self):
        self._thread.start()
        while not self.server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        self.socket.close()

    def client(self, kind=openai.OpenAI, **settings):
        return kind(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0} | settings)

    def post(self, body=None, headers=None, path=CHAT, **given):
        body = (
            {"model": "tiny", "messages": [question("what?")]} | (body or {})
            if "content" not in given
            else None
        )
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=60, **given)


@pytest.fixture(scope="module")
def live(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    (folder / "inside").mkdir()
    (folder / "inside" / "a b.png").write_bytes(tiny.png(0, (30, 20)))
    (folder.parent / "outside.png").write_bytes(tiny.png(0))
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    with Live(model, media=Media(folder, most_bytes=60_000)) as found:
        yield found


def test_a_conversation_with_openais_client(live, model):
    client = live.client()
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    system = {"role": "system", "content": "You see."}
    asked = [system, question("what?", 0), {"role": "assistant", "content": "A cat."}, question("Why?")]
    given = {"model": "tiny", "messages": asked, "max_completion_tokens": 7}
    answer = client.chat.completions.create(**given)
    image = tiny.png(0, (30, 20))
    wanted = model.generate(image, "Why?", history=[("what?", "A cat.")], system="You see.", max_new_tokens=7)
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (
        wanted,
        "assistant",
        "length",
    )
    usage = answer.usage
    assert usage.completion_tokens == 7
    assert usage.total_tokens == usage.prompt_tokens + 7
    chunks = list(
        client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == wanted
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == usage
    # Between words, an image stands where it was put.
    parts = [{"type": "text", "text": "one"}, *question("two", 1)["content"]]
    answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}])
    image = tiny.png(1, (30, 20))
    assert answer.choices[0].message.content == model.generate(image, "one\n<image>\ntwo", max_new_tokens=6)


def test_many_clients_at_once_lose_nothing(live, model):
    """More than there are slots and places in the queue: who is refused tries again, as OpenAI's client does."""
    wanted = {
        seed: model.generate(tiny.png(seed, (30, 20)), "what?", temperature=1.2, seed=seed, max_new_tokens=6)
        for seed in range(3)
    }

    async def ask(client, index):
        seed = index % 3
        given = {"temperature": 1.2, "seed": seed, "messages": [question("what?", seed)]}
        if index % 2:
            answer = await client.chat.completions.create(model="tiny", **given)
            return answer.choices[0].message.content == wanted[seed]
        stream = await client.chat.completions.create(model="tiny", stream=True, **given)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return "".join(pieces) == wanted[seed]

    async def everybody():
        async with live.client(openai.AsyncOpenAI, max_retries=20) as client:
            return await asyncio.gather(*(ask(client, index) for index in range(12)))

    assert all(asyncio.run(everybody()))
    assert live.served.entered == 0


def test_overload_is_answered_with_429(live, monkeypatch):
    """And a client that goes away frees its place, whether it waits or streams."""
    step = Slots.step

    def slow(self):
        time.sleep(0.05)
        return step(self)

    monkeypatch.setattr(Slots, "step", slow)
    long = {"max_tokens": 60, "messages": [question("what?", 0)]}
    with contextlib.ExitStack() as stack:
        for index in range(5):
            stream = stack.enter_context(
                httpx.stream(
                    "POST", live.url + CHAT, json={"model": "tiny", "stream": True} | long, timeout=60
                )
            )
            assert stream.status_code == 200, index
        refused = live.post()
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "overloaded"
        with pytest.raises(openai.RateLimitError):
            live.client().chat.completions.create(model="tiny", messages=[question("what?")])
    deadline = time.monotonic() + 20
    engine = live.served.models["tiny"].engine
    while live.served.entered or not engine.idle:
        assert time.monotonic() < deadline, "clients that are gone are still answered"
        time.sleep(0.05)
    assert "mllm_jax_clients_gone_total 0.0" not in httpx.get(f"{live.url}/metrics").text
    assert live.post().status_code == 200


def error(answer, status):
    assert answer.status_code == status, answer.text
    found = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"model": "huge"}, 404, "model", "there are: tiny"),
        ({"n": 2}, 400, "n", "'n' is not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
        ({"temprature": 1}, 400, "temprature", "'temperature'"),
        ({"temperature": 3}, 400, "temperature", "less than"),
        ({"max_tokens": 400}, 400, "max_tokens", "together they may be 256"),
        ({"messages": [question("what? " * 60)]}, 400, "messages", "tokens, visual tokens included"),
        ({"messages": [question("a" * 17_000)]}, 400, "messages", "17,000 characters"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [question("a"), question("b")]}, 400, "messages.1.role", "take turns"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "messages.0.role", "take turns"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "messages.0.content", "empty"),
        ({"messages": [question("a", 1, 2, 3, 4)]}, 400, "messages", "at most 3"),
        ({"messages": [question("<image> and <image>", 1)]}, 400, "messages", "place"),
    ],
    ids=str,
)
def test_what_cannot_be_answered(live, change, status, param, words):
    found = error(live.post(change), status)
    assert found["param"] == param
    assert words in found["message"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1/a.png", "fetches nothing"),
        ("data:image/png;base64,!!!!", "not base64"),
        ("data:image/png,abc", "data URI begins"),
        ("data:image/png;base64,aGVsbG8=", "not an image"),
        (data_uri(0)[:-400], "damaged|base64"),
        (data_uri(0, (101, 100)), "exceed the limit of 10000"),
        ("file:../outside.png", "no file"),
        ("file:link.png", "no file"),
        ("file:///etc/passwd", "no file"),
        ("file://host/inside/a.png", "no file"),
        ("file:inside", "no file"),
        ("ftp://a/b.png", "no data URI"),
    ],
)
def test_images_that_are_refused(live, url, words):
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    found = error(live.post({"messages": [message]}), 400)
    assert any(each in found["message"] for each in words.split("|")), found["message"]


def test_images_of_the_media_folder_and_of_named_hosts(live, model):
    image = tiny.png(0, (30, 20))

    def asked(url):
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
        return {"messages": [{"role": "user", "content": parts}]}

    wanted = model.generate(image, "what?", max_new_tokens=6)
    answer = live.post(asked("file:inside/a%20b.png"))
    assert answer.json()["choices"][0]["message"]["content"] == wanted

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            moved = self.path == "/moved"
            if self.path == "/garbage":
                return self.wfile.write(b"garbage\r\n\r\n")
            self.send_response(302 if moved else 200)
            self.send_header("Location", "/image")
            self.end_headers()
            self.wfile.write(b"" if moved else image * (1 if self.path == "/image" else 100))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        media = Media(hosts=("127.0.0.1",), most_bytes=10_000)
        url = f"http://127.0.0.1:{other.server_port}"
        assert media.read(f"{url}/image", "x") == image
        for given in (
            *(url + path for path in ("/moved", "/large", "/garbage", "/a b")),
            "http://a:1@127.0.0.1/",
        ):
            with pytest.raises(ApiError, match=r"more than 10,000|302|does not give"):
                media.read(given, "x")
        other.shutdown()


def test_what_clients_send_besides(live, model):
    """Fields that say what happens anyway, nulls, and an answer that was empty."""
    said = {"role": "assistant", "content": None, "refusal": None, "tool_calls": None}
    body = {
        "messages": [question("a"), said, question("b")],
        "stream": True,
        "tools": [],
        "n": 1,
        "user": "me",
    }
    body |= {
        "response_format": {"type": "text"},
        "logprobs": False,
        "presence_penalty": 0.0,
        "metadata": {"a": "b"},
    }
    body |= {"stream_options": {"include_usage": None}, "stop": [], "max_tokens": 1}
    nothing = (
        "max_completion_tokens",
        "temperature",
        "top_p",
        "seed",
        "logit_bias",
        "tool_choice",
        "functions",
    )
    answer = live.post(body | dict.fromkeys(nothing))
    assert answer.status_code == 200, answer.text
    *events, end = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert end == "[DONE]"
    chunks = [json.loads(event)["choices"][0] for event in events]
    wanted = model.generate(None, "b", history=[("a", "")], max_new_tokens=1)
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == wanted
    assert [chunk["finish_reason"] for chunk in chunks][-1] in ("length", "stop")
    assert len(_event({"content": "a\u2028b\x85c"}).decode().splitlines()) == 2  # as clients find lines


def test_limits_that_cannot_be():
    for field, least in (("queue", 0), ("slots", 1), ("most_tokens", 1)):
        Settings(**{field: least})
        with pytest.raises(ValueError, match=f"{field.replace('_', '-')} must be at least {least}"):
            Settings(**{field: least - 1})


def test_what_is_wrong_is_told_once():
    """A million wrong items would be as many messages, in gigabytes."""
    for content in ("0," * 2000 + "0", '{"type":"text","text":"a"},' * 2000 + '{"type":"text","text":"a"}'):
        for items in (content, f'{{"role":"user","content":[{content}]}}'):
            with pytest.raises(ValidationError) as caught:
                ChatRequest.model_validate_json(f'{{"model":"a","messages":[{items}]}}')
            assert caught.value.error_count() <= 3


def test_an_answer_that_takes_too_long(live, monkeypatch):
    """Who streams it is told, too; and a key may have any characters."""
    step = Slots.step

    def slow(self):
        time.sleep(0.5)
        return step(self)

    monkeypatch.setattr(Slots, "step", slow)
    settings = dataclasses.replace(live.served.settings, request_seconds=0.8, api_key="sésame")
    monkeypatch.setattr(live.served, "settings", settings)
    headers = {"authorization": "Bearer sésame".encode()}
    asked = {"max_tokens": 60, "temperature": 2, "seed": 1}
    assert error(live.post(asked, headers=headers), 504)["code"] == "timeout"
    streamed = live.post(asked | {"stream": True}, headers=headers)
    assert '"code": "timeout"' in streamed.text
    with pytest.raises(ApiError, match="within"):
        asyncio.run(live.served.on_worker(time.sleep, 1.5))
    assert streamed.text.endswith("data: [DONE]\n\n")


def test_a_video_of_one_frame_and_one_of_too_many(model):
    frame = base64.b64encode(tiny.png(0)).decode()
    content = [{"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frame}"}}]
    shown = messages({"role": "user", "content": content})
    assert build_prompt(model, shown, Media(), most_images=1).reads_video
    with pytest.raises(ApiError, match="more than 4096 frames"):
        Media().read("data:video/jpeg;base64,AAAA" + ",AAAA" * 4096, "x")


@pytest.mark.slow
def test_frames_of_a_video(live, model):
    frames = [tiny.png(seed, (28, 28)) for seed in range(3)]
    url = "data:video/jpeg;base64," + ",".join(base64.b64encode(frame).decode() for frame in frames)
    parts = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "what?"}]
    answer = live.post({"messages": [{"role": "user", "content": parts}]}).json()
    pixels = [tiny.Image.open(tiny.io.BytesIO(frame)) for frame in frames]
    wanted = model.generate(video=pixels, prompt="what?", max_new_tokens=6)
    assert answer["choices"][0]["message"]["content"] == wanted


def test_requests_that_do_not_get_in(live):
    for content in (b"", b"{", b"[" * 20_000, b"\xff"):
        found = error(live.post(content=content, headers={"content-type": "application/json"}), 400)
        assert "JSON" in found["message"]
    error(live.post(content=b"{}", headers={"content-type": "text/plain"}), 415)
    error(live.post({"messages": [question("x" * 70_000)]}), 413)

    def unending():
        while True:
            yield b" " * 10_000

    with contextlib.suppress(httpx.WriteError):  # a client that does not stop writing may not see the answer
        error(live.post(content=unending(), headers={"content-type": "application/json"}), 413)
    error(live.post(headers={"host": "evil.example"}), 403)
    error(httpx.get(f"{live.url}/v1/none"), 404)
    error(httpx.get(live.url + CHAT), 405)
    assert httpx.get(f"{live.url}/health").json() == {"status": "ok"}
    with socket.create_connection(("127.0.0.1", live.port)) as slow:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        slow.settimeout(20)
        assert b" 408 " in slow.recv(1000)
    assert live.served.entered == 0


def test_headers_that_do_not_end_close_the_connection(live, monkeypatch):
    monkeypatch.setattr("mllm_jax.serve.listen.HEADER_SECONDS", 0.2)
    for sent in (b"", b"GET /health HTTP/1.1\r\nA: "):
        with socket.create_connection(("127.0.0.1", live.port)) as slow:
            slow.settimeout(20)
            slow.sendall(sent)
            assert slow.recv(100) == b""
    with socket.create_connection(("127.0.0.1", live.port)) as large:
        large.settimeout(20)
        large.sendall(b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 20_000)
        assert b" 400 " in large.recv(100)


def test_a_key_and_a_shutdown_that_lets_requests_finish(model):
    with Live(model, api_key="sesame", hosts=()) as live:
        assert httpx.get(f"{live.url}/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer sesam"}, {"authorization": "Bearer sésame".encode()}):
            assert error(live.post(headers=headers), 401)["code"] == "invalid_api_key"
            assert httpx.get(f"{live.url}/metrics", headers=headers).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            live.client().models.list()
        client = live.client(api_key="sesame")
        stream = client.chat.completions.create(
            model="tiny", messages=[question("what?", 0)], max_tokens=60, stream=True
        )
        chunks = [next(stream)]
        live.server.should_exit = True  # what SIGTERM sets
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert said == model.generate(tiny.png(0, (30, 20)), "what?", max_new_tokens=60)


def test_what_the_documentation_asks(live, tmp_path, monkeypatch, capsys):
    """The commands and the Python of docs/serve.md, with this server's address and model."""
    (tmp_path / "cat.jpg").write_bytes(tiny.png(0))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/serve.md").read_text().split("## Asking")[1].split("## Limits")[0]
    page = page.replace("http://127.0.0.1:8000", live.url).replace("quickstart", "tiny")
    commands, lines = re.findall(r"^```(?:bash|python)\n(.*?)^```", page, re.S | re.M)
    if shutil.which("curl"):
        said = subprocess.run(["bash", "-ec", commands], capture_output=True, text=True, check=True).stdout
        assert '"object":"list"' in said
        assert '"object":"chat.completion"' in said
    exec(compile(lines, "docs/serve.md", "exec"), {})
    assert "CompletionUsage" in capsys.readouterr().out
