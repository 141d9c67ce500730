"""Files that are good are loaded as they are; what whoever trains is told of the records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llama_dp
from finetune.data.files import check_file, diagnose
from finetune.data.loading import load_texts

GOOD = "".join(f'{{"text": "secret {number}"}}\n' for number in range(40))
CSV = "text,id\n" + "secret,1\n" * 40


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mark.jsonl", GOOD.encode("utf-8-sig")),
        ("mark.csv", CSV.encode("utf-8-sig")),
        ("mark.txt", ("secret\n" * 40).encode("utf-8-sig")),
        ("UPPER.JSONL", GOOD),
        ("texts.json", json.dumps(["secret"] * 40)),
        ("pretty.json", json.dumps([{"text": "secret"}] * 40, indent=1)),
        ("numbers.csv", "text\n" + "007\nNA\nnull\n" * 15),
        ("lines.csv", 'text,id\n"secret\n""a"", b",1\n\n' * 1 + "secret,2\n" * 40),
        ("long.csv", f"text\n{'secret ' * 40_000}\n" + "secret\n" * 40),
    ],
)
def test_what_is_good_is_loaded(name: str, content: str | bytes, tmp_path: Path) -> None:
    """As text, with no mark before it, and nothing taken for missing. The tables above are not of refusals alone."""
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    parts = load_texts(str(tmp_path / name))
    texts = [text for part in parts for text in part["text"]]
    assert len(texts) >= 40 and all(type(text) is str and "\ufeff" not in text for text in texts)
    if name == "numbers.csv":
        assert set(texts) == {"007", "NA", "null"}


def test_a_large_file_is_checked_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.jsonl").write_text(GOOD + "{\n")
    check_file(tmp_path / "data.jsonl")
    assert "line 41" in (diagnose(tmp_path / "data.jsonl") or "")
    monkeypatch.setattr("finetune.data.files.LARGE", 10)
    with pytest.raises(ValueError, match="line 41 is not JSON"):
        check_file(tmp_path / "data.jsonl")


def test_the_report_of_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    rows = [{"text": "word " * (n % 3), "id": n % 30 or 7} for n in range(90)] + [{"text": "long " * 99, "id": 7}] * 9
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, _ = load_texts(str(tmp_path / "data.jsonl"), user_column="id")
    texts, users = train["text"][:], train["id"][:]
    monkeypatch.chdir(tmp_path)
    words = ["--dataset", "data.jsonl", "--user-column", "id", "--records-per-user", "4", "--seq-len", "64"]
    with pytest.raises(SystemExit):
        llama_dp.main([*words, "--expected-batch-size", "9999"])
    out = capsys.readouterr().out
    most = max(users.count(user) for user in users)
    unused = sum(max(0, users.count(user) - 4) for user in set(users))
    assert "computed from them without noise, not for publication" in out
    assert f"{len(texts)} records; {len(texts) - len(set(texts))} (" in out
    assert f"{sum(not text.strip() for text in texts)} (" in out
    assert f"{sum(len(text) > 99 for text in texts)} (" in out and "are longer than 64 tokens" in out
    assert f"{len(set(users))} users by 'id'; the one with most has {most} (" in out
    assert f"{unused} (" in out and "beyond --records-per-user 4 are not used" in out
