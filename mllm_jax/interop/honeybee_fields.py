"""Honeybee's projector config: each entry is understood, without effect on what is computed, or refused by name.

Source: khanrc/honeybee `honeybee/configuration_honeybee.py`, `honeybee/projectors/`, `configs/model_config/`, and
`honeybee/projectors.py` of its first release. Its D-Abstractor takes the entries of transformers' Deformable DETR.
"""

from collections.abc import Mapping
from typing import Any

from mllm_jax import limits

CONNECTORS = {"c-abs": "c_abstractor", "resampler": "resampler", "d-abs": "d_abstractor"}
POOLED = {"query": "query", "tgt": "target", "none": "none"}
FIRST = "visual_projector_config"  # as the first release calls it

# Entries that are read, by kind of projector, and our option for each.
OPTIONS = {
    "c-abs": {"depth": "depth", "mlp_depth": "mlp_depth", "hidden_size": "hidden"},
    "resampler": {
        "hidden_size": "hidden",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "intermediate_size": "mlp",
    },
    "d-abs": {
        "d_model": "hidden",
        "decoder_layers": "depth",
        "decoder_attention_heads": "heads",
        "decoder_n_points": "points",
        "decoder_ffn_dim": "mlp",
    },
}
# What stands for an entry that is missing: Deformable DETR's defaults, and those of the first release's config class.
DEFAULTS = {
    "c-abs": {"hidden_size": 1024},
    "resampler": {},
    "d-abs": {
        "d_model": 256,
        "decoder_layers": 6,
        "decoder_attention_heads": 8,
        "decoder_n_points": 4,
        "decoder_ffn_dim": 1024,
    },
}
DROPOUT = {"resampler": "attention_probs_dropout_prob", "d-abs": "dropout"}  # read for training that goes on
# Entries that change what is computed, with the values that this library computes.
SUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "c-abs": {},
    "resampler": {"layer_norm_eps": (1e-6,)},
    "d-abs": {
        "num_feature_levels": (1,),
        "activation_function": ("relu",),
        "except_cls": (True,),  # of the first release: the class token is no patch
        "manual_init_refPoints": (True,),  # reference points are parameters of their own
        "learnable_mRP": (True,),
    },
}
# Read below.
_READ = frozenset(
    "projector_type num_query_tokens num_queries num_eos_tokens pos_emb feature_layer_index encoder_hidden_size "
    "output_hidden_size pooled_v_target".split()
)
# Without effect: how parameters begin, what only training does, and which code computes the same.
_TRAINING = frozenset(
    """
    initializer_range init_std init_xavier_std attention_dropout activation_dropout encoder_layerdrop decoder_layerdrop
    disable_custom_kernels use_pretrained_backbone use_cls
    """.split()
    # use_cls: the first release's class sets it, and nothing reads it
)
# What Honeybee's config class, or Deformable DETR's, writes for every projector, whether this kind reads it or not. Of
# the detector only the decoder's layers are here: no backbone, no encoder, no heads for boxes and classes.
_OTHERS = frozenset(
    """
    hidden_size num_hidden_layers num_attention_heads intermediate_size attention_probs_dropout_prob layer_norm_eps
    prenorm dropout
    use_timm_backbone backbone backbone_config backbone_kwargs num_channels dilation position_embedding_type
    encoder_layers encoder_ffn_dim encoder_attention_heads encoder_n_points two_stage two_stage_num_proposals
    return_intermediate with_box_refine auxiliary_loss class_cost bbox_cost giou_cost mask_loss_coefficient
    dice_loss_coefficient bbox_loss_coefficient giou_loss_coefficient eos_coefficient focal_alpha
    max_position_embeddings
    """.split()
)
# Of every config of transformers 4: texts, classes, files.
_COMMON = frozenset(
    """
    _name_or_path _commit_hash _attn_implementation _attn_implementation_internal architectures model_type
    transformers_version torch_dtype dtype torchscript use_bfloat16 tf_legacy_loss return_dict return_dict_in_generate
    output_hidden_states output_attentions output_scores is_encoder_decoder is_decoder cross_attention_hidden_size
    tie_encoder_decoder tie_word_embeddings chunk_size_feed_forward max_length min_length do_sample early_stopping
    num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    finetuning_task id2label label2id num_labels tokenizer_class prefix bos_token_id pad_token_id eos_token_id
    sep_token_id decoder_start_token_id task_specific_params problem_type
    """.split()
)
_OFF: dict[str, tuple[Any, ...]] = {"pruned_heads": (None, {}), "add_cross_attention": (None, False)}


def connector_of(
    fields: Mapping[str, Any], where: str, vision_width: int, llm_width: int
) -> tuple[str, dict[str, Any], int]:
    """The connector of a Honeybee checkpoint, its options, and the hidden state that it reads.

    Args:
      fields: the whole config.json.
      vision_width, llm_width: C and D, which the projector's config repeats.

    Raises:
      ValueError: an entry that is missing, that is not known, or that changes the computation in a way that is not
        supported; it is named.
    """
    first = FIRST in fields
    projector = fields.get(FIRST if first else "projector_config")
    if not isinstance(projector, dict):
        raise ValueError(f"{where}: projector_config must describe the projector, not {projector!r}")
    kind = projector.get("projector_type")
    if not isinstance(kind, str) or kind not in CONNECTORS:
        raise ValueError(f"{where}: projector_type={kind!r}; supported: {', '.join(CONNECTORS)}")
    if first and kind == "resampler":
        raise ValueError(
            f"{where}: projector_type={kind!r} in {FIRST}: the first release has no resampler, so it is not known "
            "whether this one attends to the class token"
        )
    _check(projector, kind, where, {"encoder_hidden_size": vision_width, "output_hidden_size": llm_width})

    def read(key: str, is_one: type, default: Any = None) -> Any:
        value = projector.get(key, default)
        if value is None:
            raise ValueError(f"{where}: the projector's {key} is missing")
        if type(value) is not is_one:
            raise ValueError(f"{where}: {key}={value!r} must be {is_one.__name__}")
        if is_one is int:
            _check_size(value, key, where)
        return value

    options = {ours: read(key, int, DEFAULTS[kind].get(key)) for key, ours in OPTIONS[kind].items()}
    options["tokens"] = _tokens(fields, projector, where)
    options["end_tokens"] = read("num_eos_tokens", int, int(first))  # either release's default
    options["position_table"] = read("pos_emb", bool, False)
    if kind == "c-abs":
        options["prenorm"] = read("prenorm", bool, False)
    elif (key := DROPOUT[kind]) in projector:
        if not isinstance(rate := projector[key], int | float) or not 0 <= rate < 1:
            raise ValueError(f"{where}: {key}={rate!r} must be a rate")
        options["dropout"] = rate
    if kind == "d-abs":
        pooled = projector.get("pooled_v_target")
        if not isinstance(pooled, str) or pooled not in POOLED:
            raise ValueError(f"{where}: pooled_v_target={pooled!r}; supported: {', '.join(POOLED)}")
        options["pooled"] = POOLED[pooled]
    layer = projector.get("feature_layer_index", -1)
    if type(layer) is not int:
        raise ValueError(f"{where}: feature_layer_index={layer!r}; features of one layer are supported")
    return CONNECTORS[kind], options, layer


def _check(projector: Mapping[str, Any], kind: str, where: str, repeated: Mapping[str, int]) -> None:
    """Refuses what is not known, and what this library does not compute."""
    supported = {**_OFF, **SUPPORTED[kind]}
    known = {*OPTIONS[kind], *_READ, *_TRAINING, *_OTHERS, *_COMMON}
    for key, value in projector.items():
        if key in repeated and value != repeated[key]:
            raise ValueError(
                f"{where}: the projector's {key}={value!r}, but its neighbour has {repeated[key]}"
            )
        if key in supported:
            if value not in supported[key]:
                raise ValueError(
                    f"{where}: {key}={value!r} is not supported; supported: {supported[key][-1]!r}"
                )
        elif key not in known and not (
            value is None or value is False or value in ("", [], {})
        ):  # 0 == False
            raise ValueError(
                f"{where}: {key}={value!r}: what this entry of the projector changes is not known"
            )


def _tokens(fields: Mapping[str, Any], projector: Mapping[str, Any], where: str) -> int:
    """M, which may stand in three places (and must be the same in each)."""
    found = {
        "num_query_tokens": projector.get("num_query_tokens"),
        "num_queries": projector.get("num_queries"),
        "the model's num_query_tokens": fields.get("num_query_tokens"),
    }
    found = {key: value for key, value in found.items() if value is not None}
    if not found:
        raise ValueError(f"{where}: the projector's num_query_tokens is missing")
    if len(set(map(repr, found.values()))) > 1:
        raise ValueError(
            f"{where}: {', '.join(f'{key}={value!r}' for key, value in found.items())} must be the same number"
        )
    tokens = next(iter(found.values()))
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"{where}: {next(iter(found))}={tokens!r} must be a positive whole number")
    _check_size(tokens, "num_query_tokens", where)
    return tokens


def _check_size(value: int, key: str, where: str) -> None:
    if value < 0:
        raise ValueError(f"{where}: {key}={value} must not be negative")
    limits.check("MAX_LAYERS" if "layers" in key or "depth" in key else "MAX_WIDTH", value, f"{where}: {key}")
