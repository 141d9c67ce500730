"""What pip, a type checker and a newcomer read: metadata, extras, constraints, and the files of the set-up."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata, resources
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import dpft
from tests.test_pages import README, ROOT, run_page

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# What dpft must go on to accept: the oldest versions that it is used with.
OLDEST = {"torch": "2.11.0", "transformers": "5.17.0", "accelerate": "1.15.0"}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(text: str) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def required() -> dict[str, Requirement]:
    """The requirements of ``pip install dpft`` without extras."""
    return {canonicalize_name(r.name): r for r in requirements(setup_cfg()["options"]["install_requires"])}


def constraints(python: str) -> dict[str, Requirement]:
    """The constraints that hold on one version of Python."""
    lines = requirements((ROOT / "constraints.txt").read_text())
    here = [r for r in lines if not r.marker or r.marker.evaluate({"python_version": python})]
    assert len({canonicalize_name(r.name) for r in here}) == len(here), "two lines for one package"
    return {canonicalize_name(r.name): r for r in here}


def test_metadata_of_the_installed_package() -> None:
    meta = metadata.metadata("dpft")
    assert meta["Name"] == "dpft"
    assert metadata.version("dpft") == dpft.__version__, "an editable install keeps the old version: run make again"
    assert meta["Requires-Python"] == ">=3.10"
    assert "Apache-2.0" in (meta["License"] or meta["License-Expression"] or "")
    assert {"deepspeed", "peft", "triton", "dev"} <= set(meta.get_all("Provides-Extra") or [])


def test_version_is_in_one_place() -> None:
    assert setup_cfg()["metadata"]["version"] == "attr: dpft.__version__"
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_version_is_the_newest_of_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    assert released[0] == dpft.__version__
    assert "### Privacy" in changelog


def test_py_typed_is_package_data() -> None:
    assert resources.files("dpft").joinpath("py.typed").is_file()
    assert "py.typed" in setup_cfg()["options.package_data"]["dpft"].split()


def test_requirements_have_lower_bounds_and_no_upper_ones() -> None:
    extras = setup_cfg()["options.extras_require"]
    for requirement in [*required().values(), *requirements(extras["deepspeed"]), *requirements(extras["peft"])]:
        assert {s.operator for s in requirement.specifier} == {">="}, f"{requirement}: one lower bound, nothing else"


@pytest.mark.parametrize(("name", "version"), OLDEST.items())
def test_oldest_versions_are_accepted(name: str, version: str) -> None:
    assert required()[name].specifier.contains(version)


def test_triton_is_unpinned() -> None:
    """A CUDA torch pins its own triton, and a CPU torch has none."""
    assert requirements(setup_cfg()["options.extras_require"]["triton"]) == [Requirement("triton")]


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_each_requirement_within_its_bounds(python: str) -> None:
    pins = constraints(python)
    extras = setup_cfg()["options.extras_require"]
    wanted = list(required().values())
    for extra in ("deepspeed", "peft", "trl", "docs", "dev"):
        wanted += requirements(extras[extra])
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt has no line for {requirement.name} on Python {python}"
        (exact,) = pin.specifier
        assert exact.operator == "==", f"{pin}: a constraint is one exact version"
        assert requirement.specifier.contains(exact.version), f"{pin} contradicts {requirement}"


@pytest.mark.parametrize("python", PYTHONS)
def test_supported_pythons_agree(python: str) -> None:
    options = setup_cfg()
    assert SpecifierSet(options["options"]["python_requires"]).contains(python)
    assert f"Programming Language :: Python :: {python}" in options["metadata"]["classifiers"].split("\n")


def test_no_registry_is_named() -> None:
    """Where packages come from is for whoever installs to say: by their own pip configuration."""
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text()
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links|\bfile:/", text), name


def test_accelerate_config_is_one_process() -> None:
    config = yaml.safe_load((ROOT / "accelerate_config.yaml").read_text())
    assert (config["distributed_type"], config["num_processes"], config["num_machines"]) == ("NO", 1, 1)
    assert config["mixed_precision"] == "no"
    assert config["use_cpu"] is False


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    assert "set -euo pipefail" in script.read_text()
    assert re.search(r"make .*\btest$", script.read_text(), re.MULTILINE)


@pytest.mark.parametrize("form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda f: f.stem)
def test_issue_forms_have_what_a_form_needs(form: Path) -> None:
    """A form that is not valid is left out by the host without a word."""
    content = yaml.safe_load(form.read_text())
    if form.stem == "config":
        assert content["blank_issues_enabled"] is False, "who writes a blank issue never sees where privacy bugs go"
        return
    assert {"name", "description", "body"} <= content.keys()
    fields = [part for part in content["body"] if part["type"] != "markdown"]
    assert all(part["attributes"]["value"] for part in content["body"] if part["type"] == "markdown")
    assert all(part["attributes"].get("label") or part["attributes"].get("options") for part in fields)
    assert len({part["id"] for part in fields}) == len(fields)
    assert {part["type"] for part in fields} <= {"textarea", "dropdown", "checkboxes"}


def test_who_reports_in_public_is_sent_to_the_private_way() -> None:
    for name in ("CONTRIBUTING.md", ".github/ISSUE_TEMPLATE/bug.yml", ".github/PULL_REQUEST_TEMPLATE.md"):
        assert "SECURITY.md" in (ROOT / name).read_text(), name
    assert "Do not open a public issue" in (ROOT / "SECURITY.md").read_text()


def test_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


# ---------------------------------------------------------------------------------------------------------------------
# What is built, and what it does where nothing else of the project is

NOT_BUILT = {".git", ".venv", "build", "dist", "outputs", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis"}


def backend(call: str, folder: Path) -> None:
    """What ``python -m build`` asks of setuptools, by the one that is installed: no network."""
    code = f"from setuptools import build_meta; build_meta.{call}"
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of a copy of the project, and the wheel of that sdist."""
    folder = tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", *NOT_BUILT)
    shutil.copytree(ROOT, folder / "project", ignore=ignored)
    backend(f"build_sdist({str(folder)!r})", folder / "project")
    sdist = folder / f"dpft-{dpft.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    backend(f"build_wheel({str(folder)!r})", folder / f"dpft-{dpft.__version__}")
    return sdist, folder / f"dpft-{dpft.__version__}-py3-none-any.whl"


def files_below(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in found}


@pytest.mark.slow
def test_the_wheel_has_dpft_and_the_recipes_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    of_recipes = {f"dpft/_recipes/{name}" for name in [*files_below(ROOT / "recipes"), "accelerate_config.yaml"]}
    assert len(of_recipes) > 70
    assert {name for name in names if ".dist-info/" not in name} == files_below(ROOT / "dpft") | of_recipes


@pytest.mark.slow
def test_the_sdist_has_what_the_wheel_is_built_from(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    texts = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"}
    build = {"setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "constraints.txt", "accelerate_config.yaml"}
    written = {name for name in names if name == "PKG-INFO" or name.startswith("dpft.egg-info/")}
    assert names - written == texts | build | files_below(ROOT / "dpft") | files_below(ROOT / "recipes")


@pytest.mark.slow
@pytest.mark.timeout(900)  # it has the demonstration in it
def test_the_readme_runs_from_the_wheel_alone(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Its blocks as they stand, in an environment that borrows the requirements of this one, and an empty folder."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    venv, here = tmp_path / "venv", tmp_path / "here"
    here.mkdir()

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", "--without-pip", str(venv))
    python = str(venv / "bin" / "python")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", str(built[1]))
    (site,) = (venv / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))  # after what is installed here
    found = run(python, "-c", "import importlib.util; print(importlib.util.find_spec('dpft').origin)")
    assert Path(found.strip()).is_relative_to(venv)

    command = str(venv / "bin" / "dpft")
    assert re.search(rf"^dpft +{re.escape(dpft.__version__)}$", run(command, "env"), re.MULTILINE)
    environment["PATH"] = os.pathsep.join([str(venv / "bin"), environment["PATH"]])
    launcher = f"#!{python}\nfrom accelerate.commands.accelerate_cli import main\nmain()\n"
    (venv / "bin" / "accelerate").write_text(launcher)
    (venv / "bin" / "accelerate").chmod(0o755)
    run_page(README, here, python, environment, timeout=700)
    copied = {path.relative_to(here).as_posix() for path in (here / "recipes").rglob("*.*") if path.suffix != ".pyc"}
    assert files_below(ROOT / "recipes") <= copied
    assert (here / "accelerate_config.yaml").is_file()
    for written in ("runs/loop/ledger.jsonl", "runs/trainer/privacy_report.json", "runs/trainer/model.safetensors"):
        assert (here / written).is_file()
