"""From the arguments of a harness's command line to a model that it can ask."""

from collections.abc import Mapping
from typing import Any

from mllm_jax import compilation_cache
from mllm_jax.config import ConfigError, declared, default_of
from mllm_jax.console import complain
from mllm_jax.harness.adapter import Adapter
from mllm_jax.inference.load import load
from mllm_jax.parallel import cpu_devices
from mllm_jax.parallel.mesh import ANSWERING_RULES, make_mesh, use_mesh
from mllm_jax.schema import did_you_mean

LOADING = ("template", "stage", "aspect", "dtype", "tower", "tokenizer")
ASKING = ("max_new_tokens", "overlong", "seed")
GROUPS = {"mesh": "mesh", "video": "model.video"}  # prefix -> keys of the configuration
BATCH_SIZE = 16


def make_adapter(path: str, arguments: Mapping[str, Any], batch_size: int | str, *, chat: bool) -> Adapter:
    """Loads a model onto all devices of this machine.

    Args:
      path: as in `inference.load.load`; "" where `arguments` has it as `pretrained`.
      arguments: `LOADING`, `ASKING` and `GROUP.KEY`.
      batch_size: "auto" = 16.
      chat: as in `Adapter`.

    Raises:
      ConfigError: an argument that is not known, a value of another type, or not a model.
    """
    arguments = dict(arguments)
    path = path or arguments.pop("pretrained", "")
    groups: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    for name in list(arguments):
        group, _, key = name.partition(".")
        if key and group in GROUPS:
            value = arguments.pop(name)
            if problem := declared(f"{GROUPS[group]}.{key}").problem(value):
                raise ConfigError(f"--model_args: {name!r} {problem}")
            groups[group][key] = value
        elif name == "device":
            raise ConfigError(
                "--device is not read: JAX takes what it finds, or JAX_PLATFORMS=cpu, cuda, tpu"
            )
        elif name not in (*LOADING, *ASKING):
            known = ("path", *LOADING, *ASKING, *(f"{each}." for each in GROUPS))
            raise ConfigError(
                f"--model_args: no argument {name!r}; {did_you_mean(name, known)}known: {', '.join(known)}"
            )
    if not path:
        raise ConfigError("--model_args path=DIRECTORY names the model: a run, a model directory or a hub id")
    size = BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
    mesh_config = {**default_of("mesh"), **groups["mesh"]}
    cpu_devices.divide(mesh_config["cpu_devices"])
    if problem := compilation_cache.use(compilation_cache.DEFAULT):
        complain(problem)
    mesh = make_mesh(mesh_config)
    with use_mesh(mesh, ANSWERING_RULES):
        given = {name: str(arguments[name]) for name in LOADING if name in arguments}
        model = load(str(path), mesh=mesh, **given)
    asking = {name: arguments[name] for name in ASKING if name in arguments}
    return Adapter(model, chat=chat, batch_size=size, video=groups["video"], **asking)
