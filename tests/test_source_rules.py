"""The rules of the house for every file: random numbers, file length, suppressions, private paths.

Which part may import which: ``test_architecture.py``.

Each rule is a function from source text to a list of complaints, so that it is tested on a bad sample too.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize

from tests.project_files import ROOT, module_name, project_files, python_files, report

MAX_LINES = 400
_DRAWS = {"bernoulli", "multinomial", "normal", "rand", "randint", "randn", "randperm"}
_INPLACE_DRAWS = {"bernoulli_", "cauchy_", "exponential_", "normal_", "random_", "uniform_"}


def randomness_complaints(source: str, module: str) -> list[str]:
    """``*_like`` draws (they ignore the generator and take the parameter's dtype), and draws without a generator."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if name in {"rand_like", "randint_like", "randn_like"}:
            complaints.append(f"{module}:{node.lineno} uses {name}: draw float32 from an explicit generator")  # type: ignore[attr-defined]  # a name or an attribute, which have a line
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            draws = (of_torch and node.func.attr in _DRAWS) or node.func.attr in _INPLACE_DRAWS
            if draws and not any(keyword.arg == "generator" for keyword in node.keywords):
                complaints.append(f"{module}:{node.lineno} calls {node.func.attr} without generator=")
    return complaints


_SUPPRESSION = re.compile(
    r"#\s*(?:type:\s*ignore|noqa|pyright:\s*ignore|pragma:\s*no cover)"
    r"(?P<code>:\s*[A-Z]+\d+(?:\s*,\s*[A-Z]+\d+)*|\[[^\]]+\])?"
)


def suppression_complaints(source: str, module: str) -> list[str]:
    """``type: ignore`` and ``noqa`` comments that name no error code, or give no reason on their line."""
    complaints: list[str] = []
    if not _SUPPRESSION.search(source):  # to tokenise it takes long
        return complaints
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or not _SUPPRESSION.search(token.string):
            continue
        if any(not match["code"] and "pragma" not in match[0] for match in _SUPPRESSION.finditer(token.string)):
            complaints.append(f"{module}:{token.start[0]} suppresses without naming the error code")
        if len(re.findall("[A-Za-z]", _SUPPRESSION.sub("", token.string))) < 8:
            complaints.append(f"{module}:{token.start[0]} suppresses without giving the reason on the line")
    return complaints


# Put together from pieces, so that this file does not mention what it looks for.
_FOLDERS = "|".join(["wo" + "rk", "ro" + "ot", "ho" + r"me/\w+", "Us" + r"ers/\w+"])
_PRIVATE_PATH = re.compile(r"(?<![\w.~$})-])/(?:" + _FOLDERS + r")(?![\w-])")


def path_complaints(text: str, name: str) -> list[str]:
    """Lines that mention a directory of somebody's machine."""
    return [
        f"{name}:{number} mentions a path of one machine: {line.strip()[:80]}"
        for number, line in enumerate(text.splitlines(), 1)
        if _PRIVATE_PATH.search(line)
    ]


def test_draws_take_a_generator() -> None:
    report([c for p in python_files("dpft") for c in randomness_complaints(p.read_text(), module_name(p))])


def test_no_module_is_too_long() -> None:
    lengths = {p: len(p.read_text().splitlines()) for p in python_files("dpft", "recipes", "tools", "tests")}
    report([f"{module_name(p)} has {n} lines: make it two modules" for p, n in lengths.items() if n > MAX_LINES])


def test_suppressions_have_reasons() -> None:
    files = python_files("dpft", "recipes", "tools", "tests")
    report([c for p in files for c in suppression_complaints(p.read_text(), module_name(p))])


def test_no_path_of_one_machine() -> None:
    files = project_files()
    assert ROOT / "setup.cfg" in files
    report([c for p in files for c in path_complaints(p.read_text(errors="replace"), str(p.relative_to(ROOT)))])


def test_randomness_checker() -> None:
    bad = "noise = torch.randn_like(p)\nx = torch.randn(3)\np.normal_(0, 1)\nq = randn_like(p)"
    assert len(randomness_complaints(bad, "dpft.noise")) == 4
    good = "torch.randn(3, generator=g)\np.normal_(generator=g)\nrng.normal(0, 1)\nx.random_walk()"
    assert not randomness_complaints(good, "dpft.noise")


def test_suppression_checker() -> None:
    ignore, quiet = "# type: " + "ignore", "# no" + "qa"
    reason = "  # the table is wide"
    for bad in (ignore, f"{ignore}[misc]", f"{quiet}: E501", quiet + reason, ignore + reason):
        assert suppression_complaints(f"x = 1  {bad}\n", "m"), bad
    for good in (f"{ignore}[misc]{reason}", f"{quiet}: E501, F401 - the table is wide", "# plain"):
        assert not suppression_complaints(f"x = 1  {good}\n", "m"), good
    assert not suppression_complaints(f's = "{quiet}"\n', "m"), "a string is no comment"


def test_path_checker() -> None:
    for bad in ("wo" + "rk/shared", "ro" + "ot", "ho" + "me/ann/x"):
        assert path_complaints(f"see /{bad} for it", "f")
        assert path_complaints(f'path = "/{bad}"', "f")
    root = "/ro" + "ot"
    for good in (f"frame{root}", f"https://x.org{root}", f"~{root}", "and / or", f"{root}ed", f"{root}-level"):
        assert not path_complaints(good, "f"), good
