"""`lladamedv eval` and `lladamedv analyze`: what a model can do, measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import CommandLine, Dtype, Model, Options, Revision, parse_options, quiet
from .loading import load_model


analyze_app = typer.Typer(cls=CommandLine, no_args_is_help=True, help=(
    "Look into how a model answers.\n\n\b\nExample:\n  lladamedv analyze decoding --model demo --output decoding"
))
eval_app = typer.Typer(cls=CommandLine, no_args_is_help=True, help=(
    "Measure a model on a benchmark.\n\n\b\nExample:\n"
    "  lladamedv eval vqa --benchmark phantoms --model demo --output runs/phantoms"
))
INCOMPLETE = 3  # exit code: there is a report, but some questions have no answer

_Output = Annotated[Path, typer.Option(help="Folder of the run; called again, it goes on where it stopped.")]
_BatchSize = Annotated[int, typer.Option(help="Questions at a time, in each process.")]
_Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many questions.")]
_Split = Annotated[str, typer.Option(help="train, validation or test.")]
_Source = Annotated[str | None, typer.Option(help="Which publication of the benchmark, by its Hub id.")]
_Path = Annotated[
    str | None, typer.Option(help="Local data instead of the Hub's; for phantoms SEED:COUNT[:KINDS].")
]
_ImageFolder = Annotated[Path | None, typer.Option(help="Where image files named in --path are.")]
_Bootstrap = Annotated[int, typer.Option(min=0, help="Of the 95 % intervals; 0 for none.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON instead of Markdown.")]


def _load(model: str, revision: str | None, dtype: str):
    """Model and processor on this process's device; the model's name in reports."""
    from lladamedv.evaluation.runs import process_state

    return load_model(model, dtype, process_state().device, revision)


def _finish(summary: dict, text: str, as_json: bool, output: Path) -> None:

    from lladamedv.evaluation.runs import process_state

    if process_state().is_main_process:
        typer.echo(json.dumps(summary) if as_json else text)
        typer.echo(f"wrote {output}", err=True)
    process_state().destroy_process_group()
    if not summary["complete"]:
        raise typer.Exit(INCOMPLETE)


@eval_app.command()
def vqa(
    benchmark: Annotated[str, typer.Option(help="vqa-rad, slake, path-vqa, or phantoms, which come with this.")],
    model: Model,
    output: _Output,
    split: _Split = "test",
    source: _Source = None,
    path: _Path = None,
    image_folder: _ImageFolder = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the data on the Hub.")] = None,
    limit: _Limit = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length L of the canvas.")] = 64,
    block_length: Annotated[int, typer.Option(help="Length B of a block.")] = 64,
    steps: Annotated[int, typer.Option(help="Number Z of denoising steps.")] = 64,
    option: Options = None,
    scoring: Annotated[
        str, typer.Option(help="generate, or likelihood: yes or no, whichever is the likelier answer.")
    ] = "generate",
    train_candidates: Annotated[
        bool,
        typer.Option("--train-candidates", help="Also LLaVA-Med's choice among the open answers of the train split."),
    ] = False,
    batch_size: _BatchSize = 8,
    model_revision: Revision = None,
    dtype: Dtype = "auto",
    bootstrap_samples: _Bootstrap = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap, and of sampling.")] = 0,
    as_json: _Json = False,
) -> None:
    """Answer and score a VQA benchmark; with several GPUs, `accelerate launch -m lladamedv.cli eval vqa …`.

    Exit code 3: the report is written, but questions are missing from it.

    \b
    Examples:
      lladamedv eval vqa --benchmark slake --model path/or/hub-id --output runs/slake --dtype bfloat16
      lladamedv eval vqa --benchmark phantoms --model demo --output runs/phantoms --max-new-tokens 24 \\
          --block-length 8 --steps 24
    """
    quiet()
    from lladamedv.evaluation.vqa import evaluate_vqa, render_summary
    from lladamedv.processing.datasets import load_vqa, training_open_answers

    options = parse_options(option, max_new_tokens=max_new_tokens, block_length=block_length, steps=steps)
    data = {"source": source, "path": path, "image_folder": image_folder, "revision": revision}
    dataset, report = load_vqa(benchmark, split, **data)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    candidates = training_open_answers(load_vqa(benchmark, "train", **data)[0]) if train_candidates else None
    loaded, processor = _load(model, model_revision, dtype)
    summary = evaluate_vqa(
        loaded, processor, dataset, report, output, model_name=model, options=options, scoring=scoring,
        batch_size=batch_size, candidates=candidates, bootstrap_samples=bootstrap_samples, seed=seed,
    )  # fmt: skip
    _finish(summary, render_summary(summary), as_json, output)


@eval_app.command()
def chat(
    questions: Annotated[Path, typer.Option(help="The benchmark's file, llava_med_eval_qa50_qa.jsonl.")],
    output: _Output,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of a model to answer, or `demo`.")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Instead of --model: a file of answers, ours or in a published form.")
    ] = None,
    image_folder: Annotated[Path | None, typer.Option(help="Where the images are; needed with --model.")] = None,
    limit: _Limit = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length L of the canvas.")] = 256,
    block_length: Annotated[int, typer.Option(help="Length B of a block.")] = 64,
    steps: Annotated[int, typer.Option(help="Number Z of denoising steps.")] = 256,
    option: Options = None,
    batch_size: _BatchSize = 1,
    model_revision: Revision = None,
    dtype: Dtype = "auto",
    judge_model: Annotated[
        str | None, typer.Option(help="What the server calls the judge; without it, no one judges.")
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="Address of an OpenAI-compatible server, as http://localhost:8000/v1.")
    ] = None,
    judge_key_env: Annotated[
        str | None, typer.Option(help="Name of the environment variable that holds the server's key.")
    ] = None,
    reasoning_judge: Annotated[
        bool, typer.Option("--reasoning-judge", help="The judge takes max_completion_tokens and no temperature.")
    ] = False,
    swap_positions: Annotated[
        bool, typer.Option("--swap-positions", help="Judge twice, with the answers in both orders.")
    ] = False,
    max_concurrent: Annotated[int, typer.Option(min=1, help="Requests to the judge at a time.")] = 4,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Judge even if some questions have no answer.")
    ] = False,
    bootstrap_samples: _Bootstrap = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    as_json: _Json = False,
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
    quiet()
    from lladamedv.evaluation.chat_answers import answer_chat_benchmark
    from lladamedv.evaluation.chat_benchmark import read_answers, summarize, to_markdown, write_summary
    from lladamedv.evaluation.judge import OpenAIJudge
    from lladamedv.evaluation.judging import judge_answers
    from lladamedv.evaluation.runs import process_state
    from lladamedv.processing.datasets import load_chat_benchmark

    if (model is None) == (answers is None):
        raise ValueError(f"`--model` is {model!r} and `--answers` {answers!r}; exactly one of the two is needed.")
    if model is not None and image_folder is None:
        raise ValueError("`--image-folder` is missing; a model needs the images.")
    judge = None
    if judge_model is not None:
        key = None if judge_key_env is None else os.environ.get(judge_key_env)
        if judge_key_env is not None and not key:
            raise ValueError(f"`--judge-key-env` is {judge_key_env!r}, but there is no such environment variable.")
        judge = OpenAIJudge(judge_model, judge_url, key, reasoning_model=reasoning_judge)
    asked, _ = load_chat_benchmark(questions)
    asked = asked[:limit]
    if model is not None:
        options = parse_options(option, max_new_tokens=max_new_tokens, block_length=block_length, steps=steps)
        records, report = load_chat_benchmark(questions, image_folder)
        known = {record["id"] for record in asked}
        records = [record for record in records if record["id"] in known]
        if not records:
            raise ValueError(f"`--image-folder` is {str(image_folder)!r}, which has none of the images.")
        if report.missing_images:
            typer.echo(report.summary(), err=True)
            allow_partial = True  # the summary says how many are missing
        loaded, processor = _load(model, model_revision, dtype)
        answers = answer_chat_benchmark(
            loaded, processor, records, output, model_name=model, options=options, batch_size=batch_size
        )
    if judge is None:
        typer.echo(f"answers: {answers}; give --judge-model to have them judged")
        return
    if process_state().is_main_process:
        given = read_answers(answers)
        judged = judge_answers(
            asked, given, judge, output, swap_positions=swap_positions, allow_partial=allow_partial,
            max_concurrent=max_concurrent, report=lambda line: typer.echo(line, err=True),
        )  # fmt: skip
        summary = summarize(
            asked, given, judged, name=model or answers.name, bootstrap_samples=bootstrap_samples, seed=seed
        )
        write_summary(output, summary)
        _finish(summary, to_markdown(summary), as_json, output)


@analyze_app.command()
def decoding(
    model: Model,
    output: _Output,
    benchmark: Annotated[str, typer.Option(help="Whose questions: vqa-rad, slake, path-vqa or phantoms.")] = "phantoms",
    split: _Split = "test",
    source: _Source = None,
    path: _Path = None,
    image_folder: _ImageFolder = None,
    limit: _Limit = None,
    steps: Annotated[list[int], typer.Option(help="Z; may be given several times.")] = [256, 128, 64, 32, 16],  # noqa: B006
    max_new_tokens: Annotated[list[int], typer.Option(help="L; may be given several times.")] = [256],  # noqa: B006
    block_length: Annotated[list[int], typer.Option(help="B; may be given several times.")] = [64],  # noqa: B006
    full_canvas: Annotated[
        bool, typer.Option("--full-canvas", help="Let nothing end an answer, which shows what ends hide: repetition.")
    ] = False,
    noise: Annotated[
        bool, typer.Option("--noise-pictures", help="Ask about pictures of noise: what it says where it sees nothing.")
    ] = False,
    option: Options = None,
    batch_size: _BatchSize = 1,
    example_id: Annotated[str | None, typer.Option(help="Question whose answers are shown.")] = None,
    model_revision: Revision = None,
    dtype: Dtype = "auto",
    bootstrap_samples: _Bootstrap = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap, and of sampling.")] = 0,
    as_json: _Json = False,
) -> None:
    """Sweep steps, canvas and block: words, seconds, repetition and accuracy (LLaDA-MedV's table 3 and figure 5).

    \b
    Example:
      lladamedv analyze decoding --model demo --output runs/decoding --path 9000:60:description \\
          --max-new-tokens 24 --block-length 24 --steps 24 --steps 6 --steps 1
    """
    quiet()
    from lladamedv.evaluation.decoding_analysis import analyze_decoding, noise_pictures, to_markdown
    from lladamedv.processing.datasets import load_vqa

    data = {"source": source, "path": path, "image_folder": image_folder}
    dataset, _ = load_vqa(benchmark, split, **data)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    records = noise_pictures(dataset, seed) if noise else dataset
    extra = parse_options(option)
    loaded, processor = _load(model, model_revision, dtype)
    summary = analyze_decoding(
        loaded, processor, records, output, steps=steps, max_new_tokens=max_new_tokens, block_length=block_length,
        batch_size=batch_size, full_canvas=full_canvas, extra_options=extra, name=model, example_id=example_id,
        bootstrap_samples=bootstrap_samples, seed=seed, report=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
    _finish(summary | {"complete": True}, to_markdown(summary), as_json, output)
