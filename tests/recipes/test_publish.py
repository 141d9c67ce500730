"""What --push-to-hub publishes: what the epsilon covers, and nothing else; by a hub that keeps what it is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llama_dp
from finetune import publish

# Of a run's folder. Only the first ones may leave the machine.
COVERED = ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
PRIVATE = ["ledger.jsonl", "earlier-1-ledger.jsonl", "metrics.jsonl", "training.png", "audit.json", "canaries.json"]
PRIVATE += ["audit.png", "comparison.json", "notes.txt", "classifier.safetensors", "secrets_config.json"]
PRIVATE += ["adapter/adapter_model.safetensors", "adapter/config.json", "checkpoints/best/model.safetensors"]


class Hub:
    """Keeps what is committed."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.made: list[tuple[str, bool]] = []
        self.error: Exception | None = None

    def __call__(self) -> Hub:
        return self

    def whoami(self) -> dict[str, str]:
        if self.error is not None:
            raise self.error
        return {"name": "me"}

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
        if self.error is not None:
            raise self.error
        assert exist_ok
        self.made.append((repo, private))
        return f"https://hub/{repo}"

    def create_commit(self, repo: str, operations: list[Any], *, commit_message: str) -> None:
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(publish, "HfApi", made)
    monkeypatch.setattr(publish, "get_token", lambda: "token")
    return made


def test_only_what_is_covered_leaves(hub: Hub, tmp_path: Path) -> None:
    for name in COVERED + PRIVATE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"name": name}))
    (tmp_path / "README.md").write_text("with what was measured")
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": str(tmp_path), "hidden_size": 3}))
    assert publish.publish(tmp_path, "me/model", "the card") == "https://hub/me/model"
    assert hub.made == [("me/model", True)]
    assert sorted(hub.files) == sorted([*COVERED, "README.md"])
    assert hub.files["README.md"] == b"the card"
    assert json.loads(hub.files["config.json"]) == {"hidden_size": 3}
    assert hub.files["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()


def test_a_login_that_is_missing_or_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    publish.check_login("me/model")
    hub.error = ConnectionError("no route")
    with pytest.raises(ValueError, match=r"me/model: the hub does not accept the login: no route"):
        publish.check_login("me/model")
    monkeypatch.setattr(publish, "get_token", lambda: None)
    with pytest.raises(ValueError, match=r"not logged in.*hf auth login"):
        publish.check_login("me/model")


@pytest.mark.slow
def test_a_run_is_published_without_what_was_measured(
    hub: Hub, tmp_path: Path, records: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dataset", records, "--num-steps", "2", "--seq-len", "48", "--expected-batch-size", "12"]
    words += ["--push-to-hub", "me/model", "--sample-tokens", "4", "--cpu-threads", "1", "--audit", "20"]
    assert llama_dp.main([*words, "--output-dir", str(tmp_path / "run")]) == 0
    assert "https://hub/me/model" in capsys.readouterr().out
    assert set(hub.files) == {*COVERED, "README.md"}
    here, there = (tmp_path / "run" / "README.md").read_text(), hub.files["README.md"].decode()
    for words_of_the_run in ("## Measured", "## Audit", "training.png", "validation loss after", "metrics.jsonl"):
        assert words_of_the_run in here and words_of_the_run not in there
    for public in ("Steps released / planned", "## Samples", "## How it was made", "of random tokens"):
        assert public in there
    everything = b"".join(content for content in hub.files.values())
    assert str(tmp_path).encode() not in everything

    def refuse(self: Hub, *args: Any, **options: Any) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(Hub, "create_commit", refuse)
    assert llama_dp.main([*words, "--output-dir", str(tmp_path / "other")]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--push-to-hub me/model: no route to the hub; the model is in" in last
    assert (tmp_path / "other" / "model.safetensors").exists()
