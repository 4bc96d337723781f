"""Writes golden.json from the torch oracles of the tests beside it: `python tests/connectors/make_golden.py`."""

import argparse
import importlib
import json
import pathlib

GRID = (12, 12)


def main(arguments: list[str] | None = None) -> None:
    """One record per connector: some tokens, and the mean over all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_name("golden.json"))
    out = parser.parse_args(arguments).out
    from connector_torch import oracle_output  # late: --help needs no torch

    here, records, seen = pathlib.Path(__file__).parent, [], set()
    for path in sorted(set(here.glob("test_connector_*.py")) - {here / "test_connector_golden.py"}):
        module = importlib.import_module(path.stem)
        for case in getattr(module, "CASES", ()):
            if case.name in seen:
                continue
            seen.add(case.name)
            tokens = oracle_output(case, module.oracle, GRID)
            step = max(1, tokens.shape[1] // 4)
            records.append(
                {
                    "name": case.name,
                    "options": case.options,
                    "width": case.width,
                    "llm": case.llm,
                    "grid": GRID,
                    "shape": tokens.shape,
                    "step": step,
                    "values": tokens[:, ::step, :3].round(7).tolist(),
                    "mean": tokens.mean((0, 1)).round(7).tolist(),
                }
            )
    lines = ",\n".join(json.dumps(record) for record in sorted(records, key=lambda r: r["name"]))
    out.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
