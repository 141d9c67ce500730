"""Every bad input ends in one line that names the cause, with status 2, and leaves nothing behind.

The line never shows a record: all of the tables' records contain the word "secret".
"""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file

import classify_dp
import llama_dp
from finetune.options import BASE_MODEL

RECIPES = Path(llama_dp.__file__).parent
ENCODER = RECIPES / "assets" / "encoder"
GOOD = "".join(f'{{"text": "secret {number}", "id": "u{number}"}}\n' for number in range(40))
CSV = "text,id\n" + "secret,1\n" * 40


def parquet(**columns: list[Any]) -> bytes:
    file = io.BytesIO()
    Dataset.from_dict(columns).to_parquet(file)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("records.jsonl", GOOD)
    return file.getvalue()


PARQUET = parquet(text=["secret"] * 40)

# name of the file: content, a part of the message, further options
FILES: list[tuple[str, str | bytes | None, str, list[str]]] = [
    ("absent.jsonl", None, "no such file", []),
    ("absent", None, "no such file or folder", []),
    ("empty.txt", "", "is empty (0 bytes)", []),
    ("empty.jsonl", "", "is empty (0 bytes)", []),
    ("empty.parquet", "", "is empty (0 bytes)", []),
    ("blank.jsonl", "\n \n", "white space only", []),
    ("blank.csv", "\n\n", "white space only", []),
    ("broken.jsonl", GOOD + '{"text": "secret\n' + GOOD, "line 41 is not JSON: Unterminated string starting at", []),
    ("quotes.jsonl", GOOD + "{'text': 'secret'}\n", "line 41 is not JSON: Expecting property name", []),
    ("comma.jsonl", GOOD.replace("}\n", "},\n"), "line 1 is not JSON: Extra data (column 33)", []),
    ("cut.jsonl", GOOD + '{"text":\n' + GOOD, "line 41 is not JSON: Expecting value (column 9)", []),
    ("half.jsonl", GOOD + '{"text": "secr', "line 41 is not JSON: Unterminated string", []),
    ("broken.json", '[{"text": "secret"},\n{"text": "secret" "id"}]', "line 2 is not JSON: Expecting ','", []),
    ("numbers.jsonl", "1\n2\n", "line 1 is a number; expected objects", []),
    ("texts.jsonl", '"secret"\n"secret"\n', "line 1 is text; expected objects", []),
    ("nulls.jsonl", "null\nnull\n", "line 1 is null; expected objects", []),
    ("array.jsonl", GOOD + '["secret"]\n', "line 41 is an array; expected objects", []),
    ("object.json", '{\n"text": "secret"\n}\n', "one object over several lines", []),
    ("wrapped.json", json.dumps({"data": [{"text": "secret"}] * 9}), "holds list, expected text", []),
    ("none.json", "[]", "the array is empty", []),
    ("twice.jsonl", GOOD + '{"text": "secret", "text": "secret"}\n', "line 41 has the key 'text' twice", []),
    ("surrogate.jsonl", GOOD + '{"text": "secret\\ud800"}\n', "line 41: column 'text' holds half of a surrogate", []),
    (
        "latin.jsonl",
        (GOOD + '{"text": "secrét"}\n').encode("latin-1"),
        "line 41 is not UTF-8: byte 0xe9 at column",
        [],
    ),
    ("latin.csv", (CSV + "secrét,1\n").encode("latin-1"), "line 42 is not UTF-8: byte 0xe9 at column 5", []),
    ("latin.txt", "secret\nsecrét\n".encode("latin-1"), "line 2 is not UTF-8: byte 0xe9 at column 5 (offset 11", []),
    ("utf16.jsonl", GOOD.encode("utf-16"), "encoded in UTF-16 (by its byte order mark), expected UTF-8", []),
    ("bare16.txt", GOOD.encode("utf-16-le"), "UTF-16 without a byte order mark", []),
    ("utf32.csv", CSV.encode("utf-32"), "encoded in UTF-32", []),
    ("gzip.jsonl", gzip.compress(GOOD.encode()), "is gzip-compressed", []),
    ("zip.csv", zipped(), "is a zip archive", []),
    ("picture.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "NUL byte at offset 8: it seems to be a binary file", []),
    ("records.txt", PARQUET, "is a parquet file: name it .parquet", []),
    ("header.csv", "text,id\n", "a header and no records", []),
    ("long.csv", CSV + "secret,1,2\n", "line 42 has 3 cells, and the header 2 columns", []),
    ("short.csv", CSV + "secret\n" + "secret,1\n", "line 42 has 1 cells, and the header 2 columns", []),
    ("shifted.csv", "text,id\n" + "secret,1,2\n" * 40, "line 2 has 3 cells, and the header 2 columns", []),
    ("same.csv", "text,text\nsecret,1\n", "the column 'text' twice", []),
    ("unnamed.csv", "text,\nsecret,1\n", "no name for column 2 of 2", []),
    ("semicolons.csv", "text;id\nsecret;1\n", "one column with semicolons in its name", []),
    ("open.csv", CSV + '"secret,1\n' + CSV, "line 42 is not CSV: unexpected end of data", []),
    ("cut.parquet", PARQUET[:-9], "is a truncated parquet file", []),
    ("text.parquet", GOOD, "is no parquet file", []),
    ("zeros.parquet", b"PAR1" + bytes(len(PARQUET) - 8) + b"PAR1", "parquet file is damaged", []),
    ("records.tsv", "text\tid\nsecret\t1\n", "the suffix '.tsv'; expected one of .txt, .json", []),
    ("records.jsonl.gz", gzip.compress(GOOD.encode()), "the suffix '.gz'; expected one of", []),
    ("one.jsonl", '{"text": "secret"}\n', "1 training and 0 validation records", []),
    ("null.jsonl", GOOD + '{"text": null}\n' + GOOD, "'text' is null in record 41", []),
    ("missing.jsonl", GOOD + '{"id": "1"}\n' + GOOD, "'text' is null in record 41", []),
    ("null.parquet", parquet(text=["secret", None] * 20), "'text' is null in record 2", []),
    ("allnull.jsonl", '{"text": null}\n' * 40, "it is null in every record", []),
    ("mixed.jsonl", GOOD + '{"text": 5}\n', "'text' holds no text in record 41", []),
    ("int.jsonl", '{"text": 5}\n' * 40, "'text' holds int64, expected text", []),
    ("list.jsonl", '{"text": ["secret"]}\n' * 40, "'text' holds list, expected text", []),
    ("spaces.jsonl", '{"text": " \\n"}\n' * 40, "'text' is empty in all of the 40 records", []),
    (
        "two.jsonl",
        '{"a": "secret", "b": "secret"}\n' * 40,
        "--text-column is not given: the data has the columns a, b",
        [],
    ),
    ("column.jsonl", GOOD, "--text-column 'body': the data has the columns text, id", ["--text-column", "body"]),
    ("nohead.csv", f"{'secret ' * 9},x\n" * 40, "has the columns (a name of 63 characters), x", []),
    ("split.jsonl", GOOD, "no split 'dev'; it has train", ["--split", "dev"]),
    ("held.jsonl", GOOD, "no split 'dev'; it has train", ["--validation-split", "dev"]),
    ("user.jsonl", GOOD, "--user-column 'who': the data has the columns text, id", ["--user-column", "who"]),
    (
        "nouser.jsonl",
        GOOD + '{"text": "secret"}\n',
        "'id' is empty in record 41. Give every record a value",
        ["--user-column", "id"],
    ),
    ("float.jsonl", '{"text": "secret", "id": 0.5}\n' * 40, "'id' holds float64", ["--user-column", "id"]),
    (
        "types.jsonl",
        '{"text": "secret", "id": "secret"}\n' * 40 + '{"text": "secret", "id": 7}\n',
        "'id' holds one type in record 1, and another in record 41",
        ["--user-column", "id"],
    ),
    ("oneuser.jsonl", '{"text": "secret", "id": 1}\n' * 40, "0 validation records", ["--user-column", "id"]),
]


def bad_folder(path: Path, kind: str) -> None:
    """A folder of records that cannot be read."""
    path.mkdir()
    if kind == "without documents":
        (path / "picture.png").write_bytes(b"\x89PNG")
    elif kind == "binary":
        (path / "a.txt").write_bytes(b"secret\0")
    elif kind == "one split":
        DatasetDict({"train": Dataset.from_dict({"text": ["secret"] * 40})}).save_to_disk(str(path))
    else:
        Dataset.from_dict({"text": ["secret"] * 40}).save_to_disk(str(path))
        for file in path.glob("*.arrow"):
            file.unlink() if kind == "no arrow" else file.write_bytes(file.read_bytes()[:99])


FOLDERS = [
    ("without documents", "a folder without documents"),
    ("binary", "none of 1 files is text in UTF-8"),
    ("one split", "no split 'training'; it has train"),
    ("no arrow", "seems to be written by save_to_disk, and cannot be read"),
    ("cut arrow", "seems to be written by save_to_disk, and cannot be read"),
]

OPTIONS: list[tuple[list[str], str]] = [
    (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    (["--config", "absent.yaml"], "absent.yaml"),
    (["--seq-len", "long"], "invalid int value: 'long'"),
    (["--seq-len", "1"], "needs two tokens"),
    (["--seq-len", "2000"], "more than the 1024 positions"),
    (["--clipping", "flsh"], "invalid choice: 'flsh'"),
    (["--clipping", "none", "--noise-multiplier", "1"], "no noise makes it private"),
    (["--target-epsilon", "8", "--noise-multiplier", "1"], "one follows from the other"),
    (["--target-epsilon", "-1"], "target_epsilon=-1.0"),
    (["--target-epsilon", "nan"], "target_epsilon=nan"),
    (["--target-delta", "2"], "target_delta=2.0"),
    (["--noise-multiplier", "nan"], "noise_multiplier=nan"),
    (["--max-grad-norm", "0"], "max_grad_norm=0.0"),
    (["--num-steps", "0"], "num_steps=0"),
    (["--expected-batch-size", "9999"], "--expected-batch-size 9999 is larger than the 84 examples to train on"),
    (["--expected-batch-size", "9999", "--user-column", "id"], "users of 'id' to train on; lower it. --advise"),
    (["--validation-share", "1.5"], "--validation-share is 1.5"),
    (["--learning-rate", "inf"], "--learning-rate is inf"),
    (["--lr-scheduler-type", "cosin"], "invalid choice: 'cosin'"),
    (["--lora-r", "2", "--lora-target-modules", "nothing"], "nothing"),
    (["--audit", "-1"], "--audit is -1"),
    (["--records-per-user", "0"], "--records-per-user is 0"),
    (["--user-column", " "], "--user-column is empty"),
    (["--user-column", "id", "--strategy", "per_example"], "with --user-column they have one loss"),
    (["--user-column", "id", "--pack", "documents", "--max-tokens-in-memory", "99"], "--pack documents several"),
    (["--resume-from-checkpoint", "--noise-multiplier", "0"], "no checkpoint"),
    (
        ["--dataset", "no-such-name"],
        "is not one of docstrings, tickets, nor a file or folder here, and the hub did not",
    ),
    (["--dataset", "data/nothing/here"], "no such file or folder"),
    (["--dataset", ""], "--dataset is empty"),
    (["--model", "no/such-model"], "--model 'no/such-model'"),
]


def edited(path: Path, **values: Any) -> None:
    """The JSON file with other values; None deletes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def other_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


MODELS: list[tuple[str, Callable[[Path], object], str]] = [
    ("no config", lambda p: (p / "config.json").unlink(), "--model"),
    ("config is no JSON", lambda p: cut(p / "config.json", 99), "config.json"),
    ("config is a list", lambda p: (p / "config.json").write_text("[]"), "--model"),
    ("unknown architecture", lambda p: edited(p / "config.json", model_type="lama"), "lama"),
    ("no architecture", lambda p: edited(p / "config.json", model_type=None), "model_type"),
    ("odd heads", lambda p: edited(p / "config.json", num_attention_heads=5), "--model"),
    ("no weights", lambda p: (p / "model.safetensors").unlink(), "model.safetensors"),
    ("cut weights", lambda p: cut(p / "model.safetensors", 9999), "SafetensorError"),
    ("empty weights", lambda p: cut(p / "model.safetensors", 0), "SafetensorError"),
    ("wider config", lambda p: edited(p / "config.json", intermediate_size=512), "size"),
    ("more layers", lambda p: edited(p / "config.json", num_hidden_layers=9), "they would be random"),
    ("a tensor less", lambda p: other_weights(p, lambda w: w.pop("model.norm.weight")), "lacks 1 tensors"),
    ("no tokenizer", lambda p: [file.unlink() for file in p.glob("tokenizer*")], "--model"),
    ("cut tokenizer", lambda p: cut(p / "tokenizer.json", 999), "--model"),
    ("fewer embeddings", lambda p: edited(p / "config.json", vocab_size=1000) or fewer(p), "ids up to 1023"),
    ("few positions", lambda p: edited(p / "config.json", max_position_embeddings=64), "more than the 64 positions"),
]


def fewer(path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            if tensor.shape[0] == 1024:
                weights[name] = tensor[:1000].clone()

    other_weights(path, change)


@pytest.fixture
def ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Run a recipe in an empty folder, and check how it ends."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def check(words: list[str], cause: str, main: Callable[[list[str]], int] = llama_dp.main) -> None:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(words)
        error = capfd.readouterr().err
        assert stop.value.code == 2
        assert len(error.splitlines()) == 1 and ": error: " in error, error
        assert cause in error
        assert "secret" not in error and "secr" not in error.replace("secrét", "")
        assert not list(here.iterdir())

    return check


@pytest.mark.parametrize(("name", "content", "cause", "words"), FILES, ids=[file[0] for file in FILES])
def test_files(
    name: str, content: str | bytes | None, cause: str, words: list[str], tmp_path: Path, ends: Callable[..., None]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    ends(["--dataset", str(path), *words], cause)


@pytest.mark.parametrize(("kind", "cause"), FOLDERS, ids=[kind for kind, _ in FOLDERS])
def test_folders(kind: str, cause: str, tmp_path: Path, ends: Callable[..., None]) -> None:
    bad_folder(tmp_path / "data", kind)
    ends(["--dataset", str(tmp_path / "data"), *(["--split", "training"] if kind == "one split" else [])], cause)


def test_a_file_that_may_not_be_read(
    tmp_path: Path, ends: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "locked.jsonl"
    path.write_text(GOOD)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read anything
        real = open

        def refuse(file: Any, *args: Any, **kwargs: Any) -> Any:
            if file == path:
                raise PermissionError(13, "Permission denied")
            return real(file, *args, **kwargs)

        monkeypatch.setattr("builtins.open", refuse)
    ends(["--dataset", str(path)], "cannot be read: permission denied")


@pytest.mark.parametrize(("words", "cause"), OPTIONS, ids=[" ".join(words) for words, _ in OPTIONS])
def test_options(words: list[str], cause: str, records: str, ends: Callable[..., None]) -> None:
    ends(["--dataset", records, "--expected-batch-size", "16", "--num-steps", "2", *words], cause)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("a: [\n", "not YAML"),
        ("seq_len: long\n", "expected int"),
        ("sequence: 9\n", "unknown option"),
        ("- a\n", "list"),
    ],
)
def test_configurations(text: str, cause: str, tmp_path: Path, ends: Callable[..., None]) -> None:
    (tmp_path / "run.yaml").write_text(text)
    ends(["--config", str(tmp_path / "run.yaml")], cause)


@pytest.mark.parametrize(("change", "cause"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
def test_models(
    change: Callable[[Path], object], cause: str, records: str, tmp_path: Path, ends: Callable[..., None]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in BASE_MODEL.glob("*"):
        (model / file.name).write_bytes(file.read_bytes())
    change(model)
    ends(["--dataset", records, "--model", str(model)], cause)


LABELLED = "text,label\n" + "secret,a\nsecret,b\n" * 40


@pytest.mark.parametrize(
    ("name", "content", "words", "cause"),
    [
        ("broken.jsonl", GOOD + "{\n", [], "line 41 is not JSON"),
        ("nolabel.jsonl", GOOD, [], "--label-column 'label': the data has the columns text, id"),
        ("null.jsonl", '{"text": "secret", "label": 1}\n' * 9 + '{"text": "secret"}\n', [], "is empty in record 10"),
        ("float.jsonl", '{"text": "secret", "label": 0.5}\n' * 9, [], "holds float64, expected text or whole numbers"),
        ("blank.csv", LABELLED + "secret,\n", [], "--label-column 'label' is empty in record 81"),
        ("one.csv", "text,label\n" + "secret,a\n" * 40, [], "one label only"),
        ("good.csv", LABELLED, ["--model", "nothing"], "--model 'nothing'"),
        ("good.csv", LABELLED, ["--user-column", "nobody"], "--user-column 'nobody'"),
    ],
    ids=["broken", "no label", "null", "float", "blank", "one label", "no model", "users"],
)
def test_the_classifier(
    name: str, content: str, words: list[str], cause: str, tmp_path: Path, ends: Callable[..., None]
) -> None:
    (tmp_path / name).write_text(content)
    ends(["--dataset", str(tmp_path / name), *words], cause, classify_dp.main)


def test_an_encoder_is_no_causal_model(records: str, ends: Callable[..., None]) -> None:
    ends(["--dataset", records, "--model", str(ENCODER)], "is a BertForMaskedLM, expected a causal language model")


def test_an_output_that_is_taken(records: str, tmp_path: Path, ends: Callable[..., None]) -> None:
    words = ["--dataset", records, "--expected-batch-size", "16", "--num-steps", "2", "--noise-multiplier", "0"]
    (tmp_path / "file").write_text("x")
    ends([*words, "--output-dir", str(tmp_path / "file")], "is a file; expected a folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("x")
    ends([*words, "--output-dir", str(tmp_path / "folder")], "holds files, and no ledger of a run")
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["notes"]


def test_a_failure_in_the_preparation_leaves_no_folder(
    records: str, ends: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("the optimiser is not to be had")

    monkeypatch.setattr("finetune.run.make_optimizer", fail)
    words = ["--dataset", records, "--expected-batch-size", "16", "--num-steps", "2", "--noise-multiplier", "0"]
    ends(words, "not to be had")


def test_a_bug_keeps_its_traceback(records: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("finetune.run.choose_physical", lambda *_: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        llama_dp.main(["--dataset", records])


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--dataset", "broken.jsonl"], ["--model", "nothing"], ["--seq-len", "1"]])
def test_a_process_writes_one_line(words: list[str], tmp_path: Path) -> None:
    """With what libraries write on their own, past pytest."""
    (tmp_path / "broken.jsonl").write_text(GOOD + "{\n")
    found = subprocess.run(
        [sys.executable, str(RECIPES / "llama_dp.py"), *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1 and found.stderr.startswith("llama_dp.py: error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.jsonl"]
