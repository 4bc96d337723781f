"""LLaVA-1.5-7B's shapes on one GPU, ours beside torch's, in under 8 minutes: parity, training, decoding.

    python benchmarks/gpu.py --out=gpu                       # on the GPU machine; no network, random weights
    JAX_PLATFORMS=cpu python benchmarks/gpu.py --out=gpu --tiny     # the same logic at small shapes

Needs the model's packages, `ml-collections` among them (a small wheel of Python files that can be carried along), and
for the other side torch and transformers; no tensorflow-datasets and no grain. Each section runs in a process of its
own, so that it has the whole card, and is left out with a line saying so where too little of `--minutes` is left.
OUT gets `results.json` and `table.md` after every section, and `log.txt`.

* peak: the card's own matrix rate (bfloat16, 8192 x 8192 x 8192) and copy bandwidth, the 100 % of everything below.
* parity: outputs and gradients of every attention backend on packed rows, against "xla" in float32.
* pretrain: connector alone, LLM and tower frozen in bfloat16, captions packed to 2,560 tokens.
* finetune: connector and LLM, packed to 4,096 tokens with lengths like LLaVA-665k's. Parameters and AdamW's states are
  bfloat16, because 16 bytes a parameter do not fit 80 GB: the time is that of the real shapes, but nobody should train
  so. `--param_dtype=float32` measures the usual master copies with as many layers as fit. Out of memory, a section
  tries fewer layers, and the table says how many ran.
* decode: greedy, one image and a question, 128 new tokens.

MFU counts what the mathematics needs and nothing that is computed again: forward, the gradient of activations, and the
gradient of weights where they are trained; attention within segments only; no padding, no empty slots. torch gets rows
of the same shapes that are full, without segments, so that its fused causal attention applies: better than it could do
with padded or packed data.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import page

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
# (side, section, seconds without which it is not begun), most important first
PLAN = (
    ("ours", "peak", 30),
    ("ours", "parity", 40),
    ("ours", "pretrain", 60),
    ("torch", "pretrain", 40),
    ("ours", "finetune", 60),
    ("torch", "finetune", 40),
    ("ours", "decode", 50),
    ("torch", "decode", 40),
)
LIMIT = 110  # seconds of one section


def run_section(args: argparse.Namespace, sides: list[tuple[str, str]], seconds: float) -> list:
    """Runs sections of one side in a child; their results, as far as they came."""
    script = {"ours": "gpu_sections.py", "torch": "gpu_torch.py"}[sides[0][0]]
    found = args.out / "section.jsonl"
    found.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / script), f"--out={found}", *(name for _, name in sides)]
    command += [f"--attention={args.attention}"] * (sides[0][0] == "ours") + ["--tiny"] * args.tiny
    command += [f"--param_dtype={args.param_dtype}"]
    environment = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_OFFLINE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(
            args.out.absolute() / "compiled"
        ),  # a second run is mostly measuring
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    with open(args.out / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"\n==== {' '.join(command)}\n")
        log.flush()
        try:
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=seconds
            ).returncode
            failure = f"ended with exit code {code} (log.txt)" if code else ""
        except subprocess.TimeoutExpired:
            failure = f"stopped after {seconds:.0f} s"
    lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
    results = [json.loads(line) for line in lines]
    if failure:
        done = {result["section"] for result in results}
        begun = [name for _, name in sides if name in done][-1:]  # it may have failed on the way
        missing = [name for _, name in sides if name not in done]
        results += [{"side": sides[0][0], "section": name, "failed": failure} for name in missing or begun]
    return results


def measure(args: argparse.Namespace) -> list[dict]:
    """All sections within the time."""
    deadline = time.monotonic() + 60 * args.minutes
    results: list[dict] = []
    steps = [([(side, name)], least) for side, name, least in PLAN]
    if args.tiny:  # a start costs more than a section
        first = [(side, name) for side, name, _ in PLAN if side == "ours"]
        steps = [(first[:2], 0), (first[2:], 0), ([(s, n) for s, n, _ in PLAN if s == "torch"], 0)]
    for sections, least in steps:
        left = deadline - time.monotonic()
        if left < least:
            for side, name in sections:
                why = f"left out: {left:.0f} s left, needs {least}"
                results.append({"side": side, "section": name, "failed": why})
        else:
            begin = time.monotonic()
            limit = max(least, min(LIMIT, left)) if not args.tiny else left
            found = run_section(args, sections, limit)
            results += found
            names = ", ".join(f"{side} {name}" for side, name in sections)
            print(f"{names}: {time.monotonic() - begin:.0f} s", flush=True)
        (args.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        (args.out / "table.md").write_text(report(results), encoding="utf-8")
    return results


def report(results: list[dict]) -> str:
    """The results as Markdown."""
    peak = next((r for r in results if r["section"] == "peak" and "flops" in r), {})
    parts = []
    if peak:
        parts.append(
            f"{peak['device']}, jax {peak['jax']}: {peak['flops'] / 1e12:,.3g} TFLOP/s of bfloat16 matrix products, "
            f"{peak['bandwidth'] / 1e9:,.4g} GB/s of copies (bytes read plus written)."
        )
    parity = [r for r in results if r["section"] == "parity" and "backend" in r]
    if parity:
        rows = [
            (r["backend"], r["unavailable"], "", "")
            if "unavailable" in r
            else (r["backend"], f"{r['output']:.1e}", f"{r['gradient']:.1e}", f"{1e3 * r['seconds']:.2f}")
            for r in parity
        ]
        head = ("attention", "error of the output", "of gradients", "ms forward and backward")
        parts.append(page.table(head, rows))
    rows = []
    for r in results:
        if r["section"] in ("pretrain", "finetune") and "tokens_per_second" in r:
            mfu = r["model_flops"] / r["seconds"] / peak["flops"] if peak and "model_flops" in r else None
            rows.append(
                (
                    f"{r['section']}, {r['side']}",
                    r["layers"],
                    r["shape"],
                    f"{1e3 * r['seconds']:,.0f}",
                    f"{r['tokens_per_second']:,.0f}",
                    f"{100 * mfu:.1f}" if mfu is not None else "–",
                    f"{r['peak_bytes'] / 1e9:.1f}" if r.get("peak_bytes") else "–",
                    r["note"],
                )
            )
    if rows:
        head = (
            "stage",
            "LLM layers",
            "rows x tokens",
            "ms a step",
            "useful tokens/s",
            "MFU %",
            "peak GB",
            "how",
        )
        parts.append(page.table(head, rows))
    rows = [
        (
            r["side"],
            r["batch"],
            f"{r['tokens_per_second']:,.0f}",
            f"{1e3 * r['seconds'] / r['new_tokens']:.1f}",
        )
        for r in results
        if r["section"] == "decode" and "tokens_per_second" in r
    ]
    if rows:
        head = ("greedy decoding", "batch", "tokens/s, prompt included", "ms a token")
        parts.append(page.table(head, rows))
    failed = [f"* {r['side']}, {r['section']}: {r['failed']}" for r in results if "failed" in r]
    return "\n\n".join([*parts, "\n".join(failed)]).strip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for results")
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything")
    parser.add_argument("--attention", default="auto", help="backend of the model")
    parser.add_argument("--param_dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    text = report(measure(args))
    print(text)
    if args.write:
        page.write_section("gpu", f"## One GPU\n\n{text}")


if __name__ == "__main__":
    main()
