"""The command line, `lladamedv`: its commands. What they share is in `cli_common`.

Each command checks its words first, then calls `quiet`, which imports PyTorch, and then what does the work.
"""

import dataclasses
import json
import logging
import os
import re
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import typer

import lladamedv
from lladamedv.evaluation.published import CHAT_DECODING, VQA_DECODING
from lladamedv.modeling_lladamedv.presets_lladamedv import PRESETS
from lladamedv.processing.medical_images import is_url
from lladamedv.processing.picture_lists import parse_montage
from lladamedv.processing.vqa_sources import BENCHMARKS, SPLITS, TEST

from .cli_common import (
    DEBUG,
    READING,
    AsJson,
    CommandLine,
    Commands,
    Group,
    Host,
    Reader,
    Source,
    calls,
    check_exists,
    flag,
    generation_options,
    listen,
    model_options,
    one_of,
    print_json,
    progress,
    quiet,
    row_counter,
    takes,
    tell,
    usage,
    word,
)
from .doors import LOOPBACK_HOSTS
from .loading import DEMO, DTYPES, check_name, find_device, find_folder
from .many import SKIPPED_FILE, answer_many, check_output, run_folder
from .paths import EXPLANATION_SUFFIXES, check_new_file, check_new_folder, check_shard_size
from .units import TABLES, Looking, unit_of_picture, units_in_folder, units_in_table


MANY = "Many images"  # heading of `lladamedv ask --help`
# Headings of `lladamedv --help`.
USE, MEASURE, PUBLISH = "Ask a model", "Train and measure", "Make and publish models"
INCOMPLETE = 3  # exit code: there is a report, but some questions have no answer
# Warnings that a training hides: announced changes of libraries, and that there is no GPU.
_IGNORED = "ignore::FutureWarning,ignore::DeprecationWarning,ignore:'pin_memory' argument:UserWarning"

app = Commands(cls=CommandLine, no_args_is_help=True, pretty_exceptions_enable=False)
eval_app = Commands(cls=CommandLine, no_args_is_help=True)
analyze_app = Commands(cls=CommandLine, no_args_is_help=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lladamedv {lladamedv.__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: flag(bool, "Show where an error comes from, as a traceback.", "--debug", envvar=DEBUG) = False,
    version: flag(bool, "Print the version and exit.", "--version", check=_print_version, is_eager=True) = False,
) -> None:
    """LLaDA-MedV: a masked-diffusion vision-language model for biomedical images.

    Research software, not a medical device.

    Exit codes: 0 done, 1 an error, 2 wrong usage, 3 a report that lacks answers, 130 Ctrl-C.

    Models and data from the Hub are kept in HF_HOME; HF_TOKEN opens private ones, HF_HUB_OFFLINE=1 stays offline.

    \b
    Example:
      lladamedv ask picture.png "Is there a lesion?"
    """
    if debug:
        os.environ[DEBUG] = "1"


# Ask a model

IMAGE = "File (also DICOM, NIfTI and 16-bit pictures) or URL of an image"


def _no_training(wanted: bool) -> None:
    if wanted:
        raise ValueError("removed; use: lladamedv train demo_full")


@app.command(rich_help_panel=USE)
def demo(
    questions: flag(int, "How many held-out questions to ask.", min=3) = 300,
    output: flag(Path, "The .png sheet to write.", check=partial(check_new_file, suffixes=(".png",))) = Path(
        "lladamedv_demo.png"
    ),
    train: flag(bool, "", "--train", check=_no_training, hidden=True) = False,
    as_json: AsJson = False,
) -> None:
    """Measure the shipped tiny model on synthetic images, sighted and blind, and show how it denoises answers.

    \b
    Examples:
      lladamedv demo
      lladamedv demo --questions 1000 --output sheet.png
    """
    quiet()
    from lladamedv.demo import run_demo

    scores = run_demo(questions, output, report=progress(as_json))
    if as_json:
        print_json({"output": output, "scores": scores})


def _split(answers: str) -> list[str]:
    """The answers that --candidates names."""
    found = [each.strip() for each in answers.split(",")]
    if len(found) < 2 or "" in found:
        raise ValueError(f"{answers!r}; allowed are two or more answers with commas between them, as in Yes,No.")
    return found


@app.command(rich_help_panel=USE)
@takes(source=model_options(), read=READING, generation=generation_options())
def ask(
    image: word(str, "IMAGE", f"{IMAGE}; with --output also a folder of images, or a table that names them."),
    source: Source,
    read: Any,
    generation: dict,
    questions: word(
        list[str] | None, "QUESTION", "What to ask about it; with --output several, or none if the table has them."
    ) = None,
    explain: flag(
        Path | None, "Also write how the answer was denoised, as an .html or .png file.",
        check=partial(check_new_file, suffixes=EXPLANATION_SUFFIXES),
    ) = None,
    where: flag(
        Path | None, "Also write where in the image the answer comes from, as a map over it in a .png file.",
        check=partial(check_new_file, suffixes=(".png",)),
    ) = None,
    candidates: flag(
        str | None, "Possible answers, as Yes,No: print those that the true one may be, by the model's calibration.",
        check=_split,
    ) = None,
    group: flag(str | None, "With --candidates: the question's group, as the calibration calls it.") = None,
    output: flag(
        Path | None, "Answer all questions about all images, into a .csv, .jsonl or .parquet file; called again, it "
        "goes on where it stopped.", check=check_output, rich_help_panel=MANY,
    ) = None,
    every: flag(
        int | None, "Every so-manyth slice of volumes and DICOM series, from the first.", min=1, rich_help_panel=MANY
    ) = None,
    montage: flag(
        str | None, "The slices of each volume or DICOM study as one image, COLUMNSxROWS of them, spread evenly.",
        check=parse_montage, rich_help_panel=MANY,
    ) = None,
    batch_size: flag(
        int | None, "Questions at a time, in each process; by default 8.", min=1, rich_help_panel=MANY
    ) = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Answer one question about one image; or with --output many about many.

    With --output the images are the pictures in a folder and the folders in it; or those that a table (.csv, .tsv,
    .json, .jsonl, .parquet) names in its column image, with its columns question and id if it has them. With several
    GPUs: `accelerate launch -m lladamedv.cli ask …`. Exit code 3: some rows have an error instead of an answer.

    --where, and a page of --explain, run the model on up to 256 rows more, 32 at a time.

    What was done to the image on the way (window, frame, …) is printed on standard error, and a warning if the image is
    unlike those that the model was calibrated on.

    \b
    Examples:
      lladamedv ask picture.png "Is there a lesion?"
      lladamedv ask scan.dcm "Is there a fracture?" --window bone --model path/or/hub-id
      lladamedv ask picture.png "Describe the image." --steps 8 --json
      lladamedv ask picture.png "Describe the image." --explain denoising.html --where map.png
      lladamedv ask picture.png "Is there a lesion?" --candidates Yes,No
      lladamedv ask images "Is there a lesion?" "Describe the image." --output answers.csv
      lladamedv ask studies "Describe the image." --montage 4x3 --window lung --output reports.jsonl
      lladamedv ask questions.csv --output answers.csv
    """
    if candidates is not None and (generation or explain or where):
        raise usage(
            "--candidates", "it generates nothing; options of generation, --explain and --where do not go with it."
        )
    if group is not None and candidates is None:
        raise usage("--group", f"{group!r}; it goes with --candidates.")
    questions = questions or []
    if any(not each.strip() for each in questions):
        raise usage("QUESTION", "it is empty.")
    if output is not None:
        for name, value in {"--explain": explain, "--where": where}.items():
            if value is not None:
                raise usage(name, f"{str(value)!r}; it does not go with --output.")
        return _ask_many(
            image, questions, source, read, generation, output, as_json, every=every, montage=montage,
            batch_size=batch_size or 8, candidates=candidates, group=group,
        )  # fmt: skip
    for name, value in {"--every": every, "--montage": montage, "--batch-size": batch_size}.items():
        if value is not None:
            raise usage(name, f"{value!r}; it goes with --output.")
    if len(questions) != 1:
        if not questions:
            raise usage("QUESTION", "missing.")
        raise usage("QUESTION", f"{len(questions)} given; several go with --output, a file for the answers.")
    path = Path(image).expanduser()
    if path.is_dir() or (path.suffix.lower() in TABLES and path.is_file()):
        what = "folder" if path.is_dir() else "table"
        raise usage("IMAGE", f"{image!r} is a {what}; it goes with --output, a file for the answers.")
    (question,) = questions
    if not is_url(image) and not Path(image).expanduser().is_file() and Path(question).expanduser().is_file():
        raise usage("IMAGE", f"{image!r} is no file, but QUESTION {question!r} is one: the image comes first.")
    picture = read(image)
    quiet()
    from lladamedv.conversation import demo_notice, find_evidence
    from lladamedv.evaluation.answer_sets import answer_set
    from lladamedv.explanation import explain_answer

    model, processor = source.load()
    if candidates is None:
        given = explain_answer(model, processor, picture.image, question, picture.steps, **generation)
        relies = given.image_reliance
        found = {"answer": given.text, "confidence": given.confidence, "image_reliance": relies}
        notes = () if relies is None else (f"image reliance: {relies:+.2f} nats",)
    else:
        given = answer_set(model, processor, picture.image, question, _split(candidates), group)
        found = {"answer": str(given), "abstained": given.abstained, **vars(given)}
        notes = (given.summary, *given.notes)
    notice, steps = demo_notice(model), list(map(str, picture.steps))
    if as_json:
        print_json({**found, "image": steps, "notice": notice, "warning": given.warning})
    else:
        for line in filter(None, (f"image: {'; '.join(steps)}" if steps else None, notice, *notes)):
            tell(line)
        if given.warning:
            typer.echo(f"Warning: {given.warning}", err=True)
        typer.echo(found["answer"])
    page = explain is not None and explain.suffix.lower() == ".html"
    if where is not None or (page and given.ids):
        from lladamedv.evidence import save_evidence

        with row_counter() as count:
            evidence = find_evidence(model, processor, picture.image, question, given, callback=count)
        if where is not None:
            save_evidence(where, picture.image, evidence)
        given = dataclasses.replace(given, evidence=evidence)
    if explain is not None:
        given.save(explain)


def _ask_many(
    image: str, questions: list[str], source: Source, read: Reader, generation: dict, output: Path, as_json: bool,
    *, every: int | None, montage: str | None, batch_size: int, candidates: str | None, group: str | None,
) -> None:  # fmt: skip
    """Answer all questions about all pictures of a folder or table, or about one picture."""
    path = Path(image).expanduser()
    if not is_url(image) and not path.exists():
        raise usage("IMAGE", f"{image!r}; there is no such file or folder.")
    is_table = path.suffix.lower() in TABLES and path.is_file()
    if not questions and not is_table:
        raise usage("QUESTION", "missing; only a table may have the questions in it.")
    given = [name for name in ("frame", "slice_index", "page") if read.options[name] is not None]
    if given and (every or montage):
        raise usage(read.name_of(given[0]), f"{read.options[given[0]]}; --every and --montage choose the slices.")

    is_first = os.environ.get("RANK", "0") == "0"  # of the processes of `accelerate launch`
    say = tell if is_first else lambda line: None
    say(f"reading {image}")  # before PyTorch is imported, and before all names of a large folder are known
    skipped = []
    if path.is_dir():
        units, skipped = units_in_folder(
            path, questions, series=every is not None, studies=montage is not None,
            without=(output, run_folder(output)),
        )  # fmt: skip
    quiet()
    if is_table:
        units = units_in_table(path, questions)
    elif not path.is_dir():
        units = [unit_of_picture(image if is_url(image) else str(path), questions)]
    # What was done to each picture stands in its row.
    logging.getLogger("lladamedv.processing.medical_images").setLevel(logging.ERROR)
    from lladamedv.conversation import demo_notice

    if not units:
        raise ValueError(f"`image` is {image!r}, which holds no pictures, but {len(skipped)} other files.")
    say(f"{len(units)} {'series' if every or montage else 'images'}, {sum(len(unit.rows) for unit in units)} questions")
    if skipped and is_first:
        names = ", ".join(name for name, _ in skipped[:5]) + ", …" * (len(skipped) > 5)
        typer.echo(f"skipped {len(skipped)} files that are no pictures: {names}", err=True)
    model, processor = _load(source)
    if notice := demo_notice(model):
        say(notice)
    summary = answer_many(
        model, processor, units, output, skipped=skipped, batch_size=batch_size, group=group,
        looking=Looking(read.options, every, montage and parse_montage(montage), read.name_of),
        candidates=candidates and _split(candidates),
        command={"image": image if is_url(image) else str(path.resolve()), "questions": questions}, **generation,
    )  # fmt: skip
    lines = [f"{summary['rows']} rows, {summary['errors']} of them with an error instead of an answer"]
    if summary["marked"]:
        lines.append(f"{summary['marked']} texts that a spreadsheet would take for formulas begin with an apostrophe")
    if skipped:
        lines.append(f"{len(skipped)} files skipped: {run_folder(output) / SKIPPED_FILE}")
    _finish(summary, "\n".join(lines), as_json, output)


@app.command(rich_help_panel=USE)
@takes(source=model_options(), read=READING, generation=generation_options())
def chat(
    source: Source,
    read: Any,
    generation: dict,
    image: word(str | None, "IMAGE", f"{IMAGE}; or later, by /image FILE.") = None,
    show_steps: flag(bool, "Print the canvas after every step, one line each.", "--show-steps") = False,
    as_json: flag(bool, "Print question, answer and confidence as a line of JSON each.", "--json") = False,
) -> None:
    """Talk with a model about one image, and watch its answers being denoised.

    One question a line. /help lists the commands, Ctrl-C stops an answer, and Ctrl-D or /quit ends the chat. Options
    about images hold for all images of the chat.

    \b
    Examples:
      lladamedv chat picture.png
      lladamedv chat scan.dcm --window bone --model path/or/hub-id
      lladamedv chat picture.png --json < questions.txt > answers.jsonl
    """
    picture = None if image is None else read(image)
    quiet()
    from lladamedv.chat import Chat

    Chat(*source.load(), generation, read, show_steps, as_json).run(picture)


def _warn_of_others(host: str, what: str) -> bool:
    """Whether others than this computer reach the host; then the user is warned."""
    others = (f"[{host}]" if ":" in host else host) not in LOOPBACK_HOSTS
    if others:
        typer.echo(f"Warning: anyone who can reach {host} can use the {what}, without a password.", err=True)
    return others


@app.command("app", rich_help_panel=USE)
@takes(source=model_options())
def app_command(
    source: Source,
    host: Host = "127.0.0.1",
    port: flag(int, "Port to listen on.", min=1, max=65535) = 7860,
    share: flag(bool, "Make a public link, through Gradio's servers.", "--share") = False,
    compare_with: flag(str | None, "Another model, to compare answers side by side.", check=find_folder) = None,
) -> None:
    """Ask a model about images in the browser, and watch it denoise its answers.

    By default the page is at http://127.0.0.1:7860. Ctrl-C ends it, and all conversations with it.

    \b
    Examples:
      lladamedv app
      lladamedv app --model path/or/hub-id
      lladamedv app --model my/tuned-model --compare-with my/base-model
    """
    if ":" in host:
        raise ValueError(f"`host` is {host!r}; allowed are names and IPv4 addresses, because Gradio serves no others.")
    listen(host, port).close()
    quiet()
    from lladamedv.app import build_app, import_gradio, own_temporary_files

    with own_temporary_files():
        # What can fail is tried before a large model is loaded.
        import_gradio()
        find_device(source.device)
        others = {compare_with: source._replace(model=compare_with, revision=None).load()} if compare_with else None
        page = build_app(*source.load(), name=source.model, others=others)
        if share:
            typer.echo("Warning: anyone with the link can use the app, and uploads pass through Gradio.", err=True)
        _warn_of_others(host, "app")
        try:
            # Both addresses are given, so that no environment variable can open the app. Gradio's own lines advise to
            # share.
            _, local, _ = page.launch(
                server_name=host, server_port=port, share=share, inbrowser=False, quiet=True, prevent_thread_lock=True
            )
            typer.echo(f"The app is at {local}")
            page.block_thread()  # until Ctrl-C, which it swallows
        finally:
            page.close(verbose=False)
    raise typer.Exit(130)


@app.command(rich_help_panel=USE)
@takes(source=model_options())
def serve(
    source: Source,
    host: Host = "127.0.0.1",
    port: flag(int, "Port to listen on; 0 for a free one.", min=0, max=65535) = 8000,
    max_queue: flag(int, "How many requests may wait besides the next one to begin.", min=0) = 16,
    max_upload_size: flag(int, "Largest request, in MB.", min=1) = 20,
    max_positions: flag(int, "Positions of prompts and answers that are in work at a time.", min=1) = 16384,
) -> None:
    """Serve a model to clients of OpenAI's API.

    By default the API is at http://127.0.0.1:8000/v1. Ctrl-C ends it.

    \b
    Examples:
      lladamedv serve
      lladamedv serve --model path/or/hub-id
    """
    # What can fail is tried before a large model is loaded.
    listening = listen(host, port)
    quiet()
    from lladamedv.serving import build_api, make_server

    find_device(source.device)
    # Inherited by connections; without it each part of a stream would wait for the one before to be acknowledged.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    model = source.model
    name = "lladamedv-demo" if model == DEMO else Path(model).resolve().name if Path(model).is_dir() else model
    options = {
        "name": name, "max_queue": max_queue, "max_upload_size": max_upload_size * 1_000_000,
        "max_positions": max_positions,
    }  # fmt: skip
    if _warn_of_others(host, "server"):
        options["hosts"] = None  # the names under which it is known to others are not known here
    server = make_server(build_api(*source.load(), **options))
    address = f"[{host}]" if ":" in host else host
    typer.echo(f"{name} is served at http://{address}:{listening.getsockname()[1]}/v1")
    server.run(sockets=[listening])


@app.command(rich_help_panel=USE)
def info(as_json: AsJson = False) -> None:
    """Print versions, devices, what each extra lacks, and where models are: also what a report of a fault needs.

    \b
    Example:
      lladamedv info
    """
    quiet()
    from lladamedv.information import describe_installation

    sections = describe_installation()
    if as_json:
        return print_json(sections)
    width = max(len(name) for lines in sections.values() for name in lines)
    for title, lines in sections.items():
        typer.echo(title)
        for name, value in lines.items():
            typer.echo(f"  {name:{width}}  {value}")


# Train and measure


def _shipped(folder: str = "") -> Callable[[str], list[str]]:
    """Completes the names of recipes, or of configurations of accelerate."""

    def complete(incomplete: str) -> list[str]:
        from lladamedv.trainers.recipes import RECIPES

        return sorted(file.stem for file in (RECIPES / folder).glob("*.yaml") if file.stem.startswith(incomplete))

    return complete


@app.command(rich_help_panel=MEASURE, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: word(
        str | None, "RECIPE", "Name of a recipe, or a YAML file.", autocompletion=_shipped()
    ) = None,
    accelerate: flag(
        str | None, "Where to run: a configuration of accelerate, by the name of a shipped one or as a file.",
        autocompletion=_shipped("accelerate"),
    ) = None,
    list_recipes: flag(bool, "List the recipes.", "--list") = False,
    as_json: flag(bool, "With --list: as a JSON object.", "--json") = False,
) -> None:  # fmt: skip
    """Fine-tune a model: `accelerate launch -m lladamedv.trainers.sft --config RECIPE`.

    All other options, to be given after RECIPE, are arguments of that script and override the recipe. Names that TRL's
    and other trainers' command lines have for them are known, too: --model, --dataset, --output, --epochs, --lr.

    \b
    Examples:
      lladamedv train --list
      lladamedv train --model FOLDER --dataset DATA.csv --output OUT
      lladamedv train demo_lora -- --help
      lladamedv train demo_lora
      lladamedv train lora_one_gpu --model_name_or_path FOLDER --train_data DATA.json --output_dir OUT
      lladamedv train stage2_instruct --accelerate fsdp2
    """
    from lladamedv.trainers.recipes import accelerate_file, describe_recipes, launch, read_flags, recipe_file

    if list_recipes:
        recipes = describe_recipes()
        if as_json:
            return print_json(recipes)
        width = max(map(len, recipes))
        return typer.echo("\n".join(f"{name:{width}}  {description}" for name, description in recipes.items()))
    words = list(context.args)
    if recipe is not None and recipe.startswith("-"):
        words, recipe = [recipe, *words], None
    words = read_flags(words)
    file = recipe_file(recipe, words)
    configuration = accelerate_file(accelerate)
    tell(f"recipe: {file.stem}")  # before anything is imported
    if not os.environ.get(DEBUG):
        os.environ.setdefault("PYTHONWARNINGS", _IGNORED)
    raise typer.Exit(launch(configuration, "lladamedv.trainers.sft", ["--config", str(file), *words]))


def _check(flag: str, check: Callable[[str], None], value: str) -> None:
    try:
        check(value)
    except ValueError as error:
        raise usage(flag, str(error)) from None


class Questions(NamedTuple):
    """Which questions to ask, and what to do about those that cannot be read."""

    benchmark: str | None
    data: str | None
    split: str | None
    source: str | None
    path: str | None
    revision: str | None
    image_folder: Path | None
    invalid_records: str
    limit: int | None

    def check(self) -> "Questions":
        """Refuse options that do not go together."""
        of_benchmark = {"--source": self.source, "--path": self.path, "--revision": self.revision}
        if (self.benchmark is None) == (self.data is None):
            given = "none" if self.data is None else "both"
            raise usage("--benchmark, --data", f"{given} given; exactly one is needed.")
        if self.data is None and self.split is not None:
            _check("--split", one_of(*SPLITS), self.split)
        for name, value in of_benchmark.items():
            if self.data is not None and value is not None:
                raise usage(name, f"{value!r}; it goes with --benchmark.")
        if self.path is not None and self.benchmark != "phantoms":
            _check("--path", check_exists, self.path)
        return self

    def load(self) -> tuple:
        """The questions, and the report about what was loaded."""
        from lladamedv.processing.datasets import load_own_vqa, load_vqa

        options = {"image_folder": self.image_folder, "invalid_records": self.invalid_records}
        if self.data is not None:
            dataset, report = load_own_vqa(self.data, self.split, **options)
        else:
            options |= {"source": self.source, "path": self.path, "revision": self.revision}
            dataset, report = load_vqa(self.benchmark, self.split, **options)
        if not len(dataset):
            found = "; ".join(report.summary().splitlines())
            raise ValueError(f"No question is left. {found}. --image-folder says where images are.")
        return dataset if self.limit is None else dataset.select(range(min(self.limit, len(dataset)))), report


def questions_options(benchmark: str | None = None, split: str = TEST) -> Group:
    """Which questions; `benchmark`, and of a benchmark `split`, if the user names none."""
    panel = {"rich_help_panel": "Questions"}
    parameters = {
        "benchmark": flag(str | None, f"{', '.join(BENCHMARKS)}; phantoms come with this.", check=one_of(*BENCHMARKS),
                          **panel),
        "data": flag(str | None, "Questions of your own instead of a benchmark: a .json, .jsonl, .csv, .tsv or "
                     ".parquet file, or a folder.", check=check_exists, **panel),
        "split": flag(str | None, f"train, validation or test, by default {split}; of --data any that it has.",
                      **panel),
        "source": flag(str | None, "Which publication of the benchmark, by its Hub id.", **panel),
        "path": flag(str | None, "The benchmark's files instead of the Hub's; for phantoms SEED:COUNT[:KINDS].",
                     **panel),
        "revision": flag(str | None, "Revision of the benchmark on the Hub.", **panel),
        "image_folder": flag(Path | None, "Where the image files are that the questions name: a folder or .zip.",
                             check=check_exists, **panel),
        "invalid_records": flag(str, "error, or skip: leave malformed records out, and say so.",
                                check=one_of("error", "skip"), **panel),
        "limit": flag(int | None, "Only the first so many questions.", min=1, **panel),
    }  # fmt: skip

    def read(own: dict, given: dict) -> Questions:
        questions = Questions(**own)
        if questions.data is None and questions.benchmark is None:
            questions = questions._replace(benchmark=benchmark)
        if questions.data is None and questions.split is None:
            questions = questions._replace(split=split)
        return questions.check()

    defaults = {"invalid_records": "error"}
    return Group({name: (each, defaults.get(name)) for name, each in parameters.items()}, read)


Output = flag(Path, "Folder of the run; called again, it goes on where it stopped.", file_okay=False)
BatchSize = flag(int, "Questions at a time, in each process.", min=1)
Bootstrap = flag(int, "Samples of the bootstrap for 95 % intervals; 0 for none.", min=0)
Seed = flag(int, "Seed of the bootstrap, and of sampling.")
Summary = flag(bool, "Print the summary as JSON instead of Markdown.", "--json")


def _load(source: Source) -> tuple:
    """Model and processor, by default on this process's device."""
    from lladamedv.evaluation.runs import process_state

    return source.load(process_state().device)


def _finish(summary: dict, text: str, as_json: bool, output: Path) -> None:
    from lladamedv.evaluation.runs import process_state

    if process_state().is_main_process:
        typer.echo(json.dumps(summary) if as_json else text)
        tell(f"wrote {output}")
    process_state().destroy_process_group()
    if not summary.get("complete", True):
        raise typer.Exit(INCOMPLETE)


@eval_app.command()
@takes(
    source=model_options(..., "--model-revision"),
    questions=questions_options(),
    generation=generation_options(**VQA_DECODING),
)
def vqa(
    source: Source,
    questions: Questions,
    generation: dict,
    output: Output,
    scoring: flag(
        str, "generate, or likelihood: yes or no, whichever is the likelier answer.",
        check=one_of("generate", "likelihood"),
    ) = "generate",
    image_controls: flag(
        bool, "Also ask about another, an empty and a noise picture: do the scores come from the pictures?",
        "--image-controls",
    ) = False,
    train_candidates: flag(
        bool, "Also LLaVA-Med's choice among the open answers of the train split.", "--train-candidates"
    ) = False,
    batch_size: BatchSize = 8,
    bootstrap_samples: Bootstrap = 1000,
    seed: Seed = 0,
    as_json: Summary = False,
) -> None:  # fmt: skip
    """Answer and score a VQA benchmark, or questions of your own.

    With several GPUs: `accelerate launch -m lladamedv.cli eval vqa …`.

    Exactly one of --benchmark and --data is needed. Columns of --data are recognised by their names: question, answer,
    image, and if there are any id, answer_type and split. The report says which were read.

    Exit code 3: the report is written, but questions are missing from it.

    \b
    Examples:
      lladamedv eval vqa --data questions.csv --image-folder images --model demo --output runs/own
      lladamedv eval vqa --benchmark slake --model path/or/hub-id --output runs/slake --dtype bfloat16
      lladamedv eval vqa --benchmark phantoms --model demo --output runs/phantoms --max-new-tokens 24 \\
          --block-length 8 --steps 24 --image-controls
    """
    quiet()
    from lladamedv.evaluation.vqa import evaluate_vqa, render_summary
    from lladamedv.processing.datasets import training_open_answers

    dataset, report = questions.load()
    candidates = None
    if train_candidates:
        candidates = training_open_answers(questions._replace(split="train", limit=None).load()[0])
    summary = evaluate_vqa(
        *_load(source), dataset, report, output, model_name=source.model, options=generation, scoring=scoring,
        image_controls=image_controls, batch_size=batch_size, candidates=candidates,
        bootstrap_samples=bootstrap_samples, seed=seed,
    )  # fmt: skip
    _finish(summary, render_summary(summary), as_json, output)


@app.command(rich_help_panel=MEASURE)
@takes(source=model_options(..., "--model-revision"), questions=questions_options())
def calibrate(
    source: Source,
    questions: Questions,
    output: Output,
    alpha: flag(float, "Share of the sets that may lack the true answer, between 0 and 1.") = 0.1,
    candidates: flag(
        list[str], "Possible answers, as Yes,No; several times for several kinds of questions.",
        check=lambda lists: [*map(_split, lists)],
    ) = ["Yes,No"],  # noqa: B006
    group_by: flag(str | None, "Column, as modality: also a threshold for each group of questions.") = None,
    as_json: Summary = False,
) -> None:  # fmt: skip
    """Calibrate a model for sets of answers that hold the true one, and for telling unusual pictures.

    The questions must be none that the model was trained on. calibration.json is written beside the model, which must
    be a folder, and its card says what the guarantee rests on. `ask --candidates`, the app, the server and `eval vqa`
    use it.

    \b
    Examples:
      lladamedv calibrate --model FOLDER --data questions.csv --image-folder images --output runs/calibration
      lladamedv calibrate --model FOLDER --benchmark slake --split validation --group-by modality --output runs/slake \\
          --candidates Yes,No --candidates CT,MRI,X-Ray
    """
    folder = find_folder(source.model)
    if folder is None:
        raise usage("--model", f"{source.model!r} is on the Hub; calibration.json needs a folder: `hf download` it.")
    if not 0 < alpha < 1:
        raise usage("--alpha", f"{alpha}; allowed are numbers above 0 and below 1.")
    quiet()
    from lladamedv.evaluation.answer_sets import CALIBRATION_FILE
    from lladamedv.evaluation.calibrating import calibrate
    from lladamedv.evaluation.runs import process_state
    from lladamedv.hub_cards.cards import CARD, state_in_card

    dataset, report = questions.load()
    if report.missing_images or report.invalid:
        tell(report.summary())
    model, processor = _load(source)
    calibration = calibrate(
        model, processor, dataset, report, output, alpha=alpha, candidates=[*map(_split, candidates)],
        group_by=group_by,
    )  # fmt: skip
    if process_state().is_main_process:
        calibration.save(folder)
        if (card := folder / CARD).is_file():
            text = state_in_card(card.read_text(encoding="utf-8"), "Answer sets", calibration.statement())
            card.write_text(text, encoding="utf-8")
    summary = {name: value for name, value in vars(calibration).items() if name != "picture_model"}
    _finish(summary, calibration.statement(), as_json, folder / CALIBRATION_FILE)


def _held_out(questions: Questions, names: list[str]) -> dict:
    """The data sets that are evaluated on, by name: those that are named, or a benchmark's own test split."""
    from lladamedv.processing.datasets import load_own_vqa, load_vqa

    loaded = {}
    for name in names:
        loaded[name] = (load_vqa(name) if name in BENCHMARKS else load_own_vqa(name, invalid_records="skip"))[0]
    one_file = questions.path is not None and os.path.isfile(os.path.expanduser(questions.path))
    if not names and questions.benchmark is not None and not one_file:
        path = None if questions.benchmark == "phantoms" else questions.path
        test = questions._replace(split=TEST, path=path, limit=None)
        loaded[f"{questions.benchmark} {TEST}"] = test.load()[0]
    return loaded


def _check_held_out(names: list[str]) -> None:
    for name in names:
        if name not in BENCHMARKS:
            check_exists(name)


@app.command(rich_help_panel=MEASURE)
@takes(
    source=model_options(None, "--model-revision"),
    questions=questions_options(split="train"),
    generation=generation_options(**VQA_DECODING, temperature=1.0),
)
def pairs(
    source: Source,
    questions: Questions,
    generation: dict,
    output: Output,
    rejected: flag(
        str, "Wrong answers: sampled from the model, of other pictures to the same question, or both: of other "
        "pictures where no sample is wrong.", check=one_of("model", "pictures", "both"),
    ) = "both",
    tries: flag(int, "How often at most to sample an answer until one is wrong.", min=1) = 4,
    held_out: flag(
        list[str], "Data to be evaluated on, a benchmark or a file; several times. Questions about their pictures are "
        "left out. By default the test split of --benchmark.", check=_check_held_out,
    ) = [],  # noqa: B006
    batch_size: BatchSize = 8,
    seed: flag(int, "Seed of the samples, and of which other picture's answer is taken.") = 0,
    as_json: Summary = False,
) -> None:  # fmt: skip
    """Make preference pairs of questions with known answers, to train on with `--method dpo`.

    The true answer is chosen, a wrong one is rejected. OUTPUT/pairs.parquet has TRL's columns; questions that give no
    pair are counted.

    \b
    Examples:
      lladamedv pairs --benchmark slake --model path/or/hub-id --output runs/pairs
      lladamedv pairs --data questions.csv --rejected pictures --held-out test.csv --output runs/pairs
      lladamedv train demo_dpo --train_data runs/pairs/pairs.parquet
    """
    if (source.model is None) != (rejected == "pictures"):
        raise usage("--model", "missing; answers are sampled from it, unless with --rejected pictures."
                    if source.model is None else f"{source.model!r}; with --rejected pictures nothing is sampled.")
    quiet()
    from lladamedv.evaluation.preference_pairs import build_pairs, render_pairs

    dataset, report = questions.load()
    held = _held_out(questions, held_out)
    model, processor = (None, None) if source.model is None else _load(source)
    summary = build_pairs(
        model, processor, dataset, report, output, rejected=rejected, tries=tries, options=generation, held_out=held,
        batch_size=batch_size, seed=seed,
    )  # fmt: skip
    _finish(summary, render_pairs(summary).rstrip(), as_json, output)


@eval_app.command("chat")
@takes(
    source=model_options(None, "--model-revision"),
    generation=generation_options(**CHAT_DECODING),
)
def eval_chat(
    source: Source,
    generation: dict,
    questions: flag(Path, "The benchmark's file, llava_med_eval_qa50_qa.jsonl.", check=check_exists),
    output: Output,
    answers: flag(
        Path | None, "Instead of --model: a file of answers, ours or in a published form.", check=check_exists
    ) = None,
    image_folder: flag(Path | None, "Where the images are; needed with --model.", check=check_exists) = None,
    limit: flag(int | None, "Only the first so many questions.", min=1) = None,
    batch_size: BatchSize = 1,
    judge_model: flag(str | None, "What the server calls the judge; without it, answers are not judged.") = None,
    judge_url: flag(str | None, "Address of an OpenAI-compatible server, as http://localhost:8000/v1.") = None,
    judge_key_env: flag(str | None, "Name of the environment variable that holds the server's key.") = None,
    reasoning_judge: flag(
        bool, "The judge takes max_completion_tokens and no temperature.", "--reasoning-judge"
    ) = False,
    swap_positions: flag(bool, "Judge twice, with the answers in both orders.", "--swap-positions") = False,
    max_concurrent: flag(int, "Requests to the judge at a time.", min=1) = 4,
    allow_partial: flag(bool, "Judge even if some questions have no answer.", "--allow-partial") = False,
    bootstrap_samples: Bootstrap = 1000,
    seed: Seed = 0,
    as_json: Summary = False,
) -> None:
    """Answer the open-ended biomedical chat benchmark and have the answers judged.

    Nothing is sent anywhere but to --judge-url, or to OpenAI if only --judge-key-env is given. Exit code 3: the report
    is written, but questions are missing from it.

    \b
    Examples:
      lladamedv eval chat --questions qa50.jsonl --image-folder images --model path/or/hub-id --output runs/chat
      lladamedv eval chat --questions qa50.jsonl --answers answers.jsonl --output runs/chat --judge-model NAME \\
          --judge-url http://localhost:8000/v1
    """
    if (source.model is None) == (answers is None):
        given = "none" if answers is None else "both"
        raise usage("--model, --answers", f"{given} given; exactly one is needed.")
    if source.model is not None and image_folder is None:
        raise usage("--image-folder", "missing; a model needs the images.")
    key = None if judge_key_env is None else os.environ.get(judge_key_env)
    if judge_key_env is not None and not key:
        raise usage("--judge-key-env", f"{judge_key_env!r}, but there is no such environment variable.")
    if judge_model is not None and judge_url is None and key is None:
        raise usage("--judge-model", "needs --judge-url or --judge-key-env: nothing is sent anywhere without one.")
    quiet()
    from lladamedv.evaluation.chat import answer_chat_benchmark, judge_answers, read_answers, summarize, to_markdown
    from lladamedv.evaluation.judge import OpenAIJudge
    from lladamedv.evaluation.reports import write_report
    from lladamedv.evaluation.runs import process_state
    from lladamedv.processing.datasets import load_chat_benchmark

    # What can fail is tried before a large model answers for hours.
    judge = judge_model and OpenAIJudge(judge_model, judge_url, key, reasoning_model=reasoning_judge)
    asked = load_chat_benchmark(questions)[0][:limit]
    if source.model is not None:
        records = _with_images(questions, image_folder, asked)
        allow_partial = allow_partial or len(records) < len(asked)  # the summary says how many are missing
        answers = answer_chat_benchmark(
            *_load(source), records, output, model_name=source.model, options=generation, batch_size=batch_size
        )
    if judge is None:
        return typer.echo(f"answers: {answers}; give --judge-model to have them judged")
    if process_state().is_main_process:
        given = read_answers(answers)
        judged = judge_answers(
            asked, given, judge, output, swap_positions=swap_positions, allow_partial=allow_partial,
            max_concurrent=max_concurrent, report=progress(True),
        )  # fmt: skip
        name = source.model or answers.name
        summary = summarize(asked, given, judged, name=name, bootstrap_samples=bootstrap_samples, seed=seed)
        text = to_markdown(summary)
        write_report(output, summary, text)
        _finish(summary, text, as_json, output)


def _with_images(questions: Path, image_folder: Path, asked: list[dict]) -> list[dict]:
    """The questions that are asked, as far as their images are there; a line says which are not."""
    from lladamedv.processing.datasets import load_chat_benchmark

    records, report = load_chat_benchmark(questions, image_folder)
    ids = {record["id"] for record in asked}
    records = [record for record in records if record["id"] in ids]
    if not records:
        raise ValueError(f"`image_folder` is {str(image_folder)!r}, which has none of the images.")
    if report.missing_images:
        tell(report.summary())
    return records


@analyze_app.command()
@takes(
    source=model_options(..., "--model-revision"),
    questions=questions_options("phantoms"),
    generation=generation_options(without=("steps", "max_new_tokens", "block_length")),
)
def decoding(
    source: Source,
    questions: Questions,
    generation: dict,
    output: Output,
    steps: flag(list[int], "Steps (Z); may be repeated.", min=1) = [256, 128, 64, 32, 16],  # noqa: B006
    max_new_tokens: flag(list[int], "Length of the canvas (L); may be repeated.", min=1) = [256],  # noqa: B006
    block_length: flag(list[int], "Length of a block (B); may be repeated.", min=1) = [64],  # noqa: B006
    full_canvas: flag(
        bool, "Denoise the whole canvas, also behind an end: shows repetition that ends hide.", "--full-canvas"
    ) = False,
    noise_pictures: flag(
        bool, "Ask about pictures of noise: what the model says where there is nothing to see.", "--noise-pictures"
    ) = False,
    batch_size: BatchSize = 1,
    example_id: flag(str | None, "Question whose answers are shown.") = None,
    bootstrap_samples: Bootstrap = 1000,
    seed: Seed = 0,
    as_json: Summary = False,
) -> None:
    """Sweep steps, canvas and block: words, seconds, repetition and accuracy (LLaDA-MedV's table 3 and figure 5).

    The questions are those of the phantoms, of another --benchmark, or of --data.

    \b
    Example:
      lladamedv analyze decoding --model demo --output runs/decoding --path 9000:60:description \\
          --max-new-tokens 24 --block-length 24 --steps 24 --steps 6 --steps 1
    """
    quiet()
    from lladamedv.evaluation import decoding_analysis as analysis

    records, report = questions.load()
    if report.missing_images or report.invalid:
        tell(report.summary())
    if noise_pictures:
        records = analysis.noise_pictures(records, seed)
    summary = analysis.analyze_decoding(
        *_load(source), records, output, steps=steps, max_new_tokens=max_new_tokens, block_length=block_length,
        batch_size=batch_size, full_canvas=full_canvas, extra_options=generation, name=source.model,
        example_id=example_id, bootstrap_samples=bootstrap_samples, seed=seed, report=progress(True),
    )  # fmt: skip
    _finish(summary, analysis.to_markdown(summary), as_json, output)


@eval_app.callback()
def _eval() -> None:
    """Measure a model on a benchmark or on data of your own.

    \b
    Examples:
      lladamedv eval vqa --benchmark phantoms --model demo --output runs/phantoms
      lladamedv eval vqa --data questions.csv --model demo --output runs/own
    """


@analyze_app.callback()
def _analyze() -> None:
    """Look into how a model answers.

    \b
    Example:
      lladamedv analyze decoding --model demo --output decoding
    """


app.add_typer(eval_app, name="eval", rich_help_panel=MEASURE)
app.add_typer(analyze_app, name="analyze", rich_help_panel=MEASURE)


# Make and publish models


def _check_aspect_ratio(ratio: str) -> None:
    if not re.fullmatch(r"square|pad|anyres_max_0*[1-9]\d*", ratio):
        raise ValueError(f"{ratio!r}; allowed are square, pad and anyres_max_N with a whole number N of at least 1.")


def _check_folder(folder: Path) -> None:
    if not folder.expanduser().is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}.")


def _check_repo(repo: str) -> None:
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", repo) or "--" in repo or ".." in repo:
        raise ValueError(f"{repo!r} is no Hub id, OWNER/NAME.")


def _check_space_model(model: str) -> None:
    if model != DEMO and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        raise ValueError(f"{model!r}; allowed are a Hub id, OWNER/NAME, and {DEMO}.")


def _check_splits(splits: list[str]) -> None:
    for split in splits:
        one_of(*SPLITS)(split)


Out = word(Path, "OUT", "Folder to create.", check=check_new_folder)
Tokenizer = flag(
    str | None, "Folder or Hub id of the tokenizer, if it does not lie beside the weights.", check=check_name
)
StoredDtype = flag(str | None, f"{', '.join(DTYPES[1:])}; by default the source's.", check=one_of(*DTYPES[1:]))
ShardSize = flag(str, "Largest shard; at most one is held in memory.", check=check_shard_size)


@app.command(rich_help_panel=PUBLISH)
@calls("lladamedv.conversion:convert_checkpoint")
def convert(
    source: word(str, "SOURCE", "Folder or Hub id with LLaDA, LLaDA-V or LLaDA-MedV weights.", check=check_name),
    out: Out,
    tokenizer: Tokenizer = None,
    vision_tower: flag(
        str | None, "Folder or Hub id of the SigLIP, if it is not SigLIP2 so400m/14-384 or not in SOURCE.",
        check=check_name,
    ) = None,
    dtype: StoredDtype = None,
    preset: flag(
        str | None, f"Prompt and generation options: {', '.join(PRESETS)}; by default known from the source's name, or "
        "else from its layout.", check=one_of(*PRESETS),
    ) = None,
    max_shard_size: ShardSize = "2GB",
    revision: flag(str | None, "Revision of SOURCE on the Hub.") = None,
    push: flag(str | None, "Hub id to upload OUT to.", check=_check_repo) = None,
    public: flag(bool, "Create that repository as a public one.", "--public") = False,
) -> None:  # fmt: skip
    """Turn released weights into a folder that loads with `from_pretrained`.

    \b
    Examples:
      lladamedv convert LLaDAMedV-2A4E converted
      lladamedv convert SLAKE_10E slake --preset llada-medv-vqa --push ME/llada-medv-slake
    """
    if public and push is None:
        raise usage("--public", "it goes with --push.")


@app.command(rich_help_panel=PUBLISH)
@calls("lladamedv.conversion:initialize_checkpoint")
def init(
    out: Out,
    language_model: flag(str, "Folder or Hub id of LLaDA-8B-Instruct.", check=check_name),
    vision_tower: flag(str, "Folder or Hub id of SigLIP2, the tower or the whole model.", check=check_name),
    projector: flag(
        Path | None, "Projector of stage 1: safetensors, or .bin, which is unpickled with "
        "torch.load(weights_only=True).", exists=True, dir_okay=False,
    ) = None,
    tokenizer: Tokenizer = None,
    dtype: StoredDtype = None,
    aspect_ratio: flag(str, "square, pad or anyres_max_N.", check=_check_aspect_ratio) = "anyres_max_4",
    seed: flag(int, "Seed of the untrained weights.", min=0) = 0,
    max_shard_size: ShardSize = "2GB",
) -> None:  # fmt: skip
    """Put a new model together from a LLaDA, a SigLIP and an untrained or stage-1 projector.

    \b
    Example:
      lladamedv init new --language-model LLaDA-8B-Instruct --vision-tower siglip2-so400m-patch14-384
    """


Repo = word(str, "REPO", "Hub id, OWNER/NAME; created as a private one if there is none.", check=_check_repo)
PUSHING = Group({
    "private": (flag(bool, "Create a public repository, or push to one.", " /--public", show_default=False), True),
    "replace": (flag(bool, "Push over a repository of another kind, and delete what it holds.", "--replace"), False),
    "revision": (flag(str | None, "Branch to push to, created if there is none.", "--branch"), None),
    "dry_run": (flag(bool, "Check and list only; nothing is sent.", "--dry-run"), False),
})  # fmt: skip


@app.command(rich_help_panel=PUBLISH)
@calls("lladamedv.hub_cards.push:push_folder")
@takes(pushing=PUSHING)
def push(
    folder: word(Path, "FOLDER", "Folder of a model, or of LoRA adapters.", check=_check_folder),
    repo: Repo,
    adapter_merge: flag(bool, "Merge adapters into their model and push that.", "--merge") = False,
    base_model: flag(str | None, "Hub id of the adapters' model; to merge, also a folder.") = None,
    leave_out: flag(list[str], "Pattern of files not to push, as 'checkpoint-*'; several times.") = [],  # noqa: B006
    **pushing,
) -> None:
    """Push a model's folder to the Hub, checked, and as one commit.

    \b
    Examples:
      lladamedv push converted ME/llada-medv --dry-run
      lladamedv push converted ME/llada-medv
      lladamedv push adapters ME/llada-medv-lora --base-model ME/llada-medv
    """


@app.command("push-dataset", rich_help_panel=PUBLISH)
@calls("lladamedv.hub_cards.push:push_dataset")
@takes(pushing=PUSHING)
def push_dataset(
    benchmark: word(str, "BENCHMARK", f"{', '.join(BENCHMARKS)}.", check=one_of(*BENCHMARKS)),
    repo: Repo,
    splits: flag(list[str] | None, "train, validation or test; by default all.", "--split", check=_check_splits) = None,
    source: flag(str | None, "Which publication of the benchmark, by its Hub id.") = None,
    path: flag(str | None, "Local data instead of the Hub's; for phantoms SEED:COUNT.") = None,
    image_folder: flag(Path | None, "Where image files named in --path are.") = None,
    data_revision: flag(str | None, "Revision of the source on the Hub.", "--revision") = None,
    recipe_only: flag(bool, "Push no records, but a card that says how to load them.", "--recipe-only") = False,
    **pushing,
) -> None:
    """Push a VQA benchmark in one form to the Hub, or how to build it where its licence forbids more.

    \b
    Examples:
      lladamedv push-dataset phantoms ME/phantoms --path 1:500 --dry-run
      lladamedv push-dataset slake ME/slake --recipe-only
    """


@app.command(rich_help_panel=PUBLISH)
def space(
    name: word(str, "NAME", "The Space's title."),
    out: Out,
    model: flag(str, "Hub id of a model, or `demo` for the one that comes with this.", check=_check_space_model) = DEMO,
    revision: flag(str | None, "Revision of --model on the Hub.") = None,
    as_json: AsJson = False,
) -> None:
    """Write a Gradio Space: a folder to upload with `hf upload ME/SPACE FOLDER --repo-type space`.

    \b
    Example:
      lladamedv space "Ask about medical images" my_space --model ME/llada-medv
    """
    quiet()
    from lladamedv.hub_cards.push import write_space

    write_space(name, out, model, revision=revision, report=progress(as_json))
    if as_json:
        print_json({"output": out, "model": model, "revision": revision})


if __name__ == "__main__":
    app()
