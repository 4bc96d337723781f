"""`mllm-jax push`: huggingface_hub's own client against a hub on this machine."""

import pytest
from fake_hub import serving
from huggingface_hub import constants

from mllm_jax.cli.main import main


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)  # HF_ENDPOINT, which it reads once
        yield server


@pytest.fixture
def export(tmp_path):
    """A folder as `mllm-jax export` writes one."""
    folder = tmp_path / "export"
    (folder / "params").mkdir(parents=True)
    contents = {
        "README.md": b"---\npipeline_tag: image-text-to-text\n---\n# mine\n",
        "model.json": b"{}",
        "model.safetensors": bytes(range(256)) * 40,
        "params/d": b"",
        "params/data": b"some",
        ".cache": b"stays here",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder, {name: content for name, content in contents.items() if name != ".cache"}


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own request
def test_every_file_but_hidden_ones_arrives(hub, export, capsys):
    folder, contents = export
    assert main(["push", str(folder), "me/model", "--private", "--revision", "v1", "--message", "first"]) == 0
    assert f"uploaded: {hub.url}/me/model/commit/abc" in capsys.readouterr().out
    assert hub.private == {"me/model": True}
    assert hub.branches == [("me/model", "v1")]
    assert hub.commits == [("me/model", "v1", "first", contents)]


def test_a_dry_run_asks_nobody(export, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    folder, contents = export
    assert main(["push", str(folder), "me/model", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in contents)
    assert ".cache" not in printed


def test_what_is_refused(hub, export, capsys, monkeypatch):
    folder, _ = export
    hub.private["me/model"] = False

    def refused(*arguments):
        assert main(["push", *arguments]) == 1
        return " ".join(capsys.readouterr().err.split())

    assert "is there and public" in refused(str(folder), "me/model", "--private")
    assert "leave it out" in refused(str(folder), "me/model", "--format", "llm")
    assert "epo id" in refused(str(folder), "a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "token that may write there" in refused(str(folder), "me/model")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "none"))
    assert "no token" in refused(str(folder), "me/model")
    for name in ("model.safetensors", "model.json", "README.md"):
        (folder / name).rename(folder / f".{name}")
        if name == "model.safetensors":
            (folder / "params").rename(folder / ".params")
        assert str(folder) in refused(str(folder), "me/model")
    assert "no folder" in refused(str(folder / "no"), "me/model")
    assert hub.commits == []
