"""The chat page in headless Chromium, where Playwright and a browser are installed (`pip install playwright`).

The server's answers are made up here; that the server gives such answers is for its own tests.
"""

import json
import shutil
import threading
import time

import pytest
import tiny
import uvicorn
from fastapi import FastAPI

from mllm_jax.serve.page import mount
from mllm_jax.serve.served import Served
from mllm_jax.serve.settings import Settings

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium")

MODELS = [
    {"id": name, "connector": connector} for name, connector in (("a", "mlp2x_gelu"), ("b", "q_former"))
]
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///ywAAAAAAQABAAACAUwAOw=="
EVIL = "<img src=x onerror=\"document.title='broken'\"> & <b>bold</b>"

NAMELESS = """[...document.querySelectorAll("button, input, select, textarea")]
    .filter(each => !(each.labels?.length || each.ariaLabel || each.textContent.trim())).map(each => each.outerHTML)"""
OPACITY = """[...document.querySelector(".shown canvas").getContext("2d").getImageData(0, 0, 2, 2).data]
    .filter((_, index) => index % 4 == 3)"""


@pytest.fixture(scope="module")
def address():
    app = FastAPI()
    mount(app, Served({}, Settings()))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


def stream(*pieces, end="stop"):
    """Server-sent events of an answer."""
    chunks = [{"choices": [{"delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    chunks.append({"choices": [{"delta": {}, "finish_reason": end}]})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def _counted(body):
    return {"body": stream(f"{len(body['messages'])} ", "messages")}


class Asked:
    """A page, what it asks the server, and what it is answered: by default the number of messages."""

    def __init__(self, browser, address, answer=_counted, models=MODELS, **options):
        self.requests, self.answer = [], answer
        self.page = browser.new_page(**options)
        self.page.route("**/v1/models", lambda route: route.fulfill(json={"data": models}))
        self.page.route("**/v1/chat/completions", self._chat)
        self.problems = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(address)
        self.page.locator("#first option").first.wait_for(state="attached")

    def _chat(self, route):
        body = route.request.post_data_json
        self.requests.append(body)
        answer = self.answer(body)
        route.abort() if answer is None else route.fulfill(**answer)

    def ask(self, words):
        """Types a question and waits for both answers."""
        self.page.keyboard.type(words)
        self.page.keyboard.press("Enter")
        last = self.page.locator("article").last.locator(".answer:not(.busy)")
        last.nth(1).wait_for()
        return last

    @property
    def overflow(self):
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_two_models_answer_in_turns(browser, address, scheme, width):
    asked = Asked(browser, address, color_scheme=scheme, viewport={"width": width, "height": 800})
    page = asked.page
    assert page.evaluate("document.activeElement.id") == "question"
    assert page.get_by_label("Question", exact=True).count() == 1
    assert page.evaluate(NAMELESS) == []
    page.set_input_files("#choose", {"name": "a.png", "mimeType": "image/png", "buffer": tiny.png(0)})
    page.locator("#files img").wait_for()
    assert asked.ask("what?").locator(".text").all_inner_texts() == ["1 messages", "1 messages"]
    assert asked.ask("why?").locator(".text").all_inner_texts() == ["3 messages", "3 messages"]
    first, last = asked.requests[0], asked.requests[-1]
    assert sorted(body["model"] for body in asked.requests) == ["a", "a", "b", "b"]
    assert first["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert [message["role"] for message in last["messages"]] == ["user", "assistant", "user"]
    assert last["messages"][1:] == [
        {"role": "assistant", "content": "1 messages"},
        {"role": "user", "content": "why?"},
    ]
    assert (first["stream"], first["temperature"]) == (True, 0)
    boxes = [box.bounding_box() for box in page.locator("article").last.locator(".answer").all()]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 1000)  # side by side, or one below the other
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == (scheme == "dark")
    assert asked.overflow <= 0
    page.get_by_role("button", name="New conversation").click()
    assert asked.ask("who?").locator(".text").all_inner_texts() == ["1 messages", "1 messages"]
    assert asked.problems == []


def test_long_and_hostile_answers(browser, address):
    long = "word " * 2000 + "x" * 3000

    def answer(body):
        return {"body": stream(EVIL, "\n", long, end="length")}

    asked = Asked(browser, address, answer, viewport={"width": 390, "height": 700})
    answers = asked.ask(EVIL)
    assert answers.first.locator(".text").text_content() == f"{EVIL}\n{long}"
    assert asked.page.locator(".asked p").text_content() == EVIL
    assert asked.page.locator("main img, main b").count() == 0
    assert asked.page.title() == "mllm-jax chat"
    assert "cut at the most tokens" in answers.first.inner_text()
    assert asked.overflow <= 0


def test_problems_are_said_plainly(browser, address):
    def refused(status, message, headers=()):
        return {"status": status, "json": {"error": {"message": message}}, "headers": dict(headers)}

    replies = {
        "busy": refused(429, "64 wait", {"Retry-After": "7"}),
        "large": refused(413, "the request has more than 20 bytes"),
        "gone": None,
        "cut": {"body": stream("half ").split("data: {\"choices\": [{\"delta\": {}")[0]},
        "broken": {"body": 'data: {"error": {"message": "the model failed"}}\n\ndata: [DONE]\n\n'},
        "key": refused(401, "the request carries no valid key"),
    }  # fmt: skip
    asked = Asked(browser, address, lambda body: replies[body["messages"][-1]["content"]])
    for words, expected in {
        "busy": "busy; try again in 7 s",
        "large": "Too large: the request has more than 20 bytes",
        "gone": "Is it still running?",
        "cut": "went away in the middle",
        "broken": "the model failed",
        "key": "wants an API key",
    }.items():
        asked.page.locator("#question").focus()
        answers = asked.ask(words)
        assert expected in answers.first.get_by_role("alert").inner_text()
    assert asked.page.evaluate("document.activeElement.id") == "key"
    asked.page.get_by_label("API key").fill("secret")
    replies["key"] = {"body": stream("fine")}
    with asked.page.expect_request("**/v1/chat/completions") as sent:
        answers.first.get_by_role("button", name="Try again").click()
    assert sent.value.headers["authorization"] == "Bearer secret"
    answers.first.get_by_text("fine").wait_for()
    assert [message["role"] for message in asked.requests[-1]["messages"]] == [
        "user"
    ]  # what failed is not history
    assert asked.problems == []


def test_where_an_answer_looked(browser, address):
    view = {"image": 0, "kind": "image", "number": 0, "url": PIXEL, "columns": 2}
    found = {
        "pieces": ["a", " <i>cat"], "layers": 3, "place": "attention", "visual": [[0.1, 0.2], [0.0, 0.4]],
        "views": [view | {"weights": [[0.1, 0.1, 0.0, 0.1], [0.4, 0.0, 0.0, 0.0]]}],
    }  # fmt: skip
    asked = Asked(browser, address, viewport={"width": 390, "height": 800})
    layers = []

    def attention(route):
        layers.append(route.request.post_data_json["layer"])
        route.fulfill(json=found)

    page = asked.page
    page.route("**/v1/attention", attention)
    page.set_input_files("#choose", {"name": "a.png", "mimeType": "image/png", "buffer": tiny.png(0)})
    page.locator("#files img").wait_for()
    answer = asked.ask("what?").first
    answer.get_by_role("button", name="Where it looked").press("Enter")
    answer.locator("canvas").wait_for()
    assert "35 %" in answer.inner_text()
    assert "stand for no place" in answer.inner_text()
    assert page.evaluate(OPACITY)[0] == 230
    answer.get_by_role("button", name="<i>cat").press("Enter")
    assert "40 %" in answer.inner_text()
    assert page.evaluate(OPACITY) == [230, 0, 0, 0]
    found["place"] = "none"
    answer.get_by_label("Layer of the LLM").select_option("2")
    answer.locator("canvas.bars").wait_for()
    assert layers == [None, 1]
    assert "each bar is one token" in answer.inner_text()
    assert asked.overflow <= 0
    assert asked.problems == []
