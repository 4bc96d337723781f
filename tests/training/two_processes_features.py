"""One of two processes that fill feature caches together; see test_features.py.

Arguments: the coordinator's address, this process's index, a folder that both can see. The second process comes late.
Prints for a cache on the common disk, again, and for one on a disk of its own: how many pictures were missing, how many
this process encoded, and a digest of all features.
"""

import hashlib
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import tiny

from mllm_jax.data.feature_cache import FeatureCache, digest
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.rows import ImageReader
from mllm_jax.data.samples import Sample
from mllm_jax.models import mllm
from mllm_jax.parallel.mesh import make_mesh, use_mesh
from mllm_jax.training import features

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
index, root = jax.process_index(), pathlib.Path(sys.argv[3])
model = tiny.model_config()
tower = tiny.random_params(mllm.abstract_params(model))["vision"]
reader = ImageReader(ImageProcessor.clip(tiny.IMAGE_SIZE))
turns = ({"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "ok"})
source = [Sample(str(i), (tiny.png(i % 9),), turns) for i in range(12)]  # 9 pictures

wrote = []
write = FeatureCache.write
FeatureCache.write = lambda cache, pictures, values: (wrote.extend(pictures), write(cache, pictures, values))

found = []
with use_mesh(make_mesh({"data": -1, "fsdp": 1, "tensor": 1})):
    for place in ("common", "common", f"own{index}"):
        time.sleep(0.5 * index)
        wrote.clear()
        cache = features.open_cache(root / place, model, tower, reader, "float32")
        missing = features.fill(cache, {"a": source}, model, tower, reader, shard_bytes=1)
        values = b"".join(cache.read(digest(sample.images[0]))[0].tobytes() for sample in source)
        found.append([missing, len(set(wrote)), len(wrote), hashlib.sha256(values).hexdigest()])
print(json.dumps(found))
