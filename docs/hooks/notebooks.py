"""Pages of the tutorials, which are notebooks: Markdown with what their cells printed, and a link to the notebook."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
from jinja2 import DictLoader
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from traitlets.config import Config

# Fences of four: what a cell prints may have one of three. `ipython3` is a lexer that knows `!command`.
TEMPLATE = """
{%- extends "markdown/index.md.j2" -%}
{% block input %}
````{.{{ cell.metadata.get("language", "ipython3") }}{{ cell.metadata.title }}}
{{ cell.source }}
````
{% endblock input %}
{% block stream %}{{ text(output.text) }}{% endblock stream %}
{% block data_text scoped %}{{ text(output.data["text/plain"]) }}{% endblock data_text %}
{% block error %}{% endblock error %}
{% block data_png scoped %}
![{{ cell.metadata.get("alt", "What the cell above draws") }}]({{ output.metadata.filenames["image/png"] }})
{% endblock data_png %}
{% macro text(printed) %}
````{.text .printed}
{{ printed.rstrip() }}
````
{% endmacro %}
"""
_FILE = re.compile(r"%%writefile (\S+)\n")
_NOTEBOOK_LINK = re.compile(r"(\]\((?!\w+:)[^)\s#]+)\.ipynb(#[^)\s]*)?\)")
_TITLE = re.compile(r"\A\s*# [^\n]+\n")


def linked(markdown: str) -> str:
    """Links to notebooks as links to their pages."""
    return _NOTEBOOK_LINK.sub(r"\1.md\2)", markdown)


def page(notebook: Any, name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by name.

    Args:
        notebook: of ``nbformat``.
        name: of its file, without a folder or ending.
    """
    shown = nbformat.from_dict(notebook)
    for cell in shown.cells:
        if cell.cell_type == "code" and (file := _FILE.match(cell.source)):
            cell.source = cell.source[file.end() :]
            cell.outputs = []  # "Writing train.py"
            cell.metadata |= {
                "title": f' title="{file[1]}"',
                "language": "python" if file[1].endswith(".py") else "text",
            }
    exporter = MarkdownExporter(
        extra_loaders=[DictLoader({"page.md.j2": TEMPLATE})],
        template_file="page.md.j2",
        config=Config(NbConvertBase={"display_data_priority": ["text/markdown", "image/png", "text/plain"]}),
    )
    text, resources = exporter.from_notebook_node(
        shown, {"unique_key": name, "output_files_dir": f"{name}_files", "metadata": {"name": name}}
    )
    download = f"\n[The notebook]({name}.ipynb){{: download }}: run it in an empty folder, with dpft installed.\n"
    text = _TITLE.sub(lambda title: title[0] + download, linked(text), count=1)
    return text, resources["outputs"]


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each notebook in docs/tutorials."""
    for path in sorted((Path(config.docs_dir) / "tutorials").glob("*.ipynb")):
        text, pictures = page(nbformat.read(path, as_version=4), path.stem)
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to notebooks into links to their pages."""
    return markdown if page.file.src_uri.startswith("tutorials/") else linked(markdown)
