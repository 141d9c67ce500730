"""The report on a run of memory profiles: text, a LaTeX table, pictures, and a page with all of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tools.memory.components import TITLES
from tools.memory.derived import Results, amounts, conditions, milliseconds, time_ratio, times_of, vanilla_of, why_not
from tools.memory.html_page import html_page
from tools.memory.pictures import draw_all
from tools.memory.result import write_text
from tools.memory.tables import remarks, tables_of, unit_sentence

SUMMARY_TEXT, LATEX, PAGE = "summary.txt", "memory_table.tex", "index.html"
SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
}


def failures(results: Results) -> list[str]:
    """A sentence for each experiment that has no result, with the reason that it gave."""
    lines = []
    for result in results:
        if result["status"] != "ok":
            reason = " ".join(result["reason"].split())
            words = why_not(result)
            lines.append(f"{result['experiment']}: {words if reason in words else f'{words}: {reason}'}")
    return lines


def summary(results: Results) -> str:
    """All the numbers as plain text.

    Args:
        results: in the order that they are shown in.
    """
    said = remarks(results)
    blocks = [f"{conditions(results)}\n{unit_sentence(results)}"]
    lost = failures(results)
    blocks += ["Experiments\n" + "\n".join(f"  {line}" for line in said)] if said else []
    blocks += ["Without a result\n" + "\n".join(f"  {line}" for line in lost)] if lost else []
    blocks += [table.text() for part in tables_of(results) for table in part]
    return "\n\n".join(blocks) + "\n"


def escaped(text: str) -> str:
    """Text in which LaTeX reads every character as itself."""
    return "".join(SPECIAL.get(character, character) for character in text)


def latex_table(results: Results) -> str:
    """A ``table`` of MiB by component, a column for each experiment; for a document that uses booktabs.

    Args:
        results: in the order of the columns.
    """
    columns, vanilla = [amounts(result) for result in results], vanilla_of(results)

    def row(words: str, cells: Sequence[str]) -> str:
        return " & ".join([escaped(words), *cells]) + r" \\"

    def numbers(values: Sequence[float | None], digits: int) -> list[str]:
        texts = ["--" if value is None else f"{round(value, digits) + 0.0:.{digits}f}" for value in values]
        return [f"${text}$" if text.startswith("-") and text != "--" else text for text in texts]

    shown = [key for key in TITLES if any(abs(parts.get(key, 0.0)) >= 0.005 for parts in columns)]
    lines = [row("", [escaped(result["experiment"]) for result in results]), r"\midrule"]
    lines += [row(TITLES[key], numbers([parts.get(key) for parts in columns], 2)) for key in shown]
    totals = [result["breakdown"] and result["breakdown"]["total_allocated_mb"] for result in results]
    lines += [r"\midrule", row("peak, MiB", numbers(totals, 2))]
    if vanilla:
        ratios = [times_of(result, vanilla) if result["breakdown"] else None for result in results]
        lines.append(row("peak, times vanilla", numbers(ratios, 2)))
    lines.append(row("time per step, ms", numbers([milliseconds(result) for result in results], 1)))
    if any(time_ratio(result) for result in results):
        lines.append(row("time, times vanilla", numbers([time_ratio(result) for result in results], 2)))
    lost = "".join(f" {line}." for line in failures(results))
    text = escaped(f"Peak memory by component in MiB ({conditions(results)}).{lost}")
    return "\n".join(
        [
            r"% \usepackage[T1]{fontenc} and \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{text}}}",
            r"\label{tab:peak-memory}",
            rf"\begin{{tabular}}{{l{'r' * len(results)}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def write_report(results: Results, directory: Path) -> list[Path]:
    """Write the pictures, ``summary.txt``, ``memory_table.tex`` and ``index.html``, each of them whole or not at all.

    Args:
        results: of :func:`tools.memory.result.load_results`.
        directory: made if it is not there.

    Returns:
        What was written.

    Raises:
        OSError: nothing can be written there.
    """
    pictures = draw_all(results, directory)
    texts = {SUMMARY_TEXT: summary(results), LATEX: latex_table(results), PAGE: html_page(results, pictures)}
    for name, text in texts.items():
        write_text(directory / name, text)
    return [*pictures, *(directory / name for name in texts)]
