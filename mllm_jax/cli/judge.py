"""Have a GPT model judge answers, where a benchmark needs it, and score the judgements.

    mllm-jax judge mm_vet --predictions answers.json --annotations mm-vet.json --out judge/
    mllm-jax judge mm_vet ... --price-in 30 --price-out 60 --base-url https://api.openai.com/v1 --send

The first call writes OUT/requests.jsonl (OpenAI's batch format) and shows about how many tokens they
take and, with prices per million tokens, what they cost; nothing is sent. `--send` sends what is
unanswered to any OpenAI-compatible endpoint, with the key in the environment variable OPENAI_API_KEY
(or --key-variable), after a question or with --yes. Replies are stored as they come in
OUT/answers.jsonl with the judge's exact version; run the same command again to resume. Once all are
there, OUT/judged is scored.

The exit code is 0 for a complete score, 1 while judgements are missing and 2 for files or options in error.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_jax import files
from mllm_jax.console import complain, make_console, progress_bar
from mllm_jax.evaluation.benchmarks import JUDGE_TASKS, get_benchmark
from mllm_jax.evaluation.benchmarks.judged import Request
from mllm_jax.evaluation.judge.client import Client, JudgeError, send
from mllm_jax.evaluation.judge.requests import (
    ANSWERS,
    REQUESTS,
    SUMMARY,
    build_requests,
    estimate,
    read_answers,
    store_judgements,
    summary,
    write_requests,
)
from mllm_jax.evaluation.predictions import Problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mllm-jax judge`."""
    names = sorted(JUDGE_TASKS)
    parser.add_argument("benchmark", choices=names, metavar="BENCHMARK", help=", ".join(names))
    parser.add_argument("--predictions", required=True, metavar="P", help="the model's answers")
    parser.add_argument("--annotations", metavar="A", help="questions and reference answers")
    parser.add_argument("--out", required=True, metavar="DIR", help="where requests and replies are kept")
    parser.add_argument("--model", help="the judge (default: the one of the published numbers)")
    parser.add_argument("--runs", type=int, default=1, help="judge runs per question")
    parser.add_argument("--prompt", metavar="FILE", help="another user message with the task's {fields}")
    parser.add_argument("--price-in", type=float, metavar="X", help="price of a million input tokens")
    parser.add_argument("--price-out", type=float, metavar="X", help="price of a million output tokens")
    parser.add_argument("--send", action="store_true", help="send what is unanswered")
    parser.add_argument("--yes", action="store_true", help="send without asking")
    parser.add_argument("--base-url", metavar="URL", help="OpenAI-compatible endpoint, for --send")
    parser.add_argument(
        "--insecure-http",
        action="store_true",
        help="allow plain http:// to another machine of a trusted network",
    )
    parser.add_argument("--key-variable", default="OPENAI_API_KEY", metavar="NAME")
    parser.add_argument("--workers", type=int, default=4, help="requests in flight")
    parser.add_argument("--retries", type=int, default=6, help="after transient failures, with backoff")


def _show_cost(args: argparse.Namespace, open_requests: Sequence[Request], answered: int) -> None:
    cost = estimate(open_requests, args.price_in, args.price_out)
    money = "unknown, give --price-in and --price-out"
    if cost["cost"] is not None:
        money = f"about {cost['cost']:.2f}"
    complain(
        f"{answered} answered, {cost['requests']} to send: about {cost['input_tokens']} tokens in and "
        f"{cost['output_tokens']} out; cost: {money}"
    )


def _confirmed(args: argparse.Namespace) -> bool:
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise ValueError("--send needs --yes when nobody can be asked")
    return input("Send? [y/N] ").strip().lower() in ("y", "yes")


def _judge(args: argparse.Namespace) -> int:
    out, predictions = Path(args.out), Path(args.predictions)
    annotations = None if args.annotations is None else Path(args.annotations)
    user = None if args.prompt is None else Path(args.prompt).read_text(encoding="utf-8-sig")
    problems = Problems()
    requests = build_requests(args.benchmark, predictions, annotations, problems, args.model, args.runs, user)
    for kind, entry in problems.as_dict().items():
        complain(f"{kind}: {entry['count']}, first {entry['first']}")
    if problems.blocking:
        raise ValueError(f"{predictions}: some questions have no answer, or several; nothing is judged")
    write_requests(out / REQUESTS, requests)
    answers = read_answers(out / ANSWERS, requests)
    waiting = [request for request in requests if request.id not in answers]
    _show_cost(args, waiting, len(answers))
    if waiting and args.send:
        if not args.base_url:
            raise ValueError("--send needs --base-url, e.g. https://api.openai.com/v1")
        client = Client(args.base_url, args.key_variable, args.retries, insecure_http=args.insecure_http)
        if _confirmed(args):
            with progress_bar(make_console(sys.stderr)) as bar:
                task = bar.add_task("judging", total=len(waiting))
                send(waiting, out / ANSWERS, client, args.workers, progress=lambda: bar.advance(task))
        answers = read_answers(out / ANSWERS, requests)
        waiting = [request for request in requests if request.id not in answers]
    judge = summary(args.benchmark, answers, args.runs)
    files.write_json(out / SUMMARY, judge)
    if waiting:
        complain(f"{len(waiting)} judgements are missing, first {waiting[0].id}; no score")
        return 1
    judged = store_judgements(out / "judged", args.benchmark, requests, answers, predictions, annotations)
    result: dict[str, Any] = get_benchmark(args.benchmark).score(*judged)
    print(json.dumps(result | {"judge": judge}, indent=1, ensure_ascii=False))
    return 0 if result["complete"] else 1


def run(args: argparse.Namespace) -> int:
    """Writes, sends and scores; see the module's text for the exit code."""
    try:
        return _judge(args)
    except JudgeError as error:
        complain(f"\nmllm-jax judge: {error}\nThe same command resumes.")
        return 1
    except (ValueError, OSError) as error:
        complain(f"mllm-jax judge: {error}")
        return 2
