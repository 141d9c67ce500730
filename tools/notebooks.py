"""Run the notebooks of docs/tutorials, each in an empty folder, and keep what they print.

    python tools/notebooks.py                    # all of them
    python tools/notebooks.py classification     # one

A notebook that fails is left as it was. tests/test_notebooks.py runs them in the same way.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from traitlets import default

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds `tools` from its root

from tools.common.reader import ROOT, environment_with_commands

NOTEBOOKS = ROOT / "docs" / "tutorials"
HANGS = 600  # seconds of one cell, after which it is taken to hang: no measure of speed
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# In a notebook a failing `!command` is no error, which would hide that a tutorial does not work any more.
_STARTUP = """
def _check_commands():
    import subprocess
    shell = get_ipython()
    plain = shell.system

    def checked(command):
        plain(command)
        if code := shell.user_ns["_exit_code"]:
            raise subprocess.CalledProcessError(code, command)

    shell.system = checked

_check_commands()
del _check_commands
"""
_BASH = "set -eo pipefail\n"  # bash reads it before each script: `failing | tail` fails, too


class _Kernel(AsyncKernelManager):
    """Of this interpreter, and not of another one that is installed under the same name."""

    @default("kernel_spec_manager")
    def _of_this_interpreter(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


def execute(notebook: Any, scratch: Path) -> Any:
    """Run a notebook from its first cell, in a kernel of this interpreter, in an empty folder.

    Args:
        notebook: an ``nbformat`` notebook; it is not changed.
        scratch: an empty folder for this run.

    Returns:
        A copy with the outputs, cleaned.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error, or a command in it failed.
    """
    folder = scratch / "reader"
    folder.mkdir()
    copy = nbformat.from_dict(notebook)
    client = NotebookClient(
        copy,
        kernel_manager_class=_Kernel,
        kernel_name="python3",
        timeout=HANGS,
        startup_timeout=HANGS,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=_environment(scratch))
    clean(copy)
    return copy


def _environment(scratch: Path) -> dict[str, str]:
    """Of a reader who has installed dpft, and has no network, no caches and no settings."""
    startup = scratch / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "commands.py").write_text(_STARTUP, encoding="utf-8")
    (scratch / "bash").write_text(_BASH, encoding="utf-8")
    environment = {
        **environment_with_commands(scratch / "commands"),
        "IPYTHONDIR": str(scratch / "ipython"),
        "HF_HOME": str(scratch / "huggingface"),
        "CUDA_VISIBLE_DEVICES": "",  # the tutorials are for two CPU cores
        "DS_ACCELERATOR": "cpu",  # or DeepSpeed, where it is installed, says that it found no GPU
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm, of a widget for its bars
        "SHELL": shutil.which("bash") or "bash",
        "BASH_ENV": str(scratch / "bash"),
    }
    environment.pop("MPLBACKEND", None)  # the kernel chooses its own, which shows pictures
    return environment


def clean(notebook: Any) -> None:
    """Drop what differs from run to run and says nothing: times, versions, control characters of terminals."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": list(cell.metadata["tags"])} if "tags" in cell.metadata else {})
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = _ANSI.sub("", output.text.replace("\r\n", "\n"))


def printed(cell: Any) -> str:
    """What a code cell shows as text, but for warnings and errors."""
    texts = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            texts.append(output.text)
        elif output.output_type in ("execute_result", "display_data"):
            texts.append(output.data.get("text/plain", ""))
    return "\n".join(text.rstrip("\n") for text in texts)


def read(path: Path) -> Any:
    """A notebook of this project."""
    return nbformat.read(path, as_version=4)


def main(argv: list[str] | None = None) -> int:
    """Execute and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(there)} (default: all)")
    names = parser.parse_args(argv).names or there
    if unknown := sorted(set(names) - set(there)):
        parser.error(f"no notebook {', '.join(unknown)}; expected some of {', '.join(there)}")
    for name in names:
        path, start = NOTEBOOKS / f"{name}.ipynb", time.monotonic()
        with tempfile.TemporaryDirectory(prefix="notebook-") as scratch:
            nbformat.write(execute(read(path), Path(scratch)), path)
        print(f"{name}: {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
