"""LLaVA's own entries in config.json (`mm_...` and their like): each is understood, without effect, or refused by name.

Sources: haotian-liu/LLaVA `llava/model/llava_arch.py`, `llava/train/train.py`; HJYao00/DenseConnector `dc/`;
LLaVA-VL/LLaVA-NeXT `llava/`; dvlab-research/MGM `mgm/`; Meituan-AutoML/MobileVLM `mobilevlm/`;
CircleRadon/TokenPacker `llava/model/`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from mllm_jax.interop import video_fields
from mllm_jax.interop.tile_fields import is_anyres
from mllm_jax.models.encoders import Encoder, EncodersConfig
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.models.vit import VisionConfig

DENSE = ("sti", "sci", "dci")
MOBILE = {"ldpnet": "ldp", "ldpnetv2": "ldpv2"}  # mm_projector_type of MobileVLM -> connector
LAYER_DEFAULT = -2
# TokenPacker's code knows one projector, whatever mm_projector_type says; only its configs have one of these entries.
_FACTORS = ("scale_factor", "down_rate")  # the second in its first version
_DETAILS = (12, 16, 22, 23)  # hidden states that it reads of any tower

# How training was done, where files were, what the tokenizer does: nothing that the trained model computes.
_TRAINING = re.compile(
    r"mm_projector_lr|mm_vision_tower_lr|mm_tunable_parts|mm_hidden_size(_aux)?|mm_vision_tower|vision_tower_pretrained"
    r"|use_mm_proj|(un)?freeze_.*|tune_.*|tokenizer_.*|delay_load|pretrain_.*|optimize_vision_tower|drop_path"
)
# Entries that change the computation, with the values that this library computes.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "mm_vision_select_feature": (None, "patch"),
    "mm_use_im_start_end": (None, False),
    "mm_use_im_patch_token": (None, False),
    "mm_resampler_type": (None, ""),
    "mm_patch_merge_type": (None, "", "flat"),
    "image_aspect_ratio": (
        None,
        "",
        "pad",
        "square",
        "original",
    ),  # `data.aspect` of a run chooses between them
    "s2": (None, False),
    "s2_scales": (None, ""),
    "add_faster_video": (None, False),
    "use_pos_skipping": (None, False),
    "mm_vision_tower_aux": (None, ""),
    "image_size_aux": (None, 0),
    "image_grid": (None, 1),
    "image_global": (None, False),
}
# Mini-Gemini's second encoder and what belongs to it: read by `encoders_of` where there is one.
_FINE = ("mm_vision_tower_aux", "image_size_aux", "image_grid", "image_global")
# These say nothing unless one of the entries above uses them.
_FOLLOWING = ("image_grid_pinpoints", "image_crop_resolution", "image_split_resolution", "pos_skipping_range",
              "faster_token_stride", "force_sample", "max_num_vid", "mm_spatial_pool_out_channels",
              "mm_perceiver_depth", "mm_perceiver_latents", "mm_perceiver_ff_mult", "mm_perceiver_pretrained",
              "mm_qformer_depth", "mm_qformer_latents", "mm_qformer_pretrained")  # fmt: skip
_READ = ("mm_projector_type", "mm_dense_connector_type", "mm_vision_select_layer", *video_fields.KEYS)


def check_fields(fields: Mapping[str, Any], where: str, class_token: bool = True) -> None:
    """Refuses entries that make the checkpoint compute something that this library does not.

    Args:
      class_token: the tower has one; without it there is no choice of features.

    Raises:
      ValueError: naming the entry and what is supported.
    """
    read = (*_READ, *(_FINE if fields.get("mm_vision_tower_aux") else ()))
    if is_anyres(fields.get("image_aspect_ratio")):
        read += ("image_aspect_ratio", "mm_patch_merge_type")  # by `tile_fields.read_llava`
    for key, value in fields.items():
        if key in SUPPORTED and key not in read:
            free = key == "mm_vision_select_feature" and not class_token and value == "cls_patch"
            if not free and (isinstance(value, dict | list) or value not in SUPPORTED[key]):
                wanted = " or ".join(repr(each) for each in SUPPORTED[key] if each not in (None, ""))
                raise ValueError(
                    f"{where}: {key}={value!r} is not supported; supported: {wanted or 'not set'}"
                )
            continue
        known = key in (*read, *_FOLLOWING) or _TRAINING.fullmatch(key) or not key.startswith("mm_")
        if not known and not (value is None or value is False or value == ""):  # 0 == False
            raise ValueError(f"{where}: {key}={value!r}: what this entry changes is not known here")


def connector_of(fields: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The connector that the entries name, and those of its options that they say.

    Raises:
      ValueError: no connector here computes it.
    """
    projector = fields.get("mm_projector_type") or "linear"
    if isinstance(projector, str):
        projector = MOBILE.get(projector, projector)
    dense = fields.get("mm_dense_connector_type")
    factor = next((key for key in _FACTORS if fields.get(key) is not None), "")
    if dense in (None, "", "none"):
        if not factor:
            return projector, {}
        if type(fields[factor]) is not int or fields[factor] < 1:
            raise ValueError(f"{where}: {factor}={fields[factor]!r} must be a positive whole number")
        return "token_packer", {"factor": fields[factor], "layers": _DETAILS}
    if dense not in DENSE:
        raise ValueError(f"{where}: mm_dense_connector_type={dense!r}; supported: {', '.join(DENSE)}, none")
    if factor or projector != "mlp2x_gelu":
        key = factor or "mm_projector_type"
        raise ValueError(f"{where}: mm_dense_connector_type={dense!r} with {key}={fields.get(key)!r}")
    return dense, {}


def write_fields(model: ModelConfig) -> dict[str, Any]:
    """The entries that say connector and hidden state, as they are read by `connector_of` and `select_layer_of`."""
    dense = {"mm_dense_connector_type": model.connector} if model.connector in DENSE else {}
    read = 3 if model.connector in ("sci", "dci") else 1  # F and two more side by side
    packer = {_FACTORS[0]: model.make_connector().factor} if model.connector == "token_packer" else {}
    mobile = {connector: theirs for theirs, connector in MOBILE.items()}
    named = mobile.get(model.connector, model.connector)
    return {
        "mm_projector_type": "mlp2x_gelu" if dense or packer else named,
        **dense,
        **packer,
        "mm_hidden_size": read * model.vision.width,
        "mm_vision_select_layer": model.select_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }


def encoders_of(fields: Mapping[str, Any], where: str, first: VisionConfig, fine: Encoder) -> EncodersConfig:
    """Mini-Gemini's encoders: fine features of the second are mined into those of the first.

    Raises:
      ValueError: an entry of the wrong type.
    """
    size, grid = fields.get("image_size_aux", 320), fields.get("image_grid") or 1
    for key, value in (("image_size_aux", size), ("image_grid", grid)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{where}: {key}={value!r} must be a positive whole number")
    if (overview := fields.get("image_global") or False) not in (True, False):
        raise ValueError(f"{where}: image_global={overview!r} must be true or false")
    fine = dataclasses.replace(
        fine, mean=first.mean, std=first.std
    )  # both see pixels of the first one's processor
    return EncodersConfig((first, fine), (first.image_size, size), "mining", grid, bool(overview))


def select_layer_of(fields: Mapping[str, Any], where: str, class_token: bool) -> int:
    """The selected hidden state.

    Of a tower without class token (SigLIP) this layout deletes the last block and takes what is then last, whatever
    the config says.

    Raises:
      ValueError: not a whole number.
    """
    layer = fields.get("mm_vision_select_layer", LAYER_DEFAULT)
    if type(layer) is not int:
        raise ValueError(f"{where}: mm_vision_select_layer={layer!r} must be one whole number")
    return layer if class_token else LAYER_DEFAULT
