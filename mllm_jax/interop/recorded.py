"""What a checkpoint says of the model that its connector was trained in, compared with the model that takes it over.

Shapes alone do not tell: `average_pool`, `sti` and `mlp2x_gelu` have the same parameters and compute different tokens.
"""

import dataclasses
import pathlib
from typing import Any

from mllm_jax import connectors
from mllm_jax.data.templates import same_template
from mllm_jax.interop import native
from mllm_jax.interop.composite import EXTENSION, is_composite, read_composite
from mllm_jax.interop.hub import read_json
from mllm_jax.interop.llava_fields import check_fields, connector_of, select_layer_of
from mllm_jax.models.encoders import MINING
from mllm_jax.models.mllm import ModelConfig

TOWER = (
    "width",
    "heads",
    "mlp_width",
    "patch",
    "activation",
    "class_token",
    "pre_norm",
    "registers",
    "mean",
    "std",
)
MINED = "what is mined (model.vision.combine)"
LLM = ("width", "depth", "heads", "mlp_width")


def check(directory: pathlib.Path, model: ModelConfig, template: str | None = None) -> None:
    """Refuses a checkpoint whose connector was trained in another model than `model`.

    Args:
      directory: with our model.json, or with the config.json of a published layout; neither: nothing is known.
      template: the conversation template in use, compared where model.json records one.

    Raises:
      ValueError: naming every difference with both values.
    """
    here, there = {}, {}
    if native.is_native(directory):
        here, there = described(model), described(native.load_config(directory))
        known = native.load_extras(directory).get("template")
        if template and known and not same_template(template, known):
            here["eval.template"], there["eval.template"] = template, known
    elif (file := directory / "config.json").is_file() and is_composite(fields := read_json(file)):
        if "mm_vision_tower" in fields:  # the tower itself need not be here
            here, there = _of_llava(model, fields, str(file))
        else:
            here, there = described(model), described(read_composite(directory).model)
    elif file.is_file() and EXTENSION in fields:  # a connector alone
        here, there = described(model), described(native.model_from_json(fields[EXTENSION]))
    different = [
        f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]
    if different:
        raise ValueError(
            f"{directory} was trained as another model ({'; '.join(different)}); change the config, or set "
            "model.connector.allow_mismatch=True to take its weights all the same"
        )


def described(model: ModelConfig) -> dict[str, Any]:
    """What decides the tokens that a connector makes, by config key."""
    name, options = model.connector, dict(model.connector_options)
    values = {"model.connector.name": name, "model.vision.image_size": model.image_size}
    if name not in connectors.CONNECTORS:  # somebody's own, which is not installed here
        return values | {f"model.connector.{name}.{key}": _plain(value) for key, value in options.items()}
    options = connectors.options(name) | options
    asked = (
        model.make_connector().request()
    )  # in place of presets and explicit layers, which may mean the same
    options = {key: value for key, value in options.items() if key not in ("layers", "edges", "groups")}
    values |= {f"model.connector.{name}.{key}": _plain(value) for key, value in options.items()}
    values["hidden states"] = (asked.hidden, asked.means, asked.normalized_means)
    values["model.vision.max_patches"] = model.max_patches
    values[MINED] = model.vision.mining
    values["model.vision.select_layer"] = model.vision.resolve_layer(model.select_layer)
    for i, tower in enumerate(model.vision.towers):
        values |= {f"vision tower {i}: {key}": _plain(getattr(tower, key, None)) for key in TOWER}
    return values | {f"LLM: {key}": getattr(model.llm, key) for key in LLM}


def _of_llava(
    model: ModelConfig, fields: dict[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    class_token = getattr(model.vision.towers[0], "class_token", True)  # a ConvNeXt has no say in it
    check_fields(fields, where, class_token)
    layer = select_layer_of(fields, where, class_token)
    name, options = connector_of(fields, where)
    if name == model.connector:  # options that this layout does not know are ours to say
        options = dict(model.connector_options) | options
    trained = dataclasses.replace(
        model, select_layer=layer, connector=name, connector_options=tuple(sorted(options.items()))
    )
    there = described(trained) | {MINED: MINING["mining"] if fields.get("mm_vision_tower_aux") else ""}
    return described(model), there


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_plain(each) for each in value)
    return round(value, 6) if isinstance(value, float) else value
