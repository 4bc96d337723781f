import http.server
import json
import threading

import pytest
from scoring_helpers import lines, one

from mllm_jax.cli.main import main
from mllm_jax.evaluation.benchmarks import JUDGE_TASKS
from mllm_jax.evaluation.judge.client import Client, JudgeError, send
from mllm_jax.evaluation.judge.requests import (
    build_requests,
    estimate,
    read_answers,
    store_judgements,
    summary,
    write_requests,
)
from mllm_jax.evaluation.predictions import Problems

KEY = "JUDGE_TEST_KEY"


class Endpoint:
    """An OpenAI-compatible server on 127.0.0.1 that answers by a function of the request's body."""

    def __init__(self, answer):
        self.answer, self.seen, self.headers = answer, [], []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((self.path, body))
                outer.headers.append(dict(self.headers))
                status, content = outer.answer(body, len(outer.seen))
                reply = {
                    "model": "judge-2024-01-01",
                    "system_fingerprint": "fp_1",
                    "created": 5,
                    "usage": {"prompt_tokens": 11, "completion_tokens": 2},
                    "choices": [{"message": {"content": content}}],
                }
                if not isinstance(content, str):
                    reply = content  # a whole reply, of any shape
                raw = json.dumps(reply).encode() if status == 200 else str(content).encode()
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", content)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def mm_vet(tmp_path):
    gold = {f"v1_{i}": {"question": f"Q{i}?", "answer": "a <AND> b", "capability": ["ocr"]} for i in range(4)}
    said = {key: f"I say {{question}} {key}" for key in gold}
    return one(tmp_path / "said.json", said), one(tmp_path / "mm-vet.json", gold)


def _requests(mm_vet, **kwargs):
    return build_requests("mm_vet", *mm_vet, Problems(), **kwargs)


def test_requests_hold_question_truth_and_answer(mm_vet, tmp_path):
    requests = _requests(mm_vet, runs=2)
    assert len(requests) == 8
    body = requests[1].body
    assert (body["model"], body["temperature"]) == ("gpt-4-0613", 0.0)
    # Braces in an answer are text, not a field.
    assert body["messages"][0]["content"].endswith("Q1? | a <AND> b | I say {question} v1_1 |")
    write_requests(tmp_path / "r.jsonl", requests)
    line = json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])
    assert (line["custom_id"], line["url"]) == ("mm_vet:0:v1_0", "/v1/chat/completions")
    write_requests(tmp_path / "r.jsonl", requests)
    with pytest.raises(ValueError, match="other requests"):
        write_requests(tmp_path / "r.jsonl", _requests(mm_vet, model="other"))


def test_llavas_own_answer_file(mm_vet, tmp_path):
    said = lines(tmp_path / "said.jsonl", [{"question_id": i, "text": f"mine {i}"} for i in range(4)])
    requests = build_requests("mm_vet", said, mm_vet[1], Problems())
    assert [r.question for r in requests] == ["v1_0", "v1_1", "v1_2", "v1_3"]


def test_own_prompt(mm_vet):
    body = _requests(mm_vet, user="T: {answer} P: {prediction} {x}")[0].body
    assert body["messages"][0]["content"] == "T: a <AND> b P: I say {question} v1_0 {x}"


def test_estimate(mm_vet):
    requests = _requests(mm_vet)
    cost = estimate(requests, price_in=30, price_out=60)
    assert cost["requests"] == 4
    assert cost["output_tokens"] == 12
    assert cost["cost"] == pytest.approx((cost["input_tokens"] * 30 + 12 * 60) / 1e6)
    assert estimate(requests)["cost"] is None


def test_transient_failures_are_retried_and_the_key_is_sent(mm_vet, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "secret-key")
    requests = _requests(mm_vet)
    with Endpoint(lambda body, n: (429, "slow down") if n in (1, 2) else (200, "0.5")) as server:
        client = Client(server.url, KEY, retries=3, first_wait=0.001)
        assert send(requests, tmp_path / "a.jsonl", client, workers=2) == 0
    assert len(server.seen) == 6
    assert server.headers[0]["Authorization"] == "Bearer secret-key"
    assert server.seen[0][0] == "/v1/chat/completions"
    text = (tmp_path / "a.jsonl").read_text()
    assert "secret-key" not in text
    answers = read_answers(tmp_path / "a.jsonl", requests)
    assert {row["model"] for row in answers.values()} == {"judge-2024-01-01"}


def test_refusals_stop_and_what_was_answered_is_kept(mm_vet, tmp_path):
    requests = _requests(mm_vet)
    with Endpoint(lambda body, n: (200, "1.0") if n == 1 else (401, "bad key")) as server:
        client = Client(server.url, KEY, retries=5, first_wait=0.001)
        with pytest.raises(JudgeError, match="HTTP 401: bad key"):
            send(requests, tmp_path / "a.jsonl", client, workers=1)
        assert len(server.seen) == 2
    assert list(read_answers(tmp_path / "a.jsonl", requests)) == ["mm_vet:0:v1_0"]


def test_an_endpoint_that_keeps_failing(mm_vet, tmp_path):
    with Endpoint(lambda body, n: (503, "down")) as server:
        client = Client(server.url, KEY, retries=2, first_wait=0.001)
        with pytest.raises(JudgeError, match="failed 3 times, last: HTTP 503"):
            send(_requests(mm_vet)[:1], tmp_path / "a.jsonl", client)
    assert len(server.seen) == 3
    with pytest.raises(JudgeError, match="failed 1 times"):
        Client(server.url, KEY, retries=0, timeout=2).complete({})
    with pytest.raises(ValueError, match="must start with"):
        Client("ftp://x")


def test_unreadable_replies_are_asked_again(mm_vet, tmp_path):
    requests = _requests(mm_vet)[:1]
    with Endpoint(lambda body, n: (200, "I think" if n == 1 else "0.3 because")) as server:
        assert send(requests, tmp_path / "a.jsonl", Client(server.url)) == 0
    with Endpoint(lambda body, n: (200, "no idea")) as server:
        assert send(requests, tmp_path / "b.jsonl", Client(server.url), attempts=2) == 1
        assert len(server.seen) == 2
    assert read_answers(tmp_path / "b.jsonl", requests) == {}


def test_resuming_after_a_half_written_line(mm_vet, tmp_path):
    requests = _requests(mm_vet)
    path = tmp_path / "a.jsonl"
    with Endpoint(lambda body, n: (200, "0.5")) as server:
        send(requests[:2], path, Client(server.url))
        path.write_text(path.read_text()[:-20])  # killed while writing
        left = [r for r in requests if r.id not in read_answers(path, requests)]
        assert len(left) == 3
        send(left, path, Client(server.url))
        assert len(server.seen) == 5
    assert len(read_answers(path, requests)) == 4
    with pytest.raises(ValueError, match="another model or prompt"):
        read_answers(path, _requests(mm_vet, model="other"))


def _judge(mm_vet, out, *more):
    said, gold = mm_vet
    return main(
        ["judge", "mm_vet", "--predictions", str(said), "--annotations", str(gold), "--out", str(out), *more]
    )


def test_the_verb_shows_the_cost_then_sends_then_scores(mm_vet, tmp_path, capsys):
    out = tmp_path / "out"
    assert _judge(mm_vet, out, "--price-in", "30", "--price-out", "60") == 1
    assert "4 to send" in capsys.readouterr().err
    assert not (out / "answers.jsonl").exists()
    assert _judge(mm_vet, out, "--send") == 2
    assert "--base-url" in capsys.readouterr().err
    with Endpoint(lambda body, n: (200, "0.5")) as server:
        assert _judge(mm_vet, out, "--send", "--yes", "--base-url", server.url) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["score"], result["n"]) == (50.0, 4)
        assert result["judge"]["judge_returned"] == {"judge-2024-01-01": 4}
        assert result["judge"]["judge_requested"] == ["gpt-4-0613"]
        assert result["judge"]["prompt_tokens"] == 44
        assert _judge(mm_vet, out, "--send", "--yes", "--base-url", server.url) == 0
        assert len(server.seen) == 4  # nothing is asked twice
    assert json.loads((out / "judge.json").read_text())["system_fingerprints"] == ["fp_1"]


def test_incomplete_answers_are_not_judged(mm_vet, tmp_path, capsys):
    said, gold = mm_vet
    one(said, {"v1_0": "x"})
    assert _judge((said, gold), tmp_path / "out") == 2
    assert "nothing is judged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_llava_bench_from_requests_to_score(tmp_path, capsys):
    folder = tmp_path / "bench"
    kinds = ("conv", "detail", "complex")
    questions = [
        {"question_id": i, "image": f"{i}.jpg", "text": f"Q{i}", "category": k} for i, k in enumerate(kinds)
    ]
    lines(folder / "questions.jsonl", questions)
    lines(folder / "context.jsonl", [{"image": f"{i}.jpg", "caption": [f"caption {i}"]} for i in range(3)])
    lines(folder / "answers_gpt4.jsonl", [{"question_id": i, "text": f"reference {i}"} for i in range(3)])
    said = lines(tmp_path / "said.jsonl", [{"question_id": i, "text": f"mine {i}"} for i in range(3)])
    args = ["judge", "llava_bench", "--predictions", str(said), "--annotations", str(folder), "--runs", "2"]
    with Endpoint(lambda body, n: (200, "8 6\nbecause")) as server:
        send_args = ["--out", str(tmp_path / "out"), "--send", "--yes", "--base-url", server.url]
        assert main([*args, *send_args]) == 0
        contents = [body["messages"][1]["content"] for _, body in server.seen]
        content = next(text for text in contents if "Q0" in text)
    assert all(part in content for part in ("caption 0", "Q0", "reference 0", "mine 0"))
    result = json.loads(capsys.readouterr().out)
    assert result["score"] == pytest.approx(75)
    assert set(result["subtasks"]) == {"llava_bench_conv", "llava_bench_detail", "llava_bench_complex"}
    assert len(result["runs"]) == 2


def test_mathvista_asks_only_where_no_rule_reads_the_answer(tmp_path, capsys):
    item = {"question_type": "free_form", "answer_type": "integer", "choices": None, "precision": None}
    rows = [
        {"pid": "1", **item, "answer": "7", "response": "7", "question": "How many?"},
        {"pid": "2", **item, "answer": "8", "response": "I count eight", "question": "How many?"},
    ]
    said = lines(tmp_path / "said.jsonl", rows)
    with Endpoint(lambda body, n: (200, " 8 ")) as server:
        args = ["--out", str(tmp_path / "out"), "--send", "--yes", "--base-url", server.url]
        assert main(["judge", "mathvista", "--predictions", str(said), *args]) == 0
        assert len(server.seen) == 1
    assert json.loads(capsys.readouterr().out)["score"] == 1.0


def test_video_qa_and_the_five_scores(tmp_path, capsys):
    rows = [{"id": f"v{i}", "question": "What?", "answer": "cat", "pred": "a cat"} for i in range(2)]
    said = lines(tmp_path / "qa.jsonl", rows)
    with Endpoint(lambda body, n: (200, "{'pred': 'yes', 'score': 4}")) as server:
        args = ["--out", str(tmp_path / "qa"), "--send", "--yes", "--base-url", server.url]
        assert main(["judge", "msvd_qa", "--predictions", str(said), *args]) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["score"], result["average_score"]) == (1.0, 4.0)
        folder = tmp_path / "chat"
        lines(folder / "generic_qa.jsonl", [{"video_name": "v", "Q": "q", "A": "a", "pred": "p"}])
        lines(folder / "temporal_qa.jsonl", [{"video_name": "v", "Q": "q", "A": "a", "pred": "p"}])
        two = {"video_name": "v", "Q1": "q1", "Q2": "q2", "A": "a", "pred1": "p1", "pred2": "p2"}
        lines(folder / "consistency_qa.jsonl", [two])
        args[1] = str(tmp_path / "five")
        assert main(["judge", "video_chatgpt", "--predictions", str(folder), *args]) == 0
        assert len(server.seen) == 2 + 5
    result = json.loads(capsys.readouterr().out)
    assert result["subtasks"] == {"CI": 4.0, "DO": 4.0, "CU": 4.0, "TU": 4.0, "CO": 4.0}


def test_every_task_fills_all_its_fields():
    for tasks in JUDGE_TASKS.values():
        for task in tasks:
            assert "{prediction}" in task.user or "{response}" in task.user
            assert task.messages({}, None)[-1]["role"] == "user"


def test_other_benchmarks_need_no_judge(tmp_path):
    with pytest.raises(ValueError, match="needs no judge"):
        build_requests("mme", tmp_path, None, Problems())
    with pytest.raises(ValueError, match="at least 1"):
        build_requests("mm_vet", tmp_path, None, Problems(), runs=0)


def test_judged_grades_are_stored_per_run(mm_vet, tmp_path):
    requests = _requests(mm_vet, runs=2)
    answers = {r.id: {"content": f"0.{r.run + 1}"} for r in requests}
    path, annotations = store_judgements(tmp_path / "judged", "mm_vet", requests, answers, *mm_vet)
    assert annotations == mm_vet[1]
    assert json.loads(path.read_text())["v1_3"] == [0.1, 0.2]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_does_not_follow_a_redirect(monkeypatch, status):
    monkeypatch.setenv(KEY, "secret-key")
    with (
        Endpoint(lambda body, n: (200, "stolen")) as thief,
        Endpoint(lambda body, n: (status, thief.url + "/chat/completions")) as server,
    ):
        client = Client(server.url, KEY, retries=2, first_wait=0.001)
        with pytest.raises(JudgeError, match=f"HTTP {status}.*redirects are not followed"):
            client.complete({})
    assert (len(server.seen), thief.seen) == (1, [])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://judge.example/v1", "--insecure-http"),
        ("http://127.0.0.1.example/v1", "--insecure-http"),
        ("https://user:hunter2@judge.example/v1", "without user, password"),
        ("https://judge.example/v1?api-key=hunter2", "without user, password"),
        ("https://judge.example:hunter2/v1", "no address"),
        ("https://judge.example/v1\nHost: hunter2", "no address|without user"),
        ("file:///etc/passwd", "without user|must start with"),
    ],
)
def test_addresses_that_no_key_is_sent_to(url, message):
    with pytest.raises(ValueError, match=message) as caught:
        Client(url)
    assert "hunter2" not in str(caught.value)


def test_plain_http_is_for_this_machine_or_said_aloud():
    for url in (
        "http://localhost:8000/v1",
        "http://127.0.0.1:8000/v1",
        "http://[::1]:8000/v1",
        "https://judge.example/v1",
    ):
        assert Client(url).url == f"{url}/chat/completions"
    assert (
        Client("http://node07:8000/v1/", insecure_http=True).url == "http://node07:8000/v1/chat/completions"
    )


@pytest.mark.parametrize("key", ["secret\n", "secret key", "se\x1bcret", "sécret"])
def test_a_key_that_cannot_be_one_is_refused_unseen(monkeypatch, key):
    monkeypatch.setenv(KEY, key)
    with pytest.raises(ValueError, match=KEY) as caught:
        Client("https://judge.example/v1", KEY)
    assert "cret" not in str(caught.value)


def test_an_echoed_key_and_terminal_commands_are_neither_shown_nor_stored(mm_vet, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "secret-key")
    requests = _requests(mm_vet)[:1]
    body = "x" * 295 + "Bearer secret-key \x1b]52;c;eA==\x07"
    with Endpoint(lambda *_: (401, body)) as server:
        with pytest.raises(JudgeError) as caught:
            send(requests, tmp_path / "a.jsonl", Client(server.url, KEY))
        server.answer = lambda *_: (401, body[250:])
        with pytest.raises(JudgeError, match=r"Bearer \[key\] \\x1b") as shown:
            send(requests, tmp_path / "a.jsonl", Client(server.url, KEY))
        server.answer = lambda *_: (200, "0.5 secret-key \x1b]52;c;eA==\x07\nbecause")
        assert send(requests, tmp_path / "a.jsonl", Client(server.url, KEY)) == 0
        server.answer = lambda *_: (200, {"error": "secret-key"})
        with pytest.raises(JudgeError, match=r"no choices.*\[key\]") as wrong:
            send(requests, tmp_path / "a.jsonl", Client(server.url, KEY, retries=0))
    stored = (tmp_path / "a.jsonl").read_text()
    for text in (str(caught.value), str(shown.value), str(wrong.value), stored):
        assert "secret" not in text
        assert "\x1b" not in text
    assert json.loads(stored)["content"] == "0.5 [key] \\x1b]52;c;eA==\\x07\nbecause"


@pytest.mark.parametrize(
    "reply",
    [
        [],
        {},
        {"choices": {}},
        {"choices": []},
        {"choices": ["x"]},
        {"choices": [{"message": "x"}]},
        {"choices": [{"message": {}}]},
        {"choices": [{"message": {"content": ["0.5"]}}]},
        {"choices": [{"message": {"content": 0.5}}]},
        3,
    ],
)
def test_replies_of_other_shapes_are_messages(mm_vet, tmp_path, reply):
    with Endpoint(lambda *_: (200, reply)) as server:
        client = Client(server.url, KEY, retries=1, first_wait=0.001)
        with pytest.raises(
            JudgeError, match=r"failed 2 times, last: (no choices in the reply|.* is no text)"
        ):
            send(_requests(mm_vet)[:1], tmp_path / "a.jsonl", client)


def test_odd_facts_beside_a_reply_are_left_out(mm_vet, tmp_path):
    reply = {
        "choices": [{"message": {"content": "0.5"}}],
        "model": ["x"], "usage": {"prompt_tokens": "many"}, "created": "now", "system_fingerprint": {},
    }  # fmt: skip
    requests, path = _requests(mm_vet)[:1], tmp_path / "a.jsonl"
    with Endpoint(lambda *_: (200, reply)) as server:
        assert send(requests, path, Client(server.url)) == 0
    stored = json.loads(path.read_text())
    assert [stored[key] for key in ("model", "usage", "created", "fingerprint")] == [None] * 4
    # The same from a file that somebody else wrote; a reply that is no text is asked again.
    lines(path, [stored | {"usage": [1], "created": "x"}])
    assert summary("mm_vet", read_answers(path, requests), 1)["prompt_tokens"] == 0
    lines(path, [stored | {"content": ["0.5"]}])
    assert read_answers(path, requests) == {}


def test_answers_are_not_appended_through_a_link(mm_vet, tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "answers.jsonl"
    victim.write_text("precious")
    path.symlink_to(victim)
    with Endpoint(lambda *_: (200, "0.5")) as server, pytest.raises(OSError, match="symbolic link"):
        send(_requests(mm_vet)[:1], path, Client(server.url))
    assert victim.read_text() == "precious"
