"""One of two processes that count skipped samples, agree to stop and sample parameters; see test_metrics.py.

Arguments: the coordinator's address, this process's index, the work directory.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
import tiny

from mllm_jax.data.batch import Batch
from mllm_jax.inference.model import sampled
from mllm_jax.parallel import processes
from mllm_jax.parallel.mesh import make_mesh, use_mesh
from mllm_jax.parallel.row_parts import row_part
from mllm_jax.parallel.sharding import param_shardings
from mllm_jax.training.metrics import RunLog
from mllm_jax.training.step import to_device

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
index = jax.process_index()
KEYS = ("loss", "loss_weight", "label_tokens", "tokens", "positions", "grad_norm", "finite")
update = dict.fromkeys(KEYS, 1.0)
log = RunLog(pathlib.Path(sys.argv[3]), "pretrain", 2, 0, write=index == 0)
log.add(1, update, ["a"], [f"sample {i}" for i in range(2 + index)])
log.flush(1e-3)
log.add(2, update, ["a"], ["sample 9"] if index else [])
log.flush(1e-3)
log.close()
try:
    with processes.together("a file written"):
        if index:
            raise OSError("disk full")
except (OSError, processes.OtherProcessError) as error:
    print(type(error).__name__)
# Both hold a half of each row, so they bring the same rows.
mesh = make_mesh({"sequence": 2})
rows = Batch.spec(3, length=4).empty().replace(tokens=np.arange(12, dtype=np.int32).reshape(3, 4))
placed = to_device(rows, mesh)
with use_mesh(mesh):
    print(list(row_part(mesh)), placed.tokens.shape, int(jax.jit(lambda x: (x * x).sum())(placed.tokens)))
wishes = [(bool(index), True), (bool(index), False), (False, True), (True, True)]
print([processes.any_process(wish, now) for wish, now in wishes])
print([processes.same(b"common"), processes.same(b"own %d" % index)])
values = np.arange(4 * 50000, dtype=np.int32)
params = {"llm": {"embedding": values.reshape(4, 50000), "head": values[:40].reshape(4, 10)}}
mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
params = jax.device_put(params, param_shardings(params, mesh, tiny.model_config()))
shards = [leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(params)]
with use_mesh(mesh):
    found = [sampled(leaf)[-5:].tolist() for leaf in jax.tree.leaves(params)]
print(json.dumps([shards, found]))
