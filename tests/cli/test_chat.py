"""`mllm-jax chat` on a tiny model: a conversation of streamed answers that can be stopped."""

import io

import tiny

from mllm_jax.cli.main import main
from mllm_jax.escape import terminal
from mllm_jax.inference.model import Model
from mllm_jax.interop import native

TOKENS = 12


def test_a_conversation_in_the_terminal(
    tiny_model, tiny_params, tiny_tokenizer, tmp_path, monkeypatch, capsys
):
    native.save_native(tmp_path / "model", tiny_model, tiny_params, template="vicuna_v1")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "a.png").write_bytes(tiny.png(0))
    stream, asked = Model.stream, []

    def stopped_once(model, **settings):
        pieces = stream(model, **settings)
        asked.append(list(settings["history"]))
        yield next(pieces)
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr(Model, "stream", stopped_once)
    lines = ["what?", "why?", "/clear", "/imago", "what?", "/help", "/quit", "no"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    image, limit = str(tmp_path / "a.png"), f"--max-new-tokens={TOKENS}"
    named = f"tiny={tmp_path / 'model'}"
    assert main(["chat", "--from", named, "--image", image, limit]) == 1  # no command /imago
    printed = capsys.readouterr()
    assert "/imago" in printed.err

    from mllm_jax.inference.load import load

    answer = load(tmp_path / "model").generate(image, "what?", max_new_tokens=TOKENS)
    first, *rest = printed.out.split(" ...\n", 1)
    assert terminal(answer).startswith(first)
    assert asked[0] == asked[2] == []
    assert [question for question, _ in asked[1]] == ["what?"]
    assert terminal(asked[1][0][1]) == first  # the model sees as much as was shown
    assert terminal(answer) + "\n/image FILE" in rest[0]


def test_what_is_for_the_page_and_what_is_not(tmp_path, capsys):
    given = ["chat", "--from", str(tmp_path)]
    assert main([*given, "--from", "other"]) == 2
    assert main([*given, "--web", "--image", "a.png"]) == 2
    assert main([*given, "--web"]) == 2  # no model
    errors = capsys.readouterr().err
    for words in ("add --web", "--image is chosen on the page", "holds no model"):
        assert words in errors
