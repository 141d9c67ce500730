"""What pip, a type checker and a newcomer read: metadata, extras, constraints, and the files of the set-up."""

from __future__ import annotations

import configparser
import re
from importlib import metadata, resources
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
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
    assert metadata.version("dpft") == setup_cfg()["metadata"]["version"]
    assert meta["Requires-Python"] == ">=3.10"
    assert "Apache-2.0" in (meta["License"] or meta["License-Expression"] or "")
    assert {"deepspeed", "peft", "triton", "dev"} <= set(meta.get_all("Provides-Extra") or [])


def test_version_is_the_newest_of_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    assert released[0] == setup_cfg()["metadata"]["version"]
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
    for extra in ("deepspeed", "peft", "docs", "dev"):
        wanted += requirements(extras[extra])
    for requirement in wanted:
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


def test_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
