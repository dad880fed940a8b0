"""README and documentation: examples run and print what they say, commands and names exist, and nothing is stale.

Pages need no MkDocs here; that links and references can be rendered is what `make docs` checks.
"""

import contextlib
import io
import pkgutil
import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

import lladamedv
from lladamedv.cli import app
from lladamedv.demo import HELD_OUT_SEED
from lladamedv.evaluation.answering import answer_batch, question_about
from lladamedv.loading import load_model
from lladamedv.processing.phantoms import PhantomVQA
from lladamedv.trainers.recipes import accelerate_file, recipe_file
from lladamedv.trainers.sft import make_parser, method_of


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
TEXTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{page}" for page in PAGES)]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"\s*```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON, SHELL = ("python",), ("sh",)
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")


def blocks(page: str, languages: tuple[str, ...]) -> list[tuple[int, str, str | None]]:
    """Fenced blocks of a page: line, text, and the text of the `text` block that follows at once, if one does."""
    text = (ROOT / page).read_text(encoding="utf-8")
    result = []
    for block in BLOCK.finditer(text):
        if block[1] in languages:
            printed = PRINTED.match(text, block.end())
            result.append((text.count("\n", 0, block.start()) + 2, block[2], printed and printed[1]))
    return result


def commands(page: str) -> list[str]:
    """Calls of `lladamedv` in the shell blocks of a page."""
    lines = "".join(text for _, text, _ in blocks(page, SHELL)).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("lladamedv ")]


def guides() -> list[str]:
    """Pages of the navigation that tell how to do something."""
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    return [page for each in navigation for name, pages in each.items() for page in pages
            if name.startswith(("Get started", "Conceptual guides", "How-to guides"))]  # fmt: skip


COMMANDS = [command for page in TEXTS for command in commands(page)]


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(page, PYTHON)])
def test_examples_print_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page}
    for line, code, expected in blocks(page, PYTHON):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (line - 1) + code, str(ROOT / page), "exec"), namespace)
        if expected is not None:
            assert printed.getvalue() == expected, f"{page}, line {line}"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_their_options_exist(command):
    _, *words = shlex.split(command, comments=True)
    called = get_command(app)
    while hasattr(called, "commands"):
        assert words and words[0] in called.commands, command
        called = called.commands[words.pop(0)]
    for parameter in called.params:  # the files and folders that pages name are not there
        parameter.callback = None
    context = called.make_context(called.name, list(words))  # parses, and runs nothing
    if called.name == "train" and not context.params["list_recipes"]:
        assert recipe_file(context.params["recipe"]).is_file()
        assert context.params["accelerate"] is None or accelerate_file(context.params["accelerate"]).is_file()
        # The rest goes to the script, which knows it by its own parser.
        method = method_of(["--config", str(recipe_file(context.params["recipe"])), *context.args])
        known = {option for action in make_parser(method)._actions for option in action.option_strings}
        assert {word for word in context.args if word.startswith("--")} <= known


def test_all_kinds_of_commands_are_shown():
    shown = {command.split()[1] for command in COMMANDS}
    assert shown == set(get_command(app).commands)


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("api/")])
def test_names_of_the_reference_exist(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE):
        assert pkgutil.resolve_name(name).__doc__, name


@pytest.mark.parametrize(
    "file", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("hub_cards/**/*.md")], ids=lambda file: file.name
)
def test_what_is_to_be_pasted_can_be_pasted(file):
    """No placeholder for an address that readers would have to know, and no package that an index may not have."""
    text = file.read_text(encoding="utf-8")
    assert "<this repository>" not in text and not re.search(r"pip install [\"']?lladamedv", text)


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_pages(page):
    text = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file = (ROOT / page).parent / target.partition("#")[0] if target[0] != "#" else ROOT / page
        assert target.startswith("https://arxiv.org/abs/") or file.is_file(), target


def test_pictures_are_shown_with_a_text_and_are_small():
    shown = {(ROOT / page).parent.joinpath(target).resolve(): text for page in TEXTS
             for text, target in PICTURE.findall((ROOT / page).read_text(encoding="utf-8"))}  # fmt: skip
    assert set(shown) == {file for file in (DOCS / "images").rglob("*") if file.is_file()}
    assert all(len(text) > 20 for text in shown.values())
    assert sum(file.stat().st_size for file in shown) < 1_600_000


@pytest.mark.parametrize("page", guides())
def test_guides_begin_with_what_one_can_do(page):
    """A title, one paragraph, and within the first screen something to paste or the picture of a session."""
    text = (DOCS / page).read_text(encoding="utf-8")
    assert re.match(r"# .+\n\n[A-Z`\[]", text), "a paragraph follows the title"
    assert re.search(r"^(```(sh|python)$|!\[)", "\n".join(text.splitlines()[:12]), re.MULTILINE)


DRAWING = runpy.run_path(str(ROOT / "benchmarks" / "draw_docs.py"))


@pytest.mark.parametrize("name", DRAWING["PLOTS"])
def test_plots_have_the_numbers_of_their_tables(name):
    """After a change of a table: `python benchmarks/draw_docs.py docs`."""
    plot = DRAWING["PLOTS"][name]
    _, values = DRAWING["read_table"](DOCS / plot.page, plot)
    drawn = re.findall(r"<text [^>]*>([^<]+)</text>", (DOCS / "images" / f"{name}.svg").read_text(encoding="utf-8"))
    numbers = [number for column in values.values() for number in column if number]
    assert numbers and [text for text in drawn if text in numbers][-len(numbers) :] == numbers


def test_answers_of_the_gallery_are_those_of_the_model():
    """After a change of the demo model: `python benchmarks/gallery.py docs`."""
    card = re.compile(r"images/gallery/(\d+)\.png\)\s+\*\*(.+)\*\*\s+(.+)\s+\*(right|wrong)")
    shown = card.findall((DOCS / "gallery.md").read_text(encoding="utf-8"))
    examples = [PhantomVQA(HELD_OUT_SEED, 1000)[int(number)] for number, *_ in shown]
    answers = answer_batch(*load_model(), [question_about(example.image, example.question) for example in examples])
    for (_, question, text, verdict), example, answer in zip(shown, examples, answers):
        assert (question, text) == (example.question, answer.text)
        assert (verdict == "right") == (text == example.answer)
    assert {verdict for *_, verdict in shown} == {"right", "wrong"}


def test_paths_in_the_source_map_exist():
    for path in re.findall(r"`([\w/.-]+/[\w./-]*)`", (DOCS / "source_map.md").read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path


def test_the_readme_is_a_first_screen():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_is_in_the_navigation_once():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for each in (entry.values() if isinstance(entry, dict) else entry) for page in pages(each)]

    configuration = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(pages(configuration["nav"])) == PAGES
    assert configuration["theme"]["font"] is False  # would be fetched from elsewhere


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == lladamedv.__version__
    assert f"## [{lladamedv.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (ruff,) = hooks["repos"]
    assert f"ruff=={ruff['rev'].removeprefix('v')}" in (ROOT / "constraints.txt").read_text().splitlines()
