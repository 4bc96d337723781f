"""The server under load: 64 clients at once ask a mini model an hour's worth of requests as fast as it answers.

    python benchmarks/serve_load.py --model runs/quickstart
    python benchmarks/serve_load.py --model runs/quickstart --write     # puts the table into docs/performance.md

An hour of 64 people who ask about an image every two minutes are 1,920 requests. Each client sends its next one when
the last is answered: questions about one of 192 images, half of them streamed, a quarter drawn at a temperature. Every
answer is compared with what the model says when it is asked alone, in this process. Measured are requests and tokens a
second, the time from a request to the end of its answer (and to the first text of a streamed one), answers that were
lost or differ, and the server's memory after the first and after the last tenth.
"""

import argparse
import asyncio
import base64
import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import page
import psutil
from PIL import Image

import mllm_jax

ROOT = pathlib.Path(__file__).parents[1]
IMAGES, SIDE, NEW_TOKENS = 192, 84, 16
QUESTIONS = (
    "What is in the image?",
    "How many objects are there?",
    "Which color is the largest object?",
    "Is there a red circle in the image?",
    "What is to the left of the square?",
    "Describe the image.",
)


def image(index: int) -> np.ndarray:
    """A random image of a few rectangles."""
    rng = np.random.default_rng(index)
    pixels = np.full((SIDE, SIDE, 3), rng.integers(0, 256, 3), np.uint8)
    for _ in range(4):
        (top, left), (height, width) = rng.integers(0, SIDE - 20, 2), rng.integers(8, 40, 2)
        pixels[top : top + height, left : left + width] = rng.integers(0, 256, 3)
    return pixels


def request(index: int, images: list[str]) -> dict:
    """The body of the request of that number."""
    parts = [
        {"type": "image_url", "image_url": {"url": images[index % IMAGES]}},
        {"type": "text", "text": QUESTIONS[index // IMAGES % len(QUESTIONS)]},
    ]
    drawn = {"temperature": 0.8, "seed": index % 7} if index % 4 == 3 else {}
    asked = {"model": "mini", "messages": [{"role": "user", "content": parts}], "max_tokens": NEW_TOKENS}
    return asked | drawn | ({"stream": True} if index % 2 else {})


def alone(model: mllm_jax.Model, count: int) -> list[str]:
    """What the model says to every request when it is asked in this process; a drawn answer to one prompt at a time."""
    asked = [(image(index % IMAGES), QUESTIONS[index // IMAGES % len(QUESTIONS)]) for index in range(count)]
    greedy = [index for index in range(count) if index % 4 != 3]
    images, words = zip(*(asked[index] for index in greedy), strict=True)
    answers = model.generate(list(images), list(words), max_new_tokens=NEW_TOKENS, batch_size=64)
    found = dict(zip(greedy, answers, strict=True))
    for index in range(3, count, 4):
        drawn = {"temperature": 0.8, "seed": index % 7}
        found[index] = model.generate(*asked[index], max_new_tokens=NEW_TOKENS, **drawn)
    return [found[index] for index in range(count)]


async def ask(client: httpx.AsyncClient, body: dict) -> tuple[str, float, float | None, int]:
    """The answer, seconds until it was whole and until its first text, and how often it was refused before."""
    refusals, begin = 0, time.perf_counter()
    while True:
        if not body.get("stream"):
            answer = await client.post("/v1/chat/completions", json=body)
            if answer.status_code == 200:
                text = answer.json()["choices"][0]["message"]["content"]
                return text, time.perf_counter() - begin, None, refusals
            status, wait = answer.status_code, answer.headers.get("retry-after")
        else:
            async with client.stream("POST", "/v1/chat/completions", json=body) as stream:
                if stream.status_code == 200:
                    first, pieces = None, []
                    async for piece in stream.aiter_lines():
                        if found := re.search(r'"delta": \{"content": ("(?:[^"\\]|\\.)*")', piece):
                            first = first or time.perf_counter() - begin
                            pieces.append(httpx.Response(200, content=found[1]).json())
                    return "".join(pieces), time.perf_counter() - begin, first, refusals
                status, wait = stream.status_code, stream.headers.get("retry-after")
        if status != 429:
            raise SystemExit(f"status {status}")
        refusals += 1
        await asyncio.sleep(float(wait or 1))


async def load(
    url: str, count: int, clients: int, memory: psutil.Process
) -> tuple[list, list[int], float, float]:
    """What `ask` gives for every request, the server's memory after each, and seconds and tokens of all of them."""
    images = []
    for index in range(IMAGES):
        buffer = io.BytesIO()
        Image.fromarray(image(index)).save(buffer, "PNG")
        images.append(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    found: list = [None] * count
    sizes: list[int] = []
    upcoming = iter(range(min(count, 64)))

    async def one_client(client: httpx.AsyncClient) -> None:
        for index in upcoming:
            found[index] = await ask(client, request(index, images))
            sizes.append(memory.memory_info().rss)

    limits = httpx.Limits(max_connections=clients)

    async def made(client: httpx.AsyncClient) -> float:
        lines = (await client.get("/metrics")).text.splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if line.startswith("mllm_jax_answer_tokens_total")
        )

    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await asyncio.gather(*(one_client(client) for _ in range(min(8, clients))))  # compiles
        found[:], sizes[:], upcoming = [None] * count, [], iter(range(count))
        before, begin = await made(client), time.perf_counter()
        await asyncio.gather(*(one_client(client) for _ in range(clients)))
        seconds = time.perf_counter() - begin
        return found, sizes, seconds, await made(client) - before


def main() -> None:
    """Measures and prints, or writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="run or model directory")
    parser.add_argument("--requests", type=int, default=1920)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args()
    wanted = alone(mllm_jax.load(args.model), args.requests)
    command = [sys.executable, "-m", "mllm_jax", "serve", "--model", f"mini={args.model}", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [*command, "--slots", str(args.slots)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        lines = iter(process.stdout.readline, "")
        url = next(found[1] for line in lines if (found := re.search(r"(http://\S+)/v1", line)))
        found, sizes, seconds, tokens = asyncio.run(
            load(url, args.requests, args.clients, psutil.Process(process.pid))
        )
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    finally:
        process.kill()
    whole = np.asarray([each[1] for each in found])
    first = np.asarray([each[2] for each in found if each[2] is not None])
    rows = [
        ("requests", f"{args.requests:,}"),
        ("clients at once", args.clients),
        ("requests/s", f"{args.requests / seconds:.1f}"),
        ("tokens of answers/s", f"{tokens / seconds:.0f}"),
        ("seconds to the whole answer, median", f"{np.median(whole):.2f}"),
        ("seconds to the whole answer, 95th percentile", f"{np.percentile(whole, 95):.2f}"),
        ("seconds to the first text, median", f"{np.median(first):.2f}"),
        ("seconds to the first text, 95th percentile", f"{np.percentile(first, 95):.2f}"),
        ("requests that had to try again (429)", sum(each[3] > 0 for each in found)),
        ("answers lost", sum(each is None for each in found)),
        (
            "answers that differ from those of `Model.generate`",
            sum(a[0] != b for a, b in zip(found, wanted, strict=True)),
        ),
        ("server's memory after the first tenth, MB", f"{sizes[len(sizes) // 10] / 1e6:.0f}"),
        ("server's memory after the last, MB", f"{sizes[-1] / 1e6:.0f}"),
        ("exit code after SIGTERM", code),
    ]
    shown = page.table(("", "figure"), rows)
    print(shown)
    if args.write:
        page.write_section(
            "serve_load",
            "## The server under load",
            f"`benchmarks/serve_load.py`: {args.clients} clients, each of which asks again as soon as it has its "
            f"answer, ask the quickstart's model {args.requests:,} questions about {IMAGES} images: as many as "
            f"{args.clients} people ask in an hour who ask every two minutes. {args.slots} answers of at most "
            f"{NEW_TOKENS} tokens are made at once. Half are streamed, a quarter is drawn at a temperature. Server and "
            "clients share the machine: "
            f"{page.machine('jax', 'uvicorn')}.",
            shown,
        )


if __name__ == "__main__":
    main()
