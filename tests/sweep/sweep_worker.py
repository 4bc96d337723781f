"""A `mllm-jax sweep` of cells whose program is `sweep_program.py`.

python sweep_worker.py DIRECTORY STEP_SECONDS WORKERS
"""

import json
import pathlib
import sys

from mllm_jax.cli import sweep
from mllm_jax.config import resolved
from mllm_jax.recipes.mini import study_config
from mllm_jax.sweep.cells import make_cells
from mllm_jax.sweep.overrides import over

PROGRAM = pathlib.Path(__file__).with_name("sweep_program.py")
CONNECTORS = ("linear", "mlp2x_gelu", "average_pool")


def cells_in(directory, seeds=(0, 1)):
    variants = over("model.connector.name", CONNECTORS)
    return make_cells(variants, study_config("mlp2x_gelu"), (), seeds, directory)


def command_in(directory, seconds, failing=()):
    def command(cell):
        file = directory / f"{cell.name}.resolved"
        file.write_text(json.dumps(resolved(cell.config)))
        how = ["fail"] if cell.name in failing else []
        arguments = (cell.workdir(directory), file, directory / "starts", seconds)
        return [sys.executable, str(PROGRAM), *map(str, arguments), *how]

    return command


def main(directory, seconds, workers):
    directory = pathlib.Path(directory)
    directory.mkdir(exist_ok=True)
    cells = cells_in(directory)
    sys.exit(sweep.run_cells(cells, directory, "x.py", command_in(directory, seconds), int(workers), None))


if __name__ == "__main__":
    main(*sys.argv[1:])
