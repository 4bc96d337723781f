"""Writes golden.json from the torch oracles of the tests beside it: `python tests/connectors/make_golden.py`."""

import importlib
import json
import pathlib

from connector_torch import oracle_output

GRID = (12, 12)


def main() -> None:
    """One record per connector: some tokens, and the mean over all."""
    here, records, seen = pathlib.Path(__file__).parent, [], set()
    for path in sorted(set(here.glob("test_connector_*.py")) - {here / "test_connector_golden.py"}):
        module = importlib.import_module(path.stem)
        for case in getattr(module, "CASES", ()):
            if case.name in seen:
                continue
            seen.add(case.name)
            out = oracle_output(case, module.oracle, GRID)
            step = max(1, out.shape[1] // 4)
            records.append(
                {
                    "name": case.name,
                    "options": case.options,
                    "width": case.width,
                    "llm": case.llm,
                    "grid": GRID,
                    "shape": out.shape,
                    "step": step,
                    "values": out[:, ::step, :3].round(7).tolist(),
                    "mean": out.mean((0, 1)).round(7).tolist(),
                }
            )
    lines = ",\n".join(json.dumps(record) for record in sorted(records, key=lambda r: r["name"]))
    (here / "golden.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
