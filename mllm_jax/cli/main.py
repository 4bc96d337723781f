"""The `mllm-jax VERB` command: a table of verbs, each one file in this folder.

A verb is one module with two functions::

    def add_arguments(parser: argparse.ArgumentParser) -> None: ...
    def run(args: argparse.Namespace) -> int: ...        # the exit code

or only `main(arguments: list[str]) -> int`, where it takes a recipe (see `script`). Where it takes paths in buckets
(gs://), it names those options, "" for positional ones::

    BUCKETS = ("", "out")

And one row in `VERBS`. Modules are imported only when their verb is called, so `mllm-jax validate` does not wait for
JAX. The module's docstring is the description shown by `mllm-jax VERB --help`.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from mllm_jax import no_torch
from mllm_jax.console import write_anything
from mllm_jax.storage import expand_arguments

# verb -> (module, one-line help)
VERBS: dict[str, tuple[str, str]] = {
    "ask": ("mllm_jax.cli.ask", "ask a model about images or a video, once or in a conversation"),
    "chat": (
        "mllm_jax.cli.chat",
        "talk with a model about images or a video, in the terminal or the browser",
    ),
    "config": ("mllm_jax.cli.config", "every configuration key: type, default, meaning"),
    "convert": (
        "mllm_jax.cli.convert",
        "turn Parquet, WebDataset or JSON data sets into LLaVA-format samples",
    ),
    "eval": ("mllm_jax.cli.eval", "eval.py: answer benchmarks with a model, score them, write the report"),
    "export": (
        "mllm_jax.cli.export",
        "write a model for transformers, as safetensors or as Orbax parameters",
    ),
    "foundation": ("mllm_jax.cli.foundation", "pretrain the shipped mini vision tower and mini LLM again"),
    "import": (
        "mllm_jax.cli.import_",
        "read a published checkpoint (Hugging Face, LLaVA, PEFT) without torch",
    ),
    "inspect": ("mllm_jax.cli.inspect", "say what a checkpoint is: geometry, parameters, dtype, memory"),
    "judge": ("mllm_jax.cli.judge", "have a GPT model judge answers where a benchmark needs it"),
    "plan": ("mllm_jax.cli.plan", "what a recipe needs on a machine that is not here, and its best speed"),
    "prepare": ("mllm_jax.cli.prepare", "write all data of a recipe before training, in parallel processes"),
    "probe": ("mllm_jax.cli.probe", "linear probes of a vision tower"),
    "push": ("mllm_jax.cli.push", "upload an export or a run to the Hugging Face hub"),
    "report": ("mllm_jax.cli.report", "one page of one or several evaluated runs, side by side"),
    "score": ("mllm_jax.cli.score", "score a file of answers like the benchmark's official script"),
    "score-all": ("mllm_jax.cli.score_all", "score a folder of answer files against the official results"),
    "serve": ("mllm_jax.cli.serve", "serve models to OpenAI's clients"),
    "study": ("mllm_jax.cli.study", "collect a sweep's results, compare them and write the study's pages"),
    "sweep": ("mllm_jax.cli.sweep", "run the cells of a recipe's sweep, several at once or as jobs"),
    "train": ("mllm_jax.cli.train", "train.py: train a recipe's stages and evaluate the model"),
    "validate": ("mllm_jax.cli.validate", "read a data set before training and report every problem in it"),
}


def overview() -> str:
    """The text of `mllm-jax --help`: usage and one line per verb."""
    width = max(map(len, VERBS))
    lines = ["usage: mllm-jax VERB [options]     (mllm-jax VERB --help for the options of a verb)", ""]
    lines += [f"  {verb:<{width}}  {text}" for verb, (_, text) in sorted(VERBS.items())]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
      argv: the arguments after the program name; `sys.argv[1:]` when None.

    Returns:
      The exit code: what the verb's `run` returned; 2 for a missing or unknown verb.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        from mllm_jax.schema import did_you_mean  # takes a while to import

        print(
            f"mllm-jax: unknown verb {verb!r}; {did_you_mean(verb, VERBS)}the verbs are:\n\n{overview()}",
            file=sys.stderr,
        )
        return 2
    if argv is None:  # nothing else is in this process that may want it
        no_torch.block()
    write_anything()
    module = importlib.import_module(VERBS[verb][0])
    if hasattr(module, "main"):
        return module.main(rest)
    parser = argparse.ArgumentParser(
        prog=f"mllm-jax {verb}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    try:
        rest = expand_arguments(rest, getattr(module, "BUCKETS", ()))
    except ValueError as error:
        parser.error(str(error))
    return module.run(parser.parse_args(rest))


if __name__ == "__main__":
    sys.exit(main())
