"""The command line, `lladamedv`: its commands, and those that need no module of their own."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import lladamedv
from lladamedv.processing.medical_images import is_url

from .cli_app import app_command
from .cli_chat import chat, read_picture, takes_reading_options
from .cli_common import (
    DEBUG,
    AsJson,
    CommandLine,
    Device,
    Dtype,
    Model,
    Options,
    Revision,
    check_generation,
    checked,
    one_of,
    parse_options,
    print_json,
    progress,
    quiet,
)
from .cli_evaluation import analyze_app, eval_app
from .cli_hub import check_repo, push, push_dataset, space
from .cli_serve import serve
from .loading import DEMO, DTYPES, check_name, load_model
from .paths import EXPLANATION_SUFFIXES, check_folder_to_fill, check_new_file, check_new_folder, check_shard_size


# Headings of `lladamedv --help`.
USE, MEASURE, PUBLISH = "Ask a model", "Train and measure", "Make and publish models"

# In a training's process: what versions to come will change, and that there is no GPU.
_IGNORED = "ignore::FutureWarning,ignore::DeprecationWarning,ignore:'pin_memory' argument:UserWarning"

app = typer.Typer(cls=CommandLine, no_args_is_help=True, pretty_exceptions_enable=False)


def _shipped(folder: str):
    """Completes the names of YAML files in a folder of `trainers`, without importing it."""
    files = (Path(path) / "trainers" / folder for path in lladamedv.__path__)
    names = sorted(file.stem for path in files for file in path.glob("*.yaml"))
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lladamedv {lladamedv.__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[
        bool, typer.Option("--debug", envvar=DEBUG, help="Show where an error comes from, as a traceback.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """LLaDA-MedV: a masked-diffusion vision-language model for biomedical images.

    Research software, not a medical device.

    Exit codes: 0 done, 1 an error, 2 wrong usage, 3 a report that lacks answers, 130 Ctrl-C.

    Models and data from the Hub are kept in HF_HOME; HF_TOKEN lets into private ones, HF_HUB_OFFLINE=1 stays offline.

    \b
    Example:
      lladamedv ask picture.png "Is there a lesion?"
    """
    if debug:
        os.environ[DEBUG] = "1"


@app.command(rich_help_panel=USE)
def demo(
    train: Annotated[
        bool, typer.Option("--train", help="Train the demo model anew (about 80 minutes of 2 cores).")
    ] = False,
    questions: Annotated[
        int | None, typer.Option(min=3, help="How many held-out questions to ask.", show_default="300")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The .png sheet to write, or with --train the folder of the new model.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of --train.", show_default="0")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the shipped tiny model on synthetic images, sighted and blind, and show how it denoises answers.

    \b
    Examples:
      lladamedv demo
      lladamedv demo --questions 1000 --output sheet.png
      lladamedv demo --train --output my_model
    """
    for flag, value, goes in (("--questions", questions, not train), ("--seed", seed, train)):
        if value is not None and not goes:
            raise typer.BadParameter(f"{value}; it goes {'without' if train else 'with'} --train.", param_hint=flag)
    output = output or Path("lladamedv_demo_model" if train else "lladamedv_demo.png")
    check = check_folder_to_fill if train else partial(check_new_file, suffixes=(".png",))
    try:
        check(output)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--output'") from error
    # Imported here, so that `lladamedv --help` does not wait for what only some commands need.
    quiet()
    from lladamedv.demo import run_demo
    from lladamedv.demo_training import train_demo

    if train:
        train_demo(output, seed or 0, report=progress(as_json))
        result = {"output": output}
    else:
        result = {"output": output, "scores": run_demo(questions or 300, output, report=progress(as_json))}
    if as_json:
        print_json(result)


@app.command(rich_help_panel=USE)
@takes_reading_options
def ask(
    image: Annotated[
        str,
        typer.Argument(metavar="IMAGE", help="File (also DICOM, NIfTI and 16-bit pictures) or URL of an image."),
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")],
    model: Model = DEMO,
    revision: Revision = None,
    reading: dict = {},  # noqa: B006  stands for all options of the reader
    option: Options = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    explain: Annotated[
        Path | None,
        typer.Option(
            help="Also write how the answer was denoised, as an .html or .png file.",
            callback=checked(partial(check_new_file, suffixes=EXPLANATION_SUFFIXES)),
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer one question about one image.

    What was done to the image on the way (window, frame, …) is said on standard error.

    \b
    Examples:
      lladamedv ask picture.png "Is there a lesion?"
      lladamedv ask scan.dcm "Is there a fracture?" --window bone --model path/or/hub-id
      lladamedv ask picture.png "Describe the image." --option steps=8 --json
      lladamedv ask picture.png "Describe the image." --explain denoising.html
    """
    if not is_url(image) and not Path(image).expanduser().is_file() and Path(question).expanduser().is_file():
        message = f"{image!r} is no file, but QUESTION {question!r} is one: the image comes first."
        raise typer.BadParameter(message, param_hint="IMAGE")
    if not question.strip():
        raise typer.BadParameter("it is empty.", param_hint="QUESTION")
    options = parse_options(option)
    check_generation(model, options)
    read = read_picture(image, reading)
    quiet()
    from lladamedv.conversation import demo_notice
    from lladamedv.evaluation.answering import answer_batch, question_about
    from lladamedv.explanation import explain_answer

    loaded, processor = load_model(model, dtype, device, revision)
    if explain is None:
        given = answer_batch(loaded, processor, [question_about(read.image, question)], **options)[0]
    else:
        given = explain_answer(loaded, processor, read.image, question, read.steps, **options)
    notice = demo_notice(loaded)
    if as_json:
        print_json({"answer": given.text, "confidence": given.confidence, "image": read.steps, "notice": notice})
    else:
        if read.steps:
            typer.echo(f"image: {'; '.join(read.steps)}", err=True)
        if notice is not None:
            typer.echo(notice, err=True)
        typer.echo(given.text)
    if explain is not None:
        given.save(explain)


app.command(rich_help_panel=USE)(chat)
app.command("app", rich_help_panel=USE)(app_command)
app.command(rich_help_panel=USE)(serve)


@app.command(rich_help_panel=MEASURE, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a recipe, or a YAML file.", autocompletion=_shipped("recipes"))
    ] = None,
    accelerate: Annotated[
        str | None,
        typer.Option(
            help="Where to run: a configuration of accelerate, by the name of a shipped one or as a file.",
            autocompletion=_shipped("recipes/accelerate"),
        ),
    ] = None,
    list_recipes: Annotated[bool, typer.Option("--list", help="List the recipes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --list: as a JSON object.")] = False,
) -> None:
    """Fine-tune a model: `accelerate launch -m lladamedv.trainers.sft --config RECIPE`.

    All other options, to be given after RECIPE, are arguments of that script and override the recipe.

    \b
    Examples:
      lladamedv train --list
      lladamedv train demo_lora -- --help
      lladamedv train demo_lora
      lladamedv train lora_one_gpu --model_name_or_path FOLDER --train_data DATA.json --output_dir OUT
      lladamedv train stage2_instruct --accelerate fsdp2
    """
    from lladamedv.trainers.recipes import accelerate_file, check_flags, describe_recipes, launch, recipe_file

    if list_recipes:
        recipes = describe_recipes()
        if as_json:
            print_json(recipes)
        else:
            width = max(map(len, recipes))
            for name, description in recipes.items():
                typer.echo(f"{name:{width}}  {description}")
        return
    words = list(context.args)
    if recipe is not None and recipe.startswith("-"):
        words, recipe = [recipe, *words], None
    check_flags(words)
    file = recipe_file(recipe)
    configuration = accelerate_file(accelerate)
    if not os.environ.get(DEBUG):
        os.environ.setdefault("PYTHONWARNINGS", _IGNORED)
    raise typer.Exit(launch(configuration, "lladamedv.trainers.sft", ["--config", str(file), *words]))


app.add_typer(eval_app, name="eval", rich_help_panel=MEASURE)
app.add_typer(analyze_app, name="analyze", rich_help_panel=MEASURE)


def _check_aspect_ratio(ratio: str) -> None:
    if not re.fullmatch(r"square|pad|anyres_max_0*[1-9]\d*", ratio):
        raise ValueError(f"{ratio!r}; allowed are square, pad and anyres_max_N with a whole number N of at least 1.")


# As `modeling_lladamedv.released_lladamedv` has them, which is slow to import.
PRESETS = ("llada-medv", "llada-medv-vqa", "llada-v", "llada")
_NAME = checked(check_name)
_Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.", callback=checked(check_new_folder))]
_Tokenizer = Annotated[
    str | None,
    typer.Option(help="Folder or Hub id of the tokenizer, if it does not lie beside the weights.", callback=_NAME),
]
_Dtype = Annotated[
    str | None,
    typer.Option(help=f"{', '.join(DTYPES[1:])}; by default the source's.", callback=checked(one_of(DTYPES[1:]))),
]
_ShardSize = Annotated[
    str, typer.Option(help="Largest shard; at most one is held in memory.", callback=checked(check_shard_size))
]


@app.command(rich_help_panel=PUBLISH)
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Folder or Hub id with LLaDA, LLaDA-V or LLaDA-MedV weights.", callback=_NAME
        ),
    ],
    out: _Out,
    tokenizer: _Tokenizer = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of the SigLIP, if it is not SigLIP2 so400m/14-384 or not in SOURCE.", callback=_NAME
        ),
    ] = None,
    dtype: _Dtype = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Prompt and generation options: llada-medv, llada-medv-vqa, llada-v or llada; by default known from "
            "the source's name, or else from its layout.",
            callback=checked(one_of(PRESETS)),
        ),
    ] = None,
    max_shard_size: _ShardSize = "2GB",
    revision: Annotated[str | None, typer.Option(help="Revision of SOURCE on the Hub.")] = None,
    push: Annotated[str | None, typer.Option(help="Hub id to upload OUT to.", callback=checked(check_repo))] = None,
    public: Annotated[bool, typer.Option("--public", help="Create that repository as a public one.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn released weights into a folder that loads with `from_pretrained`.

    \b
    Examples:
      lladamedv convert LLaDAMedV-2A4E converted
      lladamedv convert SLAKE_10E slake --preset llada-medv-vqa --push ME/llada-medv-slake
    """
    if public and push is None:
        raise typer.BadParameter("it goes with --push.", param_hint="--public")
    quiet()
    from lladamedv.conversion import convert_checkpoint

    report = convert_checkpoint(
        source, out, tokenizer, vision_tower, dtype, preset, max_shard_size, revision, push, public, progress(as_json)
    )
    if as_json:
        print_json(report)


@app.command(rich_help_panel=PUBLISH)
def init(
    out: _Out,
    language_model: Annotated[str, typer.Option(help="Folder or Hub id of LLaDA-8B-Instruct.", callback=_NAME)],
    vision_tower: Annotated[
        str, typer.Option(help="Folder or Hub id of SigLIP2, the tower or the whole model.", callback=_NAME)
    ],
    projector: Annotated[
        Path | None,
        typer.Option(
            help="Projector of stage 1: safetensors, or .bin, which is unpickled with torch.load(weights_only=True).",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    tokenizer: _Tokenizer = None,
    dtype: _Dtype = None,
    aspect_ratio: Annotated[
        str, typer.Option(help="square, pad or anyres_max_N.", callback=checked(_check_aspect_ratio))
    ] = "anyres_max_4",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the untrained weights.")] = 0,
    max_shard_size: _ShardSize = "2GB",
    as_json: AsJson = False,
) -> None:
    """Put a new model together from a LLaDA, a SigLIP and an untrained or stage-1 projector.

    \b
    Example:
      lladamedv init new --language-model LLaDA-8B-Instruct --vision-tower siglip2-so400m-patch14-384
    """
    quiet()
    from lladamedv.conversion import initialize_checkpoint

    report = initialize_checkpoint(
        language_model, vision_tower, out, projector, tokenizer, dtype, aspect_ratio, seed, max_shard_size,
        progress(as_json),
    )  # fmt: skip
    if as_json:
        print_json(report)


app.command(rich_help_panel=PUBLISH)(push)
app.command("push-dataset", rich_help_panel=PUBLISH)(push_dataset)
app.command(rich_help_panel=PUBLISH)(space)


if __name__ == "__main__":
    app()
