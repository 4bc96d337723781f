"""Makes parity.npz and parity.json: what transformers (torch) computes for the tiny models of the parity tests.

    python tests/goldens/make_parity.py        (needs the `parity` extra)

The models' weights are not stored: `parity_cases.random_tensor` makes them from the tensors' names. parity.json holds
config.json and the names and shapes of the tensors as transformers saves them, parity.npz the hidden states, logits
and greedy tokens. With them `tests/interop/test_golden_parity.py` shows parity where torch is not installed.
"""

import json
import pathlib
import sys
import tempfile
import warnings

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "interop"))

import parity_cases as cases  # noqa: E402
from torch_oracle import tower_states  # noqa: E402


def randomized(model, directory):
    """The same model with the tests' weights, and the listing of its tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
    with safe_open(directory / "model.safetensors", "pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    tensors = {name: torch.tensor(cases.random_tensor(name, shape)) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    again = type(model).from_pretrained(directory, attn_implementation="eager").eval()
    return again, {"config": json.loads((directory / "config.json").read_text()), "tensors": shapes}


def main():
    listing, arrays = {}, {}

    def add(key, model):
        with tempfile.TemporaryDirectory() as directory:
            model, listing[key] = randomized(model, pathlib.Path(directory))
        return model

    for name, (family, changes) in cases.LLMS.items():
        config = getattr(transformers, f"{family}Config")(**{**cases.LLM_SIZE, **changes})
        model = add(f"llm/{name}", getattr(transformers, f"{family}ForCausalLM")(config))
        tokens = torch.tensor(cases.tokens(7, batch=1))
        with torch.no_grad():
            out = model(tokens, output_hidden_states=True)
            generated = model.generate(tokens, max_new_tokens=5, do_sample=False, eos_token_id=None)
        arrays[f"llm/{name}/states"] = torch.stack(out.hidden_states).numpy()
        arrays[f"llm/{name}/logits"] = out.logits.numpy()
        arrays[f"llm/{name}/greedy"] = generated[:, 7:].numpy()
    for name, (family, changes) in cases.TOWERS.items():
        config = getattr(transformers, f"{family}Config")(**{**cases.TOWER_SIZE, **changes})
        model = add(f"tower/{name}", getattr(transformers, f"{family}Model")(config))
        for height, width in ((12, 12), (20, 8)):
            states = tower_states(model, cases.pixels(height, width, batch=1))
            arrays[f"tower/{name}/{height}x{width}"] = torch.stack(list(states)).numpy()
    for name, (vision, text, changes) in cases.LLAVAS.items():
        config = transformers.LlavaConfig(
            vision_config=getattr(transformers, f"{vision}VisionConfig")(**cases.LLAVA_VISION),
            text_config=getattr(transformers, f"{text}Config")(**cases.LLAVA_TEXT),
            image_token_index=cases.IMAGE,
            vision_feature_select_strategy="default" if vision == "CLIP" else "full",
            **changes,
        )
        model = add(f"llava/{name}", transformers.LlavaForConditionalGeneration(config))
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor(cases.LLAVA_TOKENS),
                pixel_values=torch.tensor(cases.pixels(12, 12).transpose(0, 3, 1, 2)),
            ).logits
        arrays[f"llava/{name}/logits"] = logits.numpy()
    np.savez_compressed(HERE / "parity.npz", **arrays)
    text = json.dumps(listing, indent=None, sort_keys=True, separators=(",", ":"))
    (HERE / "parity.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
