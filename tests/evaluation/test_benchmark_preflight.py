"""Benchmarks are read before a model is trained for hours."""

import json
import re

import pytest
from ml_collections import ConfigDict

from mllm_jax.config import ConfigError, benchmark_config, check
from mllm_jax.evaluation.preflight import check_benchmarks
from mllm_jax.interop import load_tokenizer


def test_benchmarks_are_read_before_training(tiny_config, tmp_path):
    questions = [{"question_id": "q7", "image": "dog.png", "question": "what?", "answer": "a dog"}]
    (tmp_path / "test.json").write_text(json.dumps(questions))
    (tmp_path / "images").mkdir()
    tiny_config.eval.benchmarks = ConfigDict({"mine": benchmark_config()})
    values = tiny_config.eval.benchmarks.mine
    tokenizer = load_tokenizer(tiny_config.model.llm.path)

    def expect(error, message, **changes):
        for key, value in changes.items():
            values[key] = value
        check(tiny_config)
        with pytest.raises(error, match=re.escape(message)):
            check_benchmarks(tiny_config, tokenizer)

    expect(ConfigError, "'eval.benchmarks.mine.count' is 0")
    values.path = str(tmp_path / "test.json")
    expect(
        ConfigError,
        "'eval.benchmarks.mine': no benchmark 'vqaa'; did you mean 'vqa'?",
        kind="vqaa",
    )
    expect(FileNotFoundError, f"question 'q7' of {values.path} needs the image", kind="vqa")
    (tmp_path / "images" / "dog.png").write_bytes(b"")
    check_benchmarks(tiny_config, tokenizer)
    expect(ConfigError, "the 'vqa' benchmark has no option 'split'", options=ConfigDict({"split": "val"}))
    expect(FileNotFoundError, "'eval.benchmarks.mine.path': there is no nowhere.json", path="nowhere.json")
    expect(ConfigError, "the 'vqa' benchmark needs the path of its JSON file", path="", options=ConfigDict())
