"""Every LLM family against transformers (torch): hidden states, logits, greedy tokens, round trip."""

import jax
import numpy as np
import pytest

from mllm_jax import interop

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from parity_cases import LLM_SIZE, LLMS  # noqa: E402
from parity_cases import tokens as make_tokens  # noqa: E402
from torch_oracle import assert_close, decoder_states, greedy, randomize, save  # noqa: E402


def reference(name):
    """A tiny random torch model of a family."""
    family, changes = LLMS[name]
    config = getattr(transformers, f"{family}Config")(**{**LLM_SIZE, **changes})
    config._attn_implementation = "eager"  # Gemma 2's soft-capping exists only there
    return randomize(getattr(transformers, f"{family}ForCausalLM")(config))


@pytest.mark.parametrize("name", LLMS)
def test_parity_and_round_trip(name, tmp_path):
    theirs = reference(name)
    save(theirs, tmp_path / "a")
    config, params = interop.llm_config(tmp_path / "a"), interop.load_llm(tmp_path / "a")
    tokens = make_tokens(17)
    with torch.no_grad():
        out = theirs(torch.tensor(tokens), output_hidden_states=True)
    states, logits = decoder_states(config, params, tokens)
    assert len(out.hidden_states) == len(states) == 4
    for k, (a, b) in enumerate(zip(states, out.hidden_states, strict=True)):
        assert_close(a, b, f"{name} hs[{k}]")
    assert_close(logits, out.logits, f"{name} logits")

    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor(tokens), max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=True
        )
    np.testing.assert_array_equal(greedy(config, params, tokens, 12), expected[:, 17:].numpy())

    interop.save_llm(tmp_path / "b", config, params)
    jax.tree.map(np.testing.assert_array_equal, interop.load_llm(tmp_path / "b"), params)
    assert interop.llm_config(tmp_path / "b").block_windows == config.block_windows
    again, info = type(theirs).from_pretrained(
        tmp_path / "b", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with torch.no_grad():
        assert_close(again(torch.tensor(tokens)).logits, out.logits, f"{name} logits of the export")


def test_an_unknown_family_names_the_supported_ones(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match=r"'mamba' is not supported; supported: llama, mistral, qwen2"):
        interop.llm_config(tmp_path)


def test_an_unknown_rope_type_is_an_error(tmp_path):
    rope = '{"rope_type": "dynamic", "factor": 2.0}'
    (tmp_path / "config.json").write_text(f'{{"model_type": "llama", "rope_scaling": {rope}}}')
    with pytest.raises(ValueError, match="rope_type 'dynamic' is not supported"):
        interop.llm_config(tmp_path)
