"""What is shipped and what it needs: files of the wheel, tested versions, hashes and licences of dependencies.

`make licences` writes the table in `docs/dependencies.md` anew.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOLDERS = ("evaluation", "hub_cards", "lladamedv", "modeling_lladamedv", "processing", "trainers")
PAGE = ROOT / "docs" / "dependencies.md"
# Extras that the environment of the tests may lack.
UNTESTED = {"browser-tests", "lmms", "ray", "tensorboard", "trackio", "wandb"}

# As packages spell them, in parts. All of these may be combined with Apache-2.0; copyleft is by file (MPL) at most.
ALLOWED_LICENCES = {
    "0BSD", "Apache 2.0", "Apache 2.0 License", "Apache Software License", "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception", "BSD License", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "CNRI-Python", "ISC", "ISC License", "ISCL", "MIT", "MIT License", "MIT-CMU", "MPL 2.0", "MPL-2.0",
    "Mozilla Public License 2.0", "PSF-2.0", "Python Software Foundation License", "Unlicense", "Zlib",
}
UNDECLARED_LICENCES = {"torchao": "BSD-3-Clause"}  # read in its LICENSE file


def requirements(extras: set[str]) -> list[Requirement]:
    """What the package and these extras ask for, extras of its own left out."""
    lines = PROJECT["dependencies"] + [line for extra in sorted(extras) for line in EXTRAS[extra]]
    return [each for each in map(Requirement, lines) if each.name != PROJECT["name"]]


def pins(file: str) -> set[tuple[str, str]]:
    """Names and versions in a file of constraints or in the lock."""
    found = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    return {(canonicalize_name(name), version) for name, version in found}


def needed(extra: str) -> set[str]:
    """Names of all that the package needs with an extra (the base: ""), as far as it is installed."""
    todo, seen = {(PROJECT["name"], extra)}, set()
    while todo:
        name, extra = each = todo.pop()
        with contextlib.suppress(metadata.PackageNotFoundError):
            lines = map(Requirement, metadata.requires(name) or [])
            seen.add(each)
            asked = [line for line in lines if line.marker is None or line.marker.evaluate({"extra": extra})]
            todo |= {(canonicalize_name(line.name), more) for line in asked for more in ("", *line.extras)} - seen
    return {name for name, _ in seen} - {PROJECT["name"]}


@pytest.fixture(scope="module")
def dependencies() -> dict[str, tuple[str, str, str]]:
    """Name -> version, licence and extras of every installed dependency, but for the CUDA libraries of torch."""
    command = [sys.executable, "-m", "piplicenses", "--from=mixed", "--format=json", "--with-system"]
    table = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    installed = {canonicalize_name(row["Name"]): row for row in table}
    extras = {extra: needed(extra) for extra in ("", *EXTRAS)}
    result = {}
    for name in sorted(set().union(*extras.values())):
        if not name.startswith(("nvidia-", "cuda-")):
            licence = UNDECLARED_LICENCES.get(name, installed[name]["License"])
            users = [extra for extra in EXTRAS if name in extras[extra] and extra != "test"]
            used = "base" if name in extras[""] else ", ".join(users) or "test"
            result[name] = (Version(installed[name]["Version"]).public, licence, used)
    return result


def test_the_oldest_versions_are_the_lower_bounds():
    bounds = {
        (canonicalize_name(each.name), Version(bound.version))
        for each in requirements(set(EXTRAS) - UNTESTED)
        for bound in each.specifier
        if bound.operator == ">="
    }
    assert bounds == {(name, Version(version)) for name, version in pins("constraints-oldest.txt")}


def test_the_lock_holds_what_the_constraints_say():
    lock, newest = pins("requirements.lock"), pins("constraints.txt")
    names = {name for name, _ in lock}
    assert {pin for pin in newest if pin[0] in names} <= lock
    wanted = requirements(set(EXTRAS) - UNTESTED)
    assert {canonicalize_name(each.name) for each in wanted} - names == {"torch"}
    for each in wanted:
        versions = {version for name, version in lock | newest if name == canonicalize_name(each.name)}
        assert all(map(each.specifier.contains, versions)), each
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert all("--hash=sha256:" in entry for entry in re.split(r"\n(?=\w)", text)[1:])


def test_licences_are_allowed(dependencies):
    others = {
        name: licence
        for name, (_, licence, _) in dependencies.items()
        if not {part.strip() for part in re.split(r" AND | OR |; |[()]", licence)} - {""} <= ALLOWED_LICENCES
    }
    assert not others


def test_the_table_of_dependencies(dependencies):
    text = PAGE.read_text(encoding="utf-8")
    table = {name: f"| {name} | {' | '.join(values)} |" for name, values in dependencies.items()}
    if "UPDATE_DEPENDENCIES" in os.environ:
        head, separator, _ = text.partition("|---|---|---|---|\n")
        PAGE.write_text(head + separator + "\n".join(table.values()) + "\n", encoding="utf-8")
        return
    rows = [row.strip("| ").split(" | ") for row in text.splitlines() if re.match(r"\| [\w-]+ \| \d", row)]
    listed = {name: (version, licence) for name, version, licence, _ in rows}
    assert {name for name, _ in pins("requirements.lock")} & dependencies.keys() <= listed.keys()
    assert all(listed[name][0] == version for name, version in pins("constraints.txt") if name in listed)
    for name in dependencies.keys() & listed.keys():
        version, licence, _ = dependencies[name]
        assert listed[name][0] != version or listed[name][1] == licence


def test_the_wheel_has_the_package_and_nothing_else(tmp_path):
    """Built from the source distribution. `packages` and `package-data` are lists by hand, easily incomplete."""
    checkout = tmp_path / "checkout"
    for folder in (*FOLDERS, "tests", "benchmarks", "docs", "notebooks"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, checkout)
    files = [file.relative_to(checkout) for each in FOLDERS for file in (checkout / each).rglob("*") if file.is_file()]

    def build(what: str, source: Path) -> Path:
        code = f"from setuptools import build_meta as b; b.build_{what}({str(tmp_path)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
        (built,) = tmp_path.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[what])
        return built

    with tarfile.open(build("sdist", checkout)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert not {"tests", "benchmarks", "docs", "notebooks"} & {path.name for path in source.iterdir()}
    with zipfile.ZipFile(build("wheel", source)) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {str(file if file.parts[0] == "lladamedv" else "lladamedv" / file) for file in files}
