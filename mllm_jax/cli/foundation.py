"""`mllm-jax foundation`: pretrain the mini tokenizer, vision tower and LLM from a recipe (hours of CPU)."""

import argparse
import importlib.util
import pathlib

from mllm_jax.cli import shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", default="mini_foundation", help="recipe file with get_config(), or a shipped one's name"
    )
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="checkpoints and rendered images")
    parser.add_argument("--only", choices=("tower", "llm", "export"), help="one part instead of all")
    parser.add_argument(
        "--out", type=pathlib.Path, help="folder for mini_vit and mini_llm (default WORKDIR/assets)"
    )


def run(args: argparse.Namespace) -> int:
    from mllm_jax.mini.foundation import assets, llm, train

    spec = importlib.util.spec_from_file_location("recipe", shipped.recipe(args.config))
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config = recipe.get_config()
    args.workdir.mkdir(parents=True, exist_ok=True)
    tokenizer = train.prepare_tokenizer(config.tokenizer, args.workdir)
    if args.only in (None, "tower"):
        train.train_tower(config.tower, args.workdir / "tower")
    if args.only in (None, "llm"):
        llm.train_llm(config.llm, tokenizer, args.workdir / "llm")
    if args.only in (None, "export"):
        out = args.out or args.workdir / "assets"
        print(f"wrote {out}: {assets.export(config, args.workdir, out)}")
    return 0
