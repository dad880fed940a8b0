"""The command line: `lladamedv demo`, `ask`, `convert`, `init`, `train`, `eval`, `analyze`, `push`, `app`…"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli_app import app_command
from .cli_evaluation import analyze_app, eval_app, parse_options
from .cli_hub import push, push_dataset, space


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(eval_app, name="eval")
app.add_typer(analyze_app, name="analyze")
app.command()(push)
app.command("push-dataset")(push_dataset)
app.command()(space)
app.command("app")(app_command)


def fail(error: Exception) -> None:
    """Report an expected error in one line, without a traceback."""
    typer.echo(f"lladamedv: {error}", err=True)
    raise typer.Exit(1)


@app.callback()
def main() -> None:
    """LLaDA-MedV: a masked-diffusion vision-language model for biomedical images."""


def quiet() -> None:
    """Keep Transformers' progress bars and notes away from the answers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@app.command()
def demo(
    train: Annotated[
        bool, typer.Option("--train", help="Train the demo model anew (about 80 minutes of 2 cores).")
    ] = False,
    questions: Annotated[int, typer.Option(help="How many held-out questions to ask.")] = 300,
    output: Annotated[
        Path | None, typer.Option(help="The .png sheet to write, or with --train the folder of the new model.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of --train.")] = 0,
) -> None:
    """Measure the shipped tiny model on synthetic images, sighted and blind, and show how it denoises answers."""
    # Imported here, so that `lladamedv --help` does not wait for torch.
    from lladamedv.demo import run_demo
    from lladamedv.demo_training import train_demo

    quiet()
    try:
        if train:
            train_demo(output or Path("lladamedv_demo_model"), seed, report=typer.echo)
        else:
            run_demo(questions, output or Path("lladamedv_demo.png"), report=typer.echo)
    except ValueError as error:
        fail(error)


@app.command()
def ask(
    image: Annotated[str, typer.Argument(help="File (also DICOM, NIfTI and 16-bit pictures) or URL of an image.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a model; by default the tiny demo model.")
    ] = None,
    window: Annotated[
        str | None, typer.Option(help="Grey values to show: LEVEL/WIDTH, as 40/400, or lung, bone, brain, abdomen, …")
    ] = None,
    frame: Annotated[int | None, typer.Option(help="Frame of a DICOM file, from 0.")] = None,
    slice_index: Annotated[int | None, typer.Option("--slice", help="Slice of a NIfTI volume, from 0.")] = None,
    page: Annotated[int | None, typer.Option(help="Page of a TIFF file, from 0.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="An option of generate, as NAME=VALUE; several times.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="What to compute in: float32, bfloat16 or float16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Answer, confidence and what was done to the image.")] = False,
) -> None:
    """Answer one question about one image."""
    from lladamedv.demo import DEMO_MODEL, load_model
    from lladamedv.evaluation.answering import answer_batch, question_about
    from lladamedv.processing.medical_images import read_medical_image

    quiet()
    chosen = {"frame": frame, "slice_index": slice_index, "page": page, "window": _window(window)}
    steps: list[str] = []
    try:
        if not question.strip():
            raise ValueError(f"`question` is {question!r}; it must not be empty.")
        options = parse_options(option)
        if "://" in image:
            given = [name for name, value in chosen.items() if value is not None]
            if given:
                raise ValueError(f"`{given[0]}` is {chosen[given[0]]!r}; it is allowed for files only.")
        else:
            read = read_medical_image(image, **chosen)
            steps = read.steps
        loaded, processor = load_model(model or DEMO_MODEL, dtype)
        picture = processor.image_processor.fetch_images(image) if "://" in image else read.image
        given = answer_batch(loaded, processor, [question_about(picture, question)], **options)[0]
    except (ValueError, ImportError) as error:
        fail(error)
    if as_json:
        typer.echo(json.dumps({"answer": given.text, "confidence": given.confidence, "image": steps}))
    else:
        if steps:
            typer.echo(f"image: {'; '.join(steps)}", err=True)
        typer.echo(given.text)


def _window(text: str | None) -> str | tuple[float, float] | None:
    """Level and width, or the name of a preset as it is."""
    level, separator, width = (text or "").partition("/")
    try:
        return (float(level), float(width)) if separator else text
    except ValueError:
        return text


_Tokenizer = Annotated[
    str | None, typer.Option(help="Folder or Hub id of the tokenizer, if it does not lie beside the weights.")
]
_Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default the source's.")]
_ShardSize = Annotated[str, typer.Option(help="Largest shard; at most one is held in memory.")]


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id with LLaDA, LLaDA-V or LLaDA-MedV weights.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    tokenizer: _Tokenizer = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the SigLIP, if it is not SigLIP2 so400m/14-384 or not in SOURCE."),
    ] = None,
    dtype: _Dtype = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Prompt and generation options: llada-medv, llada-medv-vqa, llada-v or llada; by default known from "
            "the source's name, or else from its layout."
        ),
    ] = None,
    max_shard_size: _ShardSize = "2GB",
    revision: Annotated[str | None, typer.Option(help="Revision of SOURCE on the Hub.")] = None,
    push: Annotated[str | None, typer.Option(help="Hub id to upload OUT to.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Create that repository as a public one.")] = False,
) -> None:
    """Turn released weights into a folder that loads with `from_pretrained`."""
    from lladamedv.conversion import convert_checkpoint

    try:
        convert_checkpoint(
            source, out, tokenizer, vision_tower, dtype, preset, max_shard_size, revision, push, public, typer.echo
        )
    except ValueError as error:
        fail(error)


@app.command()
def init(
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    language_model: Annotated[str, typer.Option(help="Folder or Hub id of LLaDA-8B-Instruct.")],
    vision_tower: Annotated[str, typer.Option(help="Folder or Hub id of SigLIP2, the tower or the whole model.")],
    projector: Annotated[
        Path | None,
        typer.Option(
            help="Projector of stage 1: safetensors, or .bin, which is unpickled with torch.load(weights_only=True)."
        ),
    ] = None,
    tokenizer: _Tokenizer = None,
    dtype: _Dtype = None,
    aspect_ratio: Annotated[str, typer.Option(help="square, pad or anyres_max_N.")] = "anyres_max_4",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the untrained weights.")] = 0,
    max_shard_size: _ShardSize = "2GB",
) -> None:
    """Put a new model together from a LLaDA, a SigLIP and an untrained or stage-1 projector."""
    from lladamedv.conversion import initialize_checkpoint

    try:
        initialize_checkpoint(
            language_model, vision_tower, out, projector, tokenizer, dtype, aspect_ratio, seed, max_shard_size,
            typer.echo,
        )  # fmt: skip
    except ValueError as error:
        fail(error)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Argument(help="Name of a recipe, or a YAML file.")] = None,
    accelerate: Annotated[
        str | None,
        typer.Option(help="Where to run: a configuration of accelerate, by the name of a shipped one or as a file."),
    ] = None,
    list_recipes: Annotated[bool, typer.Option("--list", help="List the recipes.")] = False,
) -> None:
    """Fine-tune a model: `accelerate launch -m lladamedv.trainers.sft --config RECIPE`.

    All other options, to be given after RECIPE, are arguments of that script and override the recipe, as in
    `lladamedv train lora_one_gpu --model_name_or_path FOLDER --train_data DATA.json --output_dir OUT`.
    """
    from lladamedv.trainers.recipes import accelerate_file, describe_recipes, recipe_file

    if list_recipes:
        for line in describe_recipes():
            typer.echo(line)
        return
    try:
        file = recipe_file(recipe)
        configuration = accelerate_file(accelerate)
    except ValueError as error:
        fail(error)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    if configuration is not None:
        launch += ["--config_file", str(configuration)]
    command = [*launch, "-m", "lladamedv.trainers.sft", "--config", str(file), *context.args]
    raise typer.Exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    app()
