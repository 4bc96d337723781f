"""configs/llava15.py on tiny checkpoints that lie as the published ones do: both arguments, then on to transformers."""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from mllm_jax.cli.export import load_any
from mllm_jax.cli.main import main
from mllm_jax.data.conversations import Turn
from mllm_jax.data.templates import get_template
from mllm_jax.data.tokens import encode_prompt
from mllm_jax.inference import runs
from mllm_jax.interop import load_tokenizer
from mllm_jax.models import lora, mllm, paths

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from torch_oracle import assert_close, llava_batch, randomize  # noqa: E402

sys.path.append(str(pathlib.Path(__file__).parents[1] / "data"))
import tokenizer_files  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
SIDE = 56  # 16 patches of 14 x 14
QUESTION = "What is in the picture?"


def write_clip(directory):
    """A whole CLIP in one `.bin`, text half and old buffers included, as openai/clip-vit-large-patch14-336."""
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    vision = text | {"hidden_size": 32, "num_hidden_layers": 3, "image_size": SIDE, "patch_size": 14}
    config = transformers.CLIPConfig(text_config=text | ends, vision_config=vision, projection_dim=16)
    tensors = randomize(transformers.CLIPModel(config)).state_dict()
    for half, count in (("vision", 17), ("text", 77)):
        tensors[f"{half}_model.embeddings.position_ids"] = torch.arange(count)[None]
    directory.mkdir()
    torch.save(tensors, directory / "pytorch_model.bin")
    config.to_json_file(directory / "config.json", use_diff=False)
    processor = {
        "crop_size": SIDE, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": SIDE,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))


def write_vicuna(directory):
    """float16 `.bin` shards with old buffers, a SentencePiece model and no tokenizer.json, as lmsys/vicuna-7b-v1.5."""
    directory.mkdir()
    tokenizer_files.vicuna(directory)
    fields = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": len(load_tokenizer(directory)),
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_scaling": None,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(fields))
    model = randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))).half()
    tensors = dict(model.state_dict())
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    names, where = list(tensors), {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name].clone() for name in part}, directory / file)
        where |= dict.fromkeys(part, file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


def recipe(tuning, root):
    """The recipe with paths and sizes changed, nothing else."""
    spec = importlib.util.spec_from_file_location("llava15", ROOT / "configs" / "llava15.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(tuning)
    write_clip(root / "clip")
    write_vicuna(root / "vicuna")
    config.model.vision.path, config.model.llm.path = str(root / "clip"), str(root / "vicuna")
    config.model.vision.image_size = SIDE
    config.data.seq_len, config.data.threads = 160, 1
    samples = {f"{i:09d}": (1, [("\nWhat is it?", "a red cat")]) for i in range(3)}
    mixed = {
        f"{i:09d}": (int(i != 1), [(f"\n{QUESTION}", "A cat."), ("How many?", "One.")]) for i in range(4)
    }
    for name, entries in (("pretrain", samples), ("finetune", mixed)):
        stage = config.stages[name]
        source = stage.sources.main
        source.json, source.images = map(str, tiny.write_llava(root / name, entries))
        stage.batch_size = 2
    if tuning == "lora":
        config.stages.finetune.lora.rank = 4
    return config


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_both_stages_and_on_to_transformers(tuning, train, tmp_path):
    config = recipe(tuning, tmp_path)
    run, out = tmp_path / "run", tmp_path / "out"
    trained = paths.flatten(train.train(config, run, evaluate=False))
    assert any(path.endswith("lora_b") for path in trained) == (tuning == "lora")
    assert main(["export", "--from", str(run), "--to", str(out)]) == 0
    theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        out, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values())

    model, params, tokenizer = load_any(str(run))
    params = lora.merge(params, model.lora) if model.lora else params
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    model = dataclasses.replace(model, dtype="float32", lora=None)
    tokenizer = load_tokenizer(tokenizer)
    prompt = encode_prompt(
        "vicuna_v1", [Turn("human", ("", f"\n{QUESTION}"))], tokenizer, [model.visual_layout()]
    )
    assert (prompt.visual_index >= 0).sum() == 16
    ids = np.where(prompt.visual_index >= 0, theirs.config.image_token_index, prompt.tokens)[None]
    picture = np.random.default_rng(0).integers(0, 256, (70, 70, 3), np.uint8)
    ours = jax.jit(lambda p, b: mllm.apply(model, p, b))(
        params,
        llava_batch(ids, runs.image_processor(config)(picture)[None], theirs.config.image_token_index),
    )

    # A space behind <image> gives our ids, and the picture is square: docs/models.md says why.
    words = f"{get_template('vicuna_v1').first_open}<image> \n{QUESTION} ASSISTANT:"
    processor = transformers.AutoProcessor.from_pretrained(out)
    inputs = processor(images=Image.fromarray(picture), text=words, return_tensors="pt")
    assert inputs["input_ids"].tolist() == ids.tolist()
    with torch.no_grad():
        logits = theirs.eval()(**inputs).logits
    assert_close(ours, logits[..., : ours.shape[-1]], "logits")
