"""Hooks of MkDocs: the package as it is installed, for the API reference, references in docstrings, and the options.

The sources lie in top-level folders that an installation puts into the package (`package-dir` in pyproject.toml).
The reference is read from a copy in `build/api` that looks like an installation; nothing is
imported but the table of the options of `generate`, which needs no library.
"""

import re
import runpy
import shutil
import tomllib
from pathlib import Path

from mkdocs.plugins import event_priority


ROOT = Path(__file__).parents[1]
COPY = ROOT / "build" / "api"


@event_priority(100)
def on_config(config):
    """Make the copy, before mkdocstrings looks for it."""
    shutil.rmtree(COPY, ignore_errors=True)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package, folder in settings["package-dir"].items():
        target = COPY.joinpath(*package.split("."))
        target.mkdir(parents=True)
        for file in (ROOT / folder).glob("*.py"):
            shutil.copy(file, target)
    return config


def on_page_markdown(markdown, page, config, files):
    """Put the options of `generate` where a page has the marker, from the table that they are checked by."""
    options = runpy.run_path(str(ROOT / "modeling_lladamedv" / "generation_options_lladamedv.py"))["OPTIONS"]
    table = ["| Option | Type | Default | Meaning |", "|---|---|---|---|"]
    for option in options.values():
        default = "" if option.default is None else f"`{option.default!r}`"
        table.append(f"| `{option.name}` | {option.type_names or 'CompileConfig'} | {default} | {option.meaning} |")
    return markdown.replace("<!-- options of generate -->", "\n".join(table))


def on_page_content(html, page, config, files):
    """Docstrings write names and types as Transformers' do, [`name`] (`str`, *optional*); readers need no marks."""

    def without_marks(code):
        text = re.sub(r"\[`(\w+)`\]", r"\1", code[1])
        return f"<code>{text.replace('`', '').replace('*', '')}</code>"

    html = re.sub(r"\[<code>~?([^<]*)</code>\]", r"<code>\1</code>", html)
    return re.sub(r"<code>([^<\n]*`[^<\n]*)</code>", without_marks, html)
