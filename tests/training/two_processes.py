"""One of two processes that count skipped samples and agree to stop; see test_metrics.py.

Arguments: the coordinator's address, this process's index, the work directory.
"""

import pathlib
import sys

import jax

from mllm_jax.parallel import processes
from mllm_jax.training.metrics import RunLog

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
index = jax.process_index()
update = dict.fromkeys(("loss", "label_tokens", "tokens", "positions", "grad_norm", "finite"), 1.0)
log = RunLog(pathlib.Path(sys.argv[3]), "pretrain", 2, 0, write=index == 0)
log.add(1, update, ["a"], [f"sample {i}" for i in range(2 + index)])
log.flush(1e-3)
log.add(2, update, ["a"], ["sample 9"] if index else [])
log.flush(1e-3)
log.close()
wishes = [(bool(index), True), (bool(index), False), (False, True), (True, True)]
print([processes.agreed(wish, now) for wish, now in wishes])
