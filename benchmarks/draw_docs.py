"""Draws the plots and pictures of the documentation: plots from the tables of its pages, the others from real runs.

    python benchmarks/draw_docs.py docs                       # the plots: after a change of a table
    python benchmarks/draw_docs.py docs --pictures            # also a session in the terminal, and windows of CT
    python benchmarks/draw_docs.py docs --training            # also what a training shows; it needs playwright

A table in a page is the one home of measured numbers; `tests/test_docs.py` notices a plot that is older than its table.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.text import Text

from lladamedv.demo import HELD_OUT_SEED
from lladamedv.processing.medical_images import read_medical_image
from lladamedv.processing.phantoms import PhantomVQA


COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # of Okabe and Ito's palette
SESSION = (
    'lladamedv ask picture.png "Describe the image."',
    'lladamedv ask picture.png "How many lesions are there?" --candidates None,One,Two,Three',
    'echo "Describe the image." | lladamedv chat picture.png --show-steps --steps 6',
)


class Plot(NamedTuple):
    """Bars of a table's columns.

    Attributes:
        page: of the documentation.
        columns: the headers of the table's columns that are drawn, as they stand there. The table is the first that has
            them all.
        axis: what is measured.
    """

    page: str
    columns: tuple[str, ...]
    axis: str


PLOTS = {
    "speed": Plot("benchmarks.md", ("times as fast",), "times as fast as a plain loop, 2 CPU cores"),
    "training-memory": Plot("benchmarks.md", ("memory in use",), "memory of a training step, MiB"),
    "serving": Plot("benchmarks.md", ("0.1.0", "this server"), "answers a second, dual cache, 2 CPU cores"),
    "preference": Plot(
        "alignment.md", ('"only one lesion?"', "old, closed", "old, open", "descriptions"), "right answers, %"
    ),
    "pointing": Plot("is_it_looking.md", ("hits",), "share of maps whose largest cell touches a lesion"),
    "many": Plot("many_pictures.md", ("times as many pictures a CPU second",), "times as many pictures a CPU second"),
    "repetition": Plot("decoding_analysis.md", ("repeated bigrams, %",), "repeated bigrams, pictures of noise, %"),
    "controls": Plot("evaluation.md", ("own picture", "shuffled", "blank", "noise"), "score, %"),
}  # fmt: skip


def plain(cell: str) -> str:
    """A cell without marks of Markdown."""
    return re.sub(r"[*`]", "", cell).strip()


def read_table(page: Path, plot: Plot) -> tuple[list[str], dict[str, list[str]]]:
    """Labels of the rows that have numbers, and for each column what stands there: its first number, as written."""
    tables = re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)
    for table in tables:
        header, _, *rows = [[plain(cell) for cell in line.strip("|").split("|")] for line in table.splitlines()]
        if set(plot.columns) <= set(header):
            break
    else:
        raise ValueError(f"{page} has no table with the columns {plot.columns}.")
    labels, values = [], {name: [] for name in plot.columns}
    for row in rows:
        cells = [re.match(r"[\d,]*\.?\d+", row[header.index(name)]) for name in plot.columns]
        if cells[0] is not None:
            labels.append(row[0])
            for name, cell in zip(plot.columns, cells):
                values[name].append(cell and cell[0])
    return labels, values


def draw_plot(page: Path, plot: Plot, file: Path) -> None:
    """Horizontal bars, each with its number as the page has it. Its texts stay texts; its ground is white."""
    labels, values = read_table(page, plot)
    names = [name for name in plot.columns if any(values[name])]
    height = 0.8 / len(names)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "docs", "font.size": 9, "font.family": "sans-serif"}):
        figure = Figure(figsize=(5, 0.9 + len(labels) * max(0.34, 0.2 * len(names))), layout="constrained")
        axes = figure.subplots()
        for number, (name, color) in enumerate(zip(names, COLORS)):
            places = [place + (number - (len(names) - 1) / 2) * height for place in range(len(labels))]
            numbers = [float((text or "nan").replace(",", "")) for text in values[name]]
            bars = axes.barh(places, numbers, 0.9 * height, color=color, label=name)
            axes.bar_label(bars, [text or "" for text in values[name]], padding=3, fontsize=8)
        axes.set_yticks(range(len(labels)), [fill(re.split(r":| \(", label)[0], 26) for label in labels])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(plot.axis)
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            figure.legend(loc="outside upper left", ncols=min(len(names), 2), frameon=False)
        figure.savefig(file, format="svg", metadata={"Date": None})


def draw_session(file: Path) -> None:
    """What commands print, as a terminal shows it."""
    console = Console(record=True, width=82, file=io.StringIO())
    with tempfile.TemporaryDirectory() as folder:
        PhantomVQA(HELD_OUT_SEED, 6)[4].image.save(f"{folder}/picture.png")
        for command in SESSION:
            done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=True)
            console.print(Text(f"$ {command}", "bold"))
            console.print(Text(done.stdout))
    svg = console.export_svg(title="lladamedv", unique_id="terminal")
    file.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL), encoding="utf-8")


def synthetic_ct(side: int = 192) -> np.ndarray:
    """A chest as a drawing in Hounsfield units: lungs with a nodule, soft tissue with a faint lesion, and bone."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]

    def ellipse(x0, y0, width, height):
        return ((x - x0) / width) ** 2 + ((y - y0) / height) ** 2 < 1

    values = np.full((side, side), -1000.0)
    for place, hounsfield in (
        ((0, 0, 0.92, 0.75), 40),
        ((-0.45, -0.08, 0.3, 0.45), -820),
        ((0.45, -0.08, 0.3, 0.45), -820),
        ((0.5, -0.2, 0.035, 0.035), -350),  # nodule
        ((0.02, 0.12, 0.2, 0.26), 55),
        ((0.06, 0.16, 0.07, 0.07), 25),  # lesion
        ((0, 0.55, 0.13, 0.11), 500),
        ((0, 0.55, 0.05, 0.04), 900),
    ):
        values[ellipse(*place)] = hounsfield
    return values + np.random.default_rng(0).normal(0, 8, values.shape)


def draw_windows(file: Path) -> None:
    """The same values through four windows."""
    values, font = synthetic_ct().astype(np.float32), ImageFont.load_default(15)
    side, windows = values.shape[0], ("lung", "liver", "bone", None)
    sheet = Image.new("RGB", (4 * side + 18, side + 26), "white")
    for number, window in enumerate(windows):
        sheet.paste(read_medical_image(values, window=window).image, (number * (side + 6), 0))
        said = f'window="{window}"' if window else "none: percentiles"
        ImageDraw.Draw(sheet).text((number * (side + 6) + side / 2, side + 14), said, "#222222", font, anchor="mm")
    sheet.convert("L").save(file, optimize=True)


def draw_training(images: Path) -> None:
    """What `lladamedv train demo_lora` leaves to look at: its curve, and its sample answers in a browser."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        command = "lladamedv train demo_lora --eval_steps 100 --logging_steps 10".split()
        subprocess.run([*command, "--output_dir", folder], stdout=subprocess.DEVNULL, check=True)
        curve = Image.open(f"{folder}/loss_curve.png").convert("RGB")
        curve.quantize(64, Image.Quantize.FASTOCTREE).save(images / "training-curve.png", optimize=True)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": 900, "height": 620})
        page.goto(Path(folder, "answers.html").as_uri())
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        picture.quantize(128, Image.Quantize.FASTOCTREE).save(images / "training-answers.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("docs", type=Path, help="folder of the pages")
    parser.add_argument("--pictures", action="store_true", help="draw those of runs, too")
    parser.add_argument("--training", action="store_true", help="draw those of a training, too: some minutes")
    options = parser.parse_args()
    images = options.docs / "images"
    for name, plot in PLOTS.items():
        draw_plot(options.docs / plot.page, plot, images / f"{name}.svg")
    if options.pictures:
        draw_session(images / "terminal.svg")
        draw_windows(images / "windows.png")
    if options.training:
        draw_training(images)


if __name__ == "__main__":
    main()
