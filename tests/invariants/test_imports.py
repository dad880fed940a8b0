"""Who may import whom (the design's rule), and what must stay out of the code."""

import ast
import re
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files


ROOT = Path(__file__).parents[2]
FOLDERS = ("modeling_lladamedv", "processing", "trainers", "evaluation", "hub_cards", "lladamedv", "benchmarks")
ALLOWED = {
    "modeling_lladamedv": set(),
    "processing": set(),
    "trainers": {"modeling_lladamedv", "processing", "hub_cards", "evaluation"},  # rewards are its metrics
    "evaluation": {"modeling_lladamedv", "processing"},
    "hub_cards": {"modeling_lladamedv", "processing"},
    "lladamedv": set(FOLDERS),
    "benchmarks": set(FOLDERS),
}
SOURCES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
# What `save_pretrained` copies: what is registered with an Auto class, and all that it imports.
REMOTE_CODE = sorted(
    {
        Path(file)
        for source in SOURCES
        if source.parent.name in ("modeling_lladamedv", "processing") and source.stem.endswith("_lladamedv")
        for file in (source, *get_relative_import_files(source))
    }
)


def imported_folders(source: str, package: tuple[str, ...]) -> set[str]:
    """Our folders that a file in `package`, a folder and perhaps folders in it, imports, its own left out."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level > len(package):
            names = [f"lladamedv.{node.module or node.names[0].name}"]
        for name in names:
            parts = name.split(".")
            if parts[0] == "lladamedv":
                found.add(parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "lladamedv")
            elif parts[0] in FOLDERS:
                found.add(parts[0])
    return found - {package[0]}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_import_rule(file):
    package = file.relative_to(ROOT).parts[:-1]
    assert imported_folders(file.read_text(), package) <= ALLOWED[package[0]]


def test_the_rule_catches_offenders():
    for offence in ("from lladamedv.processing import x", "import processing.phantoms", "from ..trainers import y"):
        assert not imported_folders(offence, ("modeling_lladamedv",)) <= ALLOWED["modeling_lladamedv"]
    assert imported_folders("from ..records import z", ("processing", "datasets")) == set()
    assert imported_folders("from ...trainers import z", ("processing", "datasets")) == {"trainers"}


@pytest.mark.parametrize("file", REMOTE_CODE, ids=lambda file: file.name)
def test_remote_code_imports_neighbours_flatly(file):
    """`save_pretrained` copies only what is imported as `from .x import y`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and (file.parent / f"{node.module}.py").is_file()


@pytest.mark.parametrize("file", REMOTE_CODE, ids=lambda file: file.name)
def test_remote_code_needs_no_extra(file):
    """Transformers refuses to load code when a library is missing that any line of it imports."""
    needed = {name for name in get_imports(file) if name not in sys.stdlib_module_names}
    assert needed <= {"PIL", "jinja2", "numpy", "safetensors", "tokenizers", "torch", "transformers", "huggingface_hub"}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_literal_special_ids(file):
    """Ids come from the configuration and the tokenizer; only their defaults may name them."""
    if file.name not in ("configuration_lladamedv.py", "presets_lladamedv.py"):
        code = "\n".join(
            ast.unparse(node)
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, int)
        )
        assert not re.search(r"\b126\d{3}\b", code)
