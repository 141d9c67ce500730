"""One page with everything that a run of memory profiles found; it refers to nothing outside itself."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.memory.components import MEANINGS, TITLES
from tools.memory.derived import Results, conditions, why_not
from tools.memory.picture_style import COLOURS
from tools.memory.tables import Table, instants_table, remarks, tables_of, unit_sentence
from tools.memory.units import grouped

PICTURE_TITLES = {
    "memory_breakdown_comparison.png": "What the peak consists of, and what is added over vanilla",
    "memory_timeline.png": "Memory over one step",
    "performance_tradeoff.png": "Peak memory against time",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --ground: #ffffff; --line: #c8c8c8; --head: #f0f0f0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --ground: #16181b; --line: #4a4d52; --head: #24272b; }
}
body { color: var(--ink); background: var(--ground); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 76rem; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-size: 0.85rem; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: 0.25rem 0.7rem; text-align: right;
  font-variant-numeric: tabular-nums; vertical-align: top; }
th { background: var(--head); }
.words { text-align: left; overflow-wrap: anywhere; }
figure { margin: 1rem 0 2rem; }
img { max-width: 100%; height: auto; background: #ffffff; }
.swatch { display: inline-block; width: 0.9em; height: 0.9em; border: 1px solid var(--line); }
summary { cursor: pointer; font-weight: 600; }
"""


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="words"' if number < table.left else "" for number in range(len(cells))]
        parts = (f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    body = "\n".join(row(cells, "td") for cells in table.rows)
    head = f"<caption>{html.escape(table.title)}</caption>\n<thead>{row(table.header, 'th')}</thead>"
    return f'<div class="wide"><table>{head}\n<tbody>\n{body}\n</tbody></table></div>'


def _meanings() -> str:
    rows = "\n".join(
        f'<tr><td><span class="swatch" style="background: {COLOURS[key]}"></span></td>'
        f'<td class="words">{html.escape(TITLES[key])}</td><td class="words">{html.escape(meaning)}</td></tr>'
        for key, meaning in MEANINGS.items()
    )
    return f'<div class="wide"><table><tbody>\n{rows}\n</tbody></table></div>'


def _picture(path: Path) -> str:
    title = html.escape(PICTURE_TITLES.get(path.name, path.stem))
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<figure><h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{data}"></figure>'


def _details(result: dict[str, Any]) -> str:
    kinds = (instants_table(result, kind) for kind in ("phases", "snapshots"))
    tables = "\n".join(_table(table) for table in kinds if table is not None)
    title = html.escape(result["experiment"])
    return f"<details><summary>{title}: phases and snapshots</summary>\n{tables}\n</details>" if tables else ""


def html_page(results: Results, pictures: Sequence[Path]) -> str:
    """The page as text.

    Args:
        results: in the order that they are shown in.
        pictures: PNG files that are there, to be made part of the page.

    Raises:
        OSError: a picture cannot be read.
    """
    first, second = tables_of(results)
    lost = {result["experiment"]: why_not(result) for result in results if result["status"] != "ok"}
    said = "".join(f"<li>{html.escape(line)}</li>" for line in remarks(results))
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Memory of private training</title><style>{STYLE}</style></head><body>",
        "<h1>Memory of private training</h1>",
        f"<p>{html.escape(conditions(results))}. {html.escape(unit_sentence(results))}</p>",
        f"<ul>{said}</ul>" if said else "",
        f"<p><strong>Without a result:</strong> {html.escape(grouped(lost))}.</p>" if lost else "",
        *map(_table, first),
        *map(_picture, pictures),
        *map(_table, second),
        *map(_details, results),
        "<h2>What each component is</h2>",
        "<p>A storage counts once, for the first of its holders in the order of this table.</p>",
        _meanings(),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"
