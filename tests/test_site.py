"""The site: every page is built without a warning, every public name is in the reference, and nothing is fetched."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.test_pages import DOCS, ROOT, program

_NAME = re.compile(r"^(?:::: |      heading: )(dpft[\w.]*)$", re.MULTILINE)


def public() -> dict[str, object]:
    """Every public name, by where the reference has it: what two modules export stands under ``dpft``."""
    found: dict[str, object] = {}
    for module in map(importlib.import_module, ("dpft", "dpft.privacy", "dpft.audit")):
        for name in module.__all__:
            thing = getattr(module, name)
            if not isinstance(thing, ModuleType) and not any(thing is other for other in found.values()):
                found[f"{module.__name__}.{name}"] = thing
    return found


def reference() -> str:
    """The pages of the reference."""
    return "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md")))


def hook(name: str) -> ModuleType:
    """A module of docs/hooks, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "hooks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_in_the_reference() -> None:
    documented = set(_NAME.findall(reference()))
    assert set(public()) - documented == set()


def test_the_reference_has_nothing_else() -> None:
    """An entry with a heading names the module in which a function of the same name as its module is defined."""
    documented = set(_NAME.findall(reference()))
    others = documented - set(public())
    assert all(other.rpartition(".")[0] in sys.modules for other in others), others
    defined = {f"{getattr(t, '__module__', '')}.{getattr(t, '__qualname__', '')}" for t in public().values()}
    assert others <= defined, others - defined


def test_every_public_name_is_in_an_example_that_runs() -> None:
    """test_pages.py runs them."""
    code = "\n".join(code for page in DOCS.rglob("*.md") for _, code, _ in program(page))
    missing = [name for name in public() if not re.search(rf"\b{name.rpartition('.')[2]}\b", code)]
    assert not missing


def test_every_page_is_in_the_navigation_once() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"([\w/]+\.md)$", nav, re.MULTILINE)
    written = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert len(listed) == len(set(listed))
    generated = re.findall(r'^    "[\w/.]+": "(\w+\.md)",$', (DOCS / "hooks" / "pages.py").read_text(), re.MULTILINE)
    assert len(generated) == 4
    notebooks = {str(path.relative_to(DOCS).with_suffix(".md")) for path in DOCS.rglob("*.ipynb")}
    assert set(listed) == written | set(generated) | notebooks


@pytest.mark.slow
def test_site_is_built_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    """`make docs`, elsewhere: also that every link and anchor leads somewhere."""
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "WARNING  -" not in run.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 35
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(
            r'(?:<(?:script|img|iframe|source)\b[^>]*\bsrc|<link\b[^>]*\bhref)="(https?:[^"]+)"', text
        )
        assert not fetched, (page, fetched)
    prepare = (tmp_path / "api" / "training.html").read_text(encoding="utf-8")
    assert 'id="dpft.prepare.prepare"' in prepare and "max_physical_batch_size" in prepare
    assert ":func:" not in prepare and ":class:" not in prepare


@pytest.mark.slow
def test_links_out_of_docs_become_links_to_pages() -> None:
    """Slow, as mkdocs is only there to build the site."""
    pages = hook("pages")
    assert pages.relinked("[a](../recipes/README.md#threads)", "docs/x.md", "x.md") == "[a](recipes.md#threads)"
    assert pages.relinked("[a](../../CONTRIBUTING.md)", "docs/api/x.md", "api/x.md") == "[a](../contributing.md)"
    assert pages.relinked("[a](docs/howto/audit.md)", "CONTRIBUTING.md", "contributing.md") == "[a](howto/audit.md)"
    assert pages.relinked("[a](../SECURITY.md)", "docs/releases.md", "releases.md") == "[a](security.md)"
    for other in ("[a](https://example.org/x.md)", "[a](#here)", "[a](../setup.cfg)"):
        assert pages.relinked(other, "docs/x.md", "x.md") == other


@pytest.mark.slow
def test_tables_of_the_privacy_officer_are_computed() -> None:
    """Slow: the accountant composes 4 runs at 64 deltas."""
    from tools import privacy_tables

    page = privacy_tables.PAGE.read_text(encoding="utf-8")
    assert privacy_tables.with_tables(page) == page
    right = min(privacy_tables.right_guess(*pair) for pair in privacy_tables.profile(8.0))
    assert 0.64 < right <= 0.65, "the sentence for a board says 65 of 100"


def test_bounds_of_an_attacker() -> None:
    """Against randomised response, the mechanism that reaches them, and at the ends."""
    from tools.privacy_tables import caught, right_guess

    assert right_guess(0.0, 0.0) == 0.5
    assert right_guess(0.0, 0.1) == pytest.approx(0.55)
    for eps in (0.1, 1.0, 3.0):
        truth = 2.718281828459045**eps / (1 + 2.718281828459045**eps)  # answers truly with this probability
        assert right_guess(eps, 0.0) == pytest.approx(truth)
        assert caught(eps, 0.0, 1 - truth) == pytest.approx(truth)
    assert caught(1.0, 1e-6, 0.0) == pytest.approx(1e-6)
    assert caught(1.0, 1e-6, 1.0) == 1.0
