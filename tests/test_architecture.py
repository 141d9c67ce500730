"""Which part may import which, and which names are public. Rules for every file: ``test_source_rules.py``.

Each rule is a function from source text to a list of complaints, so that it is tested on a bad sample too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project_files import ROOT, module_name, parsed, python_files, report

# The one way that imports go, from top to bottom: a part of dpft may import itself and the parts named in its line.
_LOW = {"errors"}
_ARITHMETIC = _LOW | {"kernels", "rules"}
_GRADIENT = _ARITHMETIC | {"clipping", "models", "wrap"}
_MECHANISM = _LOW | {"adamw_bc", "privacy", "noise", "correlated_noise", "optimizer", "loader", "workers"}

LAYERS: dict[str, set[str]] = {
    "errors": set(),
    **dict.fromkeys(("privacy", "kernels"), _LOW),
    "rules": _LOW | {"kernels"},
    "clipping": _ARITHMETIC,
    "models": _ARITHMETIC | {"clipping"},
    "wrap": _ARITHMETIC | {"clipping", "models"},
    **dict.fromkeys(("custom", "long_context"), _GRADIENT),
    "planning": _GRADIENT | {"long_context", "privacy"},
    "secure_noise": _LOW | {"kernels"},
    **dict.fromkeys(("noise", "scalar_noise"), _LOW | {"secure_noise"}),
    "correlated_noise": _LOW | {"noise", "privacy"},
    "adamw_bc": _LOW,
    "optimizer": _LOW | {"adamw_bc", "noise", "privacy", "clipping"},
    "evaluation": _LOW | {"privacy", "scalar_noise"},
    "tuning": _LOW | {"privacy", "evaluation"},
    "workers": _LOW,
    "loader": _LOW | {"privacy", "workers"},
    "users": _LOW | {"privacy"},
    "engines": _GRADIENT | _MECHANISM,
    "run": _GRADIENT | _MECHANISM | {"engines", "scalar_noise"},
    "prepare": _GRADIENT | _MECHANISM | {"engines", "run", "planning", "users"},
    "trainer": _LOW | {"privacy", "loader", "wrap", "prepare"},
    "audit": _LOW | {"privacy", "prepare"},  # it shares no code with the gradients and the mechanism that it judges
}
LAYERS["command_line"] = _LOW | {"privacy", "planning"}
LAYERS["__init__"] = set(LAYERS)

# What stands behind the public names, for benchmarks, measurements and planted defects.
INSIDE_TOOLS = {
    "tools.benchmarks.norm_times": frozenset({"kernels"}),
    "tools.engines.worker": frozenset({"engines"}),
    "tools.mechanisms.exact": frozenset({"privacy"}),
    "tools.measure_long_context": frozenset({"long_context"}),
    "tools.memory.simulate": frozenset({"kernels", "long_context", "planning"}),
    "tools.plan_noise": frozenset({"planning"}),
    "tools.auditing.plants": frozenset({"clipping", "loader", "noise", "optimizer", "privacy", "run"}),
    "tools.auditing.plants_of_mechanisms": frozenset(_MECHANISM | {"clipping", "evaluation", "run", "scalar_noise"}),
    **dict.fromkeys(("tools.auditing.queries", "tools.auditing.whole_runs"), frozenset({"audit", "privacy"})),
}

# The oracle is right because it shares nothing with what it judges: within kernels, only these may import it.
ORACLE = "dpft.kernels.reference"
ORACLE_IMPORTERS = {"dpft.kernels", "dpft.kernels.reference"}


def dpft_imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Yields ``(line, dotted name)`` for every import of dpft, wherever it stands (function, ``TYPE_CHECKING``)."""
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] == "dpft")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                anchor = package[: len(package) - node.level + 1]
                base = ".".join([*anchor, *([base] if base else [])])
            if base.split(".")[0] == "dpft":
                yield from ((node.lineno, f"{base}.{a.name}") for a in node.names)


def part_of(dotted: str) -> str:
    """The part of dpft that a dotted name belongs to: ``dpft.rules.linear.x`` is of ``rules``, ``dpft`` of itself."""
    pieces = dotted.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


def layer_complaints(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of a module of dpft that go against the way, or through the package's own public names."""
    part = part_of(module)
    if part not in LAYERS:
        return [f"{module}: '{part}' is not in LAYERS of {Path(__file__).name}: say there what it may import"]
    complaints = []
    for line, target in dpft_imports(source, module, is_package):
        imported = part_of(target)
        if imported not in LAYERS:
            complaints.append(f"{module}:{line} imports {target}: inside dpft, import from the module that defines it")
        elif imported != part and imported not in LAYERS[part]:
            allowed = ", ".join(sorted(LAYERS[part])) or "nothing"
            complaints.append(f"{module}:{line} imports {target}: {part} may import only {allowed}")
        if f"{target}.".startswith(f"{ORACLE}.") and module.startswith("dpft.") and module not in ORACLE_IMPORTERS:
            complaints.append(f"{module}:{line} imports the oracle: what it judges must share nothing with it")
    return complaints


def public_names(init_source: str) -> set[str]:
    """The strings of ``__all__``."""
    for node in ast.parse(init_source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            return set(ast.literal_eval(node.value))  # type: ignore[attr-defined]  # both kinds of assignment have it
    return set()


def public_of_dpft() -> set[str]:
    whole, audit = ((ROOT / "dpft" / part / "__init__.py").read_text() for part in ("", "audit"))
    return public_names(whole) | {f"audit.{name}" for name in public_names(audit)}


def public_complaints(
    source: str, module: str, public: set[str], may_import: frozenset[str] = frozenset()
) -> list[str]:
    """Uses of dpft in ``recipes``, ``tools`` or ``tests`` that are neither public nor of a part in ``may_import``."""
    complaints = []
    for line, target in dpft_imports(source, module):
        name = target.split(".", 1)[1] if "." in target else ""
        if name and name not in public and part_of(target) not in may_import:
            complaints.append(f"{module}:{line} imports {target}, which is not a public name of dpft")
    for node in ast.walk(parsed(source)):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dpft"):
            continue
        if node.attr not in public | may_import and not node.attr.startswith("__"):
            complaints.append(f"{module}:{node.lineno} uses dpft.{node.attr}, which is not a public name of dpft")
    return complaints


def mirrored_part(path: Path) -> str | None:
    """The part of dpft that a test file mirrors: ``tests/rules/...`` and ``tests/test_rules*.py`` mirror ``rules``."""
    relative = path.relative_to(ROOT / "tests")
    if len(relative.parts) > 1:
        return relative.parts[0] if relative.parts[0] in LAYERS else None
    name = relative.stem.removeprefix("test_")
    return next((part for part in LAYERS if name == part or name.startswith(f"{part}_")), None)


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """The import cycles of a graph from module to imported modules, one line each."""
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for imported in sorted(graph.get(module, ())):
                visit(imported, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def test_imports_go_one_way() -> None:
    files = python_files("dpft")
    assert len(files) > 5, "found no modules: the test looks in the wrong place"
    report([c for p in files for c in layer_complaints(p.read_text(), module_name(p), p.name == "__init__.py")])


def test_layers_have_no_cycle() -> None:
    report(cycles({part: allowed - {part} for part, allowed in LAYERS.items()}))


def test_modules_have_no_import_cycle() -> None:
    files = {module_name(p): p for p in python_files("dpft")}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        graph[module] = set()
        for _, target in dpft_imports(path.read_text(), module, path.name == "__init__.py"):
            while target not in files:
                target = target.rpartition(".")[0]
            graph[module].add(target)
        graph[module].discard(module)
    report(cycles(graph))


def test_recipes_and_tools_use_public_names() -> None:
    public = public_of_dpft()
    complaints = []
    for path in python_files("recipes", "tools"):
        module = module_name(path)
        complaints += public_complaints(path.read_text(), module, public, INSIDE_TOOLS.get(module, frozenset()))
    report(complaints)


def test_tests_use_public_names_or_the_part_they_mirror() -> None:
    public = public_of_dpft()
    complaints = []
    for path in python_files("tests"):
        part = mirrored_part(path)
        may_import = frozenset({part} | LAYERS[part]) if part else frozenset()
        complaints += public_complaints(path.read_text(), module_name(path), public, may_import)
    report(complaints)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dpft.privacy.samplers.sampler", "from dpft.kernels import linear"),
        ("dpft.kernels.linear", "from dpft.rules.linear import rule"),
        ("dpft.kernels.linear", "import dpft.clipping.boundary"),
        ("dpft.kernels.linear", "from ..clipping import boundary"),
        ("dpft.kernels.linear", "from .. import wrap"),
        ("dpft.rules.linear", "def f():\n    from dpft.models import heads"),
        ("dpft.noise", "import typing\nif typing.TYPE_CHECKING:\n    from dpft.optimizer import DPOptimizer"),
        ("dpft.wrap", "from dpft.engines.fsdp import gather"),
        ("dpft.wrap", "from dpft import DPOptimizer"),
        ("dpft.unheard_of", ""),
        ("dpft.kernels.linear", "from dpft.kernels.reference import norms"),
        ("dpft.kernels.linear", "from . import reference"),
    ],
)
def test_layer_checker_complains(module: str, source: str) -> None:
    assert layer_complaints(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dpft.rules.linear", "import torch\nfrom dpft.kernels import linear\nfrom .registry import rule"),
        ("dpft.rules.linear", "from dpft.errors import UnsupportedModuleError"),
        ("dpft.prepare", "from dpft.wrap import wrap\nfrom dpft.engines import one_process"),
        ("dpft.kernels.linear", "import dpft_other\nfrom dpftish import x"),
    ],
)
def test_layer_checker_is_content(module: str, source: str) -> None:
    assert not layer_complaints(source, module)


def test_relative_import_of_a_package_starts_from_itself() -> None:
    assert [t for _, t in dpft_imports("from .linear import f", "dpft.kernels", is_package=True)] == [
        "dpft.kernels.linear.f"
    ]


def test_public_checker() -> None:
    public = public_names('from dpft.wrap import wrap\n\n__all__ = ["stats", "wrap"]\n')
    assert public == {"stats", "wrap"}
    good = "import dpft\nfrom dpft import stats\ndpft.wrap(1)\ndpft.__version__"
    assert not public_complaints(good, "recipes.x", public)
    bad = "from dpft.wrap import _attach\nimport dpft.clipping\ndpft.clipping.f()\nfrom dpft import hidden"
    assert len(public_complaints(bad, "recipes.x", public)) == 4
    assert not public_complaints("from dpft.kernels.linear import f", "tests.rules.x", public, frozenset({"kernels"}))


def test_mirrored_part() -> None:
    assert mirrored_part(ROOT / "tests" / "kernels" / "test_linear.py") == "kernels"
    assert mirrored_part(ROOT / "tests" / "test_optimizer_resume.py") == "optimizer"
    assert mirrored_part(ROOT / "tests" / "test_end_to_end.py") is None
    assert mirrored_part(ROOT / "tests" / "recipes" / "test_options.py") is None


def test_cycle_checker() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a -> b -> c -> a"]
    assert not cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()})
