"""The environment of a reader who has installed dpft and runs what a page or a tutorial shows."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment_with_commands(folder: Path) -> dict[str, str]:
    """This environment, with ``dpft`` as a command and as a package, Python's own commands, and no network of the hub.

    Args:
        folder: does not exist yet; the command ``dpft`` is written there.
    """
    folder.mkdir(parents=True)
    command = folder / "dpft"
    command.write_text(
        f"#!{sys.executable}\nimport sys\nfrom dpft.command_line import main\nsys.exit(main())\n", encoding="utf-8"
    )
    command.chmod(0o755)
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HF_HUB_OFFLINE": "1",
    }
