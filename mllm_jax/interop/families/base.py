"""What a model family is: a reader and a writer of its config.json and a weight-name table."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from mllm_jax import limits
from mllm_jax.interop.rules import Rule
from mllm_jax.models.rope import frequencies

Json = Mapping[str, Any]

# Keys of transformers' configs that do not change what a trained model computes, beside those that a reader reads.
INERT = frozenset(
    """
    transformers_version architectures model_type dtype torch_dtype _name_or_path auto_map id2label label2id num_labels
    return_dict output_hidden_states output_attentions use_cache chunk_size_feed_forward is_encoder_decoder problem_type
    initializer_range initializer_factor layerscale_value attention_dropout hidden_dropout_prob drop_path_rate
    attention_probs_dropout_prob resid_pdrop embd_pdrop pretraining_tp
    bos_token_id eos_token_id pad_token_id
    projection_dim vision_use_head use_mask_token apply_layernorm reshape_hidden_states stage_names out_features
    out_indices
    use_sliding_window max_window_layers
    """.split()  # the last two: transformers has turned them into layer_types and sliding_window
)
# Keys of any config that change the computation and that no family here has, with the values that mean "not used".
OFF: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None, {}),
    "num_channels": (3, None),
    "use_bidirectional_attention": (None, False),
    "is_causal": (None, True),
    "pruned_heads": (None, {}),
    "add_cross_attention": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "attention_multiplier": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "logit_scale": (None, 1.0),
    "clip_qkv": (None,),
    "no_rope_layers": (None, []),
    "alibi": (None, False),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One encoder or LLM family.

    Attributes:
      model_type: of config.json (and of `hf_config`).
      architecture: the transformers class that loads an export.
      read: completed config.json -> our config. A key that it does not read must be in `INERT`, or have the
        default of transformers' class.
      write: our config -> config.json. A family can express a config exactly when reading back what it wrote
        gives the same config.
      rules: weight-name table of a config, in the canonical (hub) spelling without the tower's prefix.
      ignored: (regex, why) of tensors that are known and not used.
      fillers: (name, shape, value) of tensors that transformers wants and we do not have.
      spellings: further ways in which checkpoints spell its names, as in `parts.VISION_SPELLINGS`.
    """

    model_type: str
    architecture: str
    read: Callable[[Json], Any]
    write: Callable[[Any], dict[str, Any]]
    rules: Callable[[Any], tuple[Rule, ...]]
    ignored: tuple[tuple[str, str], ...] = ()
    fillers: Callable[[Any], tuple[tuple[str, tuple[int, ...], float], ...]] = lambda config: ()
    spellings: tuple[tuple[tuple[str, str], ...], ...] = ()

    def config(self, fields: Json) -> Any:
        """Our config of a config.json of this family; every key that changes the computation is read or refused.

        Raises:
          ValueError: naming the key.
        """
        check_sizes(fields)
        for key, off in OFF.items():
            if key in fields and fields[key] not in off:
                raise ValueError(f"{key}={fields[key]!r} is not supported")
        read = _Read(complete(self.model_type, fields))
        try:
            config = self.read(read)
        except (KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
            raise ValueError(
                f"not a {self.model_type} configuration ({type(error).__name__}: {error})"
            ) from None
        defaults = _defaults(self.model_type)
        for key in defaults.keys() - read.keys_read - INERT - OFF.keys():
            if read.get(key) != defaults[key]:
                raise ValueError(
                    f"{key}={read.get(key)!r} is not supported: what it changes is not known here (default "
                    f"{defaults[key]!r})"
                )
        check_geometry(config)
        return config


class _Read(dict):
    """A dict that remembers which of its keys were read."""

    def __init__(self, fields: Json):
        super().__init__(fields)
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)


SIZES = {
    "num_hidden_layers": "MAX_LAYERS",
    "vocab_size": "MAX_VOCABULARY",
    "max_position_embeddings": "MAX_POSITIONS",
    "image_size": "MAX_IMAGE_SIDE",
    **dict.fromkeys(
        (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "patch_size",
            "num_patches",
            "num_register_tokens",
        ),
        "MAX_WIDTH",
    ),
}


def check_sizes(fields: Json) -> None:
    """Refuses sizes of a config.json that are no sizes, or so large that reading them would exhaust the machine.

    Raises:
      ValueError: naming the key.
    """
    for key, name in SIZES.items():
        value = fields.get(key)
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise ValueError(f"{key}={value!r} must be a whole number")
        if value is None:
            continue
        if value < (0 if key == "num_register_tokens" else 1):
            raise ValueError(f"{key}={value} must be positive")
        limits.check(name, value, key)


_COUNTS = (
    "width",
    "depth",
    "heads",
    "mlp_width",
    "patch",
    "image_size",
    "vocab",
    "kv_heads",
    "head_width",
    "max_positions",
)
_LARGEST = 1e30  # of any number of a config, as they are computed with in float32


def check_geometry(config: Any) -> None:
    """Refuses a config whose parts do not fit each other.

    Raises:
      ValueError: naming what does not.
    """
    for name in _COUNTS:
        value = getattr(config, name, 1)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive whole number")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, float) and not abs(each) < _LARGEST:
                raise ValueError(f"{field.name}={value!r} is not a number that float32 can hold")
    if not isinstance(config.eps, int | float) or not 0 <= config.eps < 1:
        raise ValueError(f"the norms' eps is {config.eps}")
    if hasattr(config, "widths"):
        return  # a ConvNeXt, which has checked itself
    if hasattr(config, "patch"):
        fits = config.width % config.heads == 0 and config.patch <= config.image_size
        what = f"width {config.width}, {config.heads} heads, patches of {config.patch} in {config.image_size} pixels"
    else:
        fits = config.heads % config.kv_heads == 0 and config.head_width % 2 == 0
        what = f"{config.heads} heads of {config.head_width}, {config.kv_heads} key-value heads"
        _check_positions(config)
    if not fits:
        raise ValueError(f"these sizes do not fit each other: {what}")


def _check_positions(config: Any) -> None:
    if not 0 < config.rope_theta < _LARGEST:
        raise ValueError(f"rope_theta={config.rope_theta} must be positive and below {_LARGEST:g}")
    if not all(type(window) is int and window >= 0 for window in config.windows):
        raise ValueError(f"sliding_window={config.windows[0]!r} must be a whole number")
    if (scale := config.attention_scale) is not None and not (isinstance(scale, int | float) and scale > 0):
        raise ValueError(f"query_pre_attn_scalar gives an attention scale of {scale}; it must be positive")
    for key, value in config.rope_scaling:
        number = isinstance(value, int | float) and abs(value) < _LARGEST
        if key != "rope_type" and value is not None and not number:
            raise ValueError(f"rope_parameters: {key}={value!r} must be a number")
    try:
        frequencies(
            config.rope_theta, int(config.head_width * config.rotary_fraction), dict(config.rope_scaling)
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"rope_parameters {dict(config.rope_scaling)} cannot be used ({told})") from error


@functools.cache
def _config_classes() -> Mapping[str, Any]:
    # Imported late: transformers takes seconds.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING


@functools.cache
def _defaults(model_type: str) -> Json:
    return _config_classes()[model_type]().to_dict()


def complete(model_type: str, fields: Json) -> dict[str, Any]:
    """config.json with the defaults of transformers' config class filled in and old spellings renamed.

    Published files leave out what equals a default, and rope settings changed their name in transformers 5.

    Raises:
      ValueError: values that transformers' config class refuses.
    """
    known = {key: value for key, value in fields.items() if key not in ("transformers_version", "model_type")}
    known = copy.deepcopy(known)  # transformers writes into nested settings
    for labels in ("num_labels", "id2label", "label2id"):  # of a classifier; transformers makes as many names
        known.pop(labels, None)
    try:
        return _config_classes()[model_type](**known).to_dict()
    except Exception as error:  # transformers' validation has its own exception types
        raise ValueError(f"not a valid {model_type} configuration: {error}") from error
