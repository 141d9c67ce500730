"""--push-to-hub: what the epsilon covers of a run's folder, and nothing else, goes to the hub, in one commit."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

# What save_pretrained writes of a model and of a tokenizer; whatever is not named here stays.
_COVERED = """
    model.safetensors model-*-of-*.safetensors model.safetensors.index.json config.json generation_config.json
    tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt
    merges.txt spiece.model chat_template.jinja
"""
COVERED = tuple(_COVERED.split())
OF_THE_MACHINE = ("_name_or_path", "name_or_path")  # keys whose values may be a path


def check_login(repo: str) -> None:
    """See that there is a token that the hub accepts, before anything is trained.

    Raises:
        ValueError: there is none, or it is refused, or the hub cannot be reached.
    """
    if get_token() is None:
        raise ValueError(f"--push-to-hub {repo}: not logged in to the hub: hf auth login, or set HF_TOKEN.")
    try:
        HfApi().whoami()
    except (OSError, HfHubHTTPError) as error:  # of the network; of the hub
        raise ValueError(f"--push-to-hub {repo}: the hub does not accept the login: {error}") from error


def publish(output: Path, repo: str, card: str) -> str:
    """Publish the exported model in a repository, which is made if there is none, private.

    The ledger, the metrics, the checkpoints, the adapter, the picture and the audit stay where they are.

    Args:
        output: the run's folder; of files in it only, no folders.
        repo: its name, ``owner/name``.
        card: the model card, without what was measured.

    Returns:
        The address of the repository.

    Raises:
        OSError: the hub cannot be reached.
        HfHubHTTPError: it refuses.
    """
    api = HfApi()
    files = sorted({path for pattern in COVERED for path in output.glob(pattern) if path.is_file()})
    content = {path.name: _without_paths(path) for path in files} | {"README.md": card.encode()}
    address = api.create_repo(repo, private=True, exist_ok=True)
    operations = [CommitOperationAdd(name, file) for name, file in content.items()]
    api.create_commit(repo, operations, commit_message="Private fine-tuning with dpft")
    return str(address)


def _without_paths(path: Path) -> bytes | str:
    """The file: its path, or of a configuration that says where the model lay, its content without that."""
    if path.suffix != ".json" or "config" not in path.name:
        return str(path)
    found = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in found.items() if key not in OF_THE_MACHINE}
    return str(path) if kept == found else (json.dumps(kept, indent=2) + "\n").encode()
