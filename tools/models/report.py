"""What check_models.py prints: a line for each row of the table, a summary, and the document in Markdown."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from textwrap import shorten
from typing import Any

from tools.models.building import HEADS
from tools.models.checking import CHECKED, CRASH, EXACT, NOT_BUILT, PLAIN_FAILS, REFUSED, STRATEGIES, WRONG
from tools.models.lists import PEFT
from tools.models.precision import DOUBLE, SINGLE

SHORT = {"one_pass": "one-pass", "two_pass": "two-pass", "per_example": "per-example", "auto": "auto"}
REASON = 240  # characters
ORDER = (EXACT, REFUSED, WRONG, CRASH)
BAD = (WRONG, CRASH)
CAUSAL, OTHER_HEADS, ADAPTERS = "Causal language models", "Other heads", "Adapters and quantised bases"
_NAMED = ("torch", "transformers", "peft", "bitsandbytes", "torchao")
INTRODUCTIONS = {
    CAUSAL: "Every family that transformers has in its list of causal LMs, all weights trained, by its model type.",
    OTHER_HEADS: "Every family with a head for the classification of sequences, a masked LM, or a seq2seq LM, all "
    "weights trained.",
    ADAPTERS: "Adapters of PEFT for causal LMs on a Llama, or on what the name says, moved off their initial values; "
    "the base is frozen. A quantised base is compared with plain autograd on the same quantised model in "
    f"{SINGLE.name}, within {SINGLE.tolerance:.0e}, as its kernels refuse doubles. What to use, and what to mind: "
    "[adapters.md](adapters.md).",
}


def section_of(row: dict[str, Any]) -> str:
    """The title of the section that has a row."""
    if row["head"] in PEFT:
        return ADAPTERS
    return CAUSAL if row["head"] == "causal_lm" else OTHER_HEADS


def name_of(row: dict[str, Any]) -> str:
    """The name, with its head where its section has several."""
    plain = row["head"] not in HEADS or row["head"] == "causal_lm"
    return str(row["name"] if plain else f"{row['name']} ({words(row['head'])})")


def words(head: str) -> str:
    """``sequence_classification`` as words."""
    return head.replace("_", " ").replace("lm", "LM")


def trimmed(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what says nothing: empty fields, each error of rounding, the reason of one-pass again.

    Returns:
        The row with ``largest_error``, of the strategies that are exact.
    """
    row = {key: value for key, value in row.items() if key != "where" and value not in ("", [], None)}
    if row["status"] != CHECKED:
        return row
    found = {strategy: _trimmed(result) for strategy, result in row["strategies"].items()}
    first = row["strategies"]["one_pass"].get("reason")
    for strategy in STRATEGIES:
        if strategy != "one_pass" and found[strategy]["status"] == REFUSED and found[strategy]["reason"] == first:
            found[strategy] = {"status": REFUSED}
        if strategy != "auto":
            found[strategy].pop("chose", None)
        if strategy != "one_pass":  # those of one-pass are listed
            found[strategy].pop("lacking", None)
    if found["auto"].get("chose") == "one_pass":
        found["auto"].pop("explain", None)
    errors = [result["error"] for result in row["strategies"].values() if result["status"] == EXACT]
    row |= {"strategies": found, **({"largest_error": max(errors)} if errors else {})}
    if "others" in row:
        row["others"] = _trimmed(row["others"])
        row["others"].pop("chose", None)
    return row


def _trimmed(found: dict[str, Any]) -> dict[str, Any]:
    drop = ("where", "error") if found["status"] == EXACT else ()
    return {key: value for key, value in found.items() if key not in drop and value not in ("", [], None)}


def one_line(row: dict[str, Any]) -> str:
    """What is said when a row is done."""
    if row["status"] != CHECKED:
        return f"{name_of(row)}: {row['status']}: {row['reason']}"
    return f"{name_of(row)}: " + ", ".join(f"{SHORT[s]} {row['strategies'][s]['status']}" for s in STRATEGIES)


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Counts by status, and every row that is wrong or crashed."""
    checked = [row for row in rows if row["status"] == CHECKED]
    lines = [f"{len(rows)} rows: " + counted(row["status"] for row in rows)]
    for strategy in STRATEGIES:
        statuses = (row["strategies"][strategy]["status"] for row in checked)
        lines.append(f"{SHORT[strategy]:12} {counted(statuses)}")
    for row in checked:
        for strategy in STRATEGIES:
            found = row["strategies"][strategy]
            if found["status"] in BAD:
                lines.append(f"{found['status']} {name_of(row)}, {SHORT[strategy]}: {why(found)}")
    lines += [f"{row['status'].upper()} {name_of(row)}: {row['reason']}" for row in rows if row["status"] != CHECKED]
    return lines


def counted(statuses: Iterable[str]) -> str:
    """``12 EXACT, 3 REFUSED``."""
    counts = Counter(statuses)
    first = [status for status in (CHECKED, *ORDER) if status in counts]
    return ", ".join(f"{counts[status]} {status}" for status in [*first, *sorted(counts.keys() - set(first))])


def why(found: dict[str, Any]) -> str:
    """What belongs to a status other than exact; of a reason the first sentence, or its beginning."""
    if found["status"] == WRONG:
        return f"relative error {found['error']:.1e} in {found['where']}"
    at = f" ({found['at']})" if found.get("at") else ""
    reason = found["reason"].partition(". ")[0].rstrip(".")
    module = f" [{found['module']}]" if found.get("module", "") not in reason else ""
    return f"{shorten(reason, REASON, placeholder=' ...')}{module}{at}"


def is_bad(row: dict[str, Any]) -> bool:
    """Whether a strategy gave something else than the oracle, or crashed."""
    if row["status"] != CHECKED:
        return bool(row["status"] == CRASH)
    return any(row["strategies"][s]["status"] in BAD for s in STRATEGIES)


def lacking(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Families by ``Class.parameter`` that lacks a rule, the most frequent first."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for kind in kinds(row):
            found[kind].append(name_of(row))
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def kinds(row: dict[str, Any]) -> list[str]:
    """``Class.parameter`` of what lacks a rule in a family, once each."""
    pairs = row.get("strategies", {}).get("one_pass", {}).get("lacking", [])
    return list(dict.fromkeys(f"{cls}.{path.rpartition('.')[2]}" for path, cls in pairs))


def markdown(report: dict[str, Any]) -> str:
    """The whole document; a section for each kind of rows that the report has."""
    rows, found = report["rows"], report["conditions"]
    installed = ", ".join(
        f"{name} {version}" for name, version in found["versions"].items() if name in _NAMED and version
    )
    dirty = ", with changes" if found["dirty"] else ""
    sections = {title: [row for row in rows if section_of(row) == title] for title in INTRODUCTIONS}
    sections = {title: those for title, those in sections.items() if those}
    lines = [
        "# Models",
        "",
        f"Generated by `python tools/check_models.py --list {report['list']}`; do not edit.",
        "",
        f"Conditions: {installed}, Python {found['python']}, commit {(found['commit'] or 'unknown')[:12]}{dirty}, "
        f"CPU, {DOUBLE.name}, eager attention.",
        "",
        "Everything is built small from its configuration class (two layers, or one of each kind; random weights, "
        "also of norms and biases), and trained on three rows of different lengths. The norms of the examples' "
        "gradients and the clipped sum of every parameter are compared with plain autograd on one example at a time, "
        "without its padding. C lies between two of the norms.",
        "",
        f"- exact: every one within {DOUBLE.tolerance:.0e} of it, relatively. refused: dpft raised an error; no "
        "gradient was given. WRONG: a gradient was given that differs. CRASH: another error than dpft's.",
        "- *FLOPs*: of a private step over a plain one at B = 4, T = 32, at this small size, where fixed costs weigh "
        "more than they would at a real one; of one-pass where it is exact, else of what `auto` chose.",
        "- *padding*: in plain torch, padding beside a row changes what is computed of it; it is checked on rows of "
        "one length. *rows*: the rows beside it do, whatever their lengths.",
        "- *without gradient*: trainable parameters that no text reaches; of these the comparison proves nothing. "
        "*frozen*: parameters of images and sounds, and those that the model itself does not train.",
        "",
        "## Summary",
        "",
        "| | listed | checked | " + " | ".join(SHORT[s] for s in STRATEGIES) + " |",
        "|---|---|---|" + "---|" * len(STRATEGIES),
        *(summary_row(f"[{title}](#{title.lower().replace(' ', '-')})", those) for title, those in sections.items()),
    ]
    bad = ", ".join(name_of(row) for row in rows if is_bad(row))
    lines += ["", f"**WRONG or CRASH**: {bad}." if bad else "None is WRONG, none a CRASH."]
    for title, those in sections.items():
        lines += section(title, those)
    return "\n".join(lines) + "\n"


def summary_row(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Numbers of a section."""
    checked = [row for row in rows if row["status"] == CHECKED]
    cells = [counted(row["strategies"][s]["status"] for row in checked).lower() for s in STRATEGIES]
    cells = [cell.replace("wrong", "**WRONG**").replace("crash", "**CRASH**") for cell in cells]
    return f"| {title} | {len(rows)} | {len(checked)} | " + " | ".join(cells) + " |"


def section(title: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Its own summary, a short row for what is exact in all four, a longer one for the others, what is not checked."""
    checked = [row for row in rows if row["status"] == CHECKED]
    exact = [row for row in checked if all(row["strategies"][s]["status"] == EXACT for s in STRATEGIES)]
    others = [row for row in checked if row not in exact]
    choices = Counter(row["strategies"]["auto"].get("chose") for row in checked)
    chosen = ", ".join(f"{SHORT[c]} {n} times" for c, n in choices.most_common() if c)
    lines = ["", f"## {title}", "", INTRODUCTIONS[title], ""]
    lines.append(
        f"{len(rows)} listed, {len(checked)} checked: {len(exact)} exact in every strategy, {len(others)} not. `auto` "
        f"chose {chosen or 'nothing'}."
    )
    if exact:
        lines += ["", "### Exact in every strategy", "", "| | FLOPs | notes |", "|---|---|---|"]
        lines += [f"| {name_of(row)} | {ratio(row)} | {'; '.join(notes(row))} |" for row in exact]
    if others:
        lines += ["", "### Not exact in every strategy", ""]
        lines += ["| | " + " | ".join(SHORT[s] for s in STRATEGIES) + " | FLOPs | notes |"]
        lines += ["|---|" + "---|" * (len(STRATEGIES) + 2), *(table_row(row) for row in others)]
    return [*lines, *not_checked(rows), *what_lacks(rows)]


def table_row(row: dict[str, Any]) -> str:
    """The line of what is not exact everywhere."""
    cells = [cell_of(strategy, row["strategies"][strategy]) for strategy in STRATEGIES]
    return f"| {name_of(row)} | " + " | ".join([*cells, ratio(row), "; ".join(notes(row))]) + " |"


def ratio(row: dict[str, Any]) -> str:
    """FLOPs of a private step over those of a plain one, with the strategy where it is not one-pass."""
    cost = row.get("cost") or {}
    if not cost.get("plain_flops"):
        return ""
    other = "" if cost["strategy"] == "one_pass" else f" {SHORT[cost['strategy']]}"
    return f"{cost['flops'] / cost['plain_flops']:.2f} x{other}"


def cell_of(strategy: str, found: dict[str, Any]) -> str:
    """A strategy's cell; of ``auto`` with what it chose."""
    if found["status"] in BAD:
        return f"**{found['status']}** {escaped(why(found))}"
    return found["status"].lower() + (f": {SHORT[found['chose']]}" if strategy == "auto" and "chose" in found else "")


def notes(row: dict[str, Any]) -> list[str]:
    """The last cell."""
    found = []
    one = row["strategies"]["one_pass"]
    if one["status"] == REFUSED:
        found.append("lacks " + ", ".join(kinds(row)) if one.get("lacking") else escaped(why(one)))
    auto = row["strategies"]["auto"]
    if auto["status"] == REFUSED and "reason" in auto:  # another one
        found.append(f"auto: {escaped(why(auto))}")
    if "others" in row and row["others"]["status"] != EXACT:
        found.append(f"the others: {row['others']['status'].lower()} {escaped(why(row['others']))}")
    if row.get("depends_on"):
        found.append(f"*{row['depends_on']}*")
    if row["mode"] == "eval":
        found.append("in eval mode: its training forward is random")
    if row.get("without_gradient"):
        found.append(f"{len(row['without_gradient'])} of {row['parameters']} without gradient")
    if row.get("frozen"):
        found.append(f"{row['frozen']} frozen")
    return found


def not_checked(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What could not be built, whose plain step fails, or whose process ended."""
    lines: list[str] = []
    titles = {NOT_BUILT: "Not built", PLAIN_FAILS: "Plain torch fails", CRASH: "Process ended"}
    for status, title in titles.items():
        those = [row for row in rows if row["status"] == status]
        if those:
            lines += ["", f"### {title}", ""]
            lines += [f"- {name_of(row)}: {escaped(why(row))}" for row in those]
    return lines


def what_lacks(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Parameters without a rule, with the number of rows."""
    found = lacking(rows)
    if not found:
        return []
    lines = ["", "### Without a rule", "", "| parameter | where |", "|---|---|"]
    return [*lines, *(f"| `{kind}` | {len(those)}: {', '.join(those)} |" for kind, those in found.items())]


def escaped(text: str) -> str:
    """Text in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
