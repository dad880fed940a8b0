"""`lladamedv eval` and `lladamedv analyze`: what a model can do, measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import (
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
    quiet,
)
from .loading import find_folder, load_model


analyze_app = typer.Typer(
    cls=CommandLine,
    no_args_is_help=True,
    help=(
        "Look into how a model answers.\n\n\b\nExample:\n  lladamedv analyze decoding --model demo --output decoding"
    ),
)
eval_app = typer.Typer(
    cls=CommandLine,
    no_args_is_help=True,
    help=(
        "Measure a model on a benchmark or on data of your own.\n\n\b\nExamples:\n"
        "  lladamedv eval vqa --benchmark phantoms --model demo --output runs/phantoms\n"
        "  lladamedv eval vqa --data questions.csv --model demo --output runs/own"
    ),
)
INCOMPLETE = 3  # exit code: there is a report, but some questions have no answer
# As `processing.datasets` has them, which is slow to import.
BENCHMARKS, SPLITS = ("vqa-rad", "slake", "path-vqa", "phantoms"), ("train", "validation", "test")


def _check_exists(path: str | Path) -> None:
    if not os.path.exists(os.path.expanduser(path)):
        raise ValueError(f"{str(path)!r}; there is no such file or folder.")


_Output = Annotated[
    Path, typer.Option(file_okay=False, help="Folder of the run; called again, it goes on where it stopped.")
]
_BatchSize = Annotated[int, typer.Option(min=1, help="Questions at a time, in each process.")]
_Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many questions.")]
_Benchmark = Annotated[
    str | None,
    typer.Option(
        help="vqa-rad, slake, path-vqa, or phantoms, which come with this.", callback=checked(one_of(BENCHMARKS))
    ),
]
_Data = Annotated[
    str | None,
    typer.Option(
        help="Questions of your own instead of a benchmark: a .json, .jsonl, .csv, .tsv or .parquet file, or a folder.",
        callback=checked(_check_exists),
    ),
]
_Split = Annotated[str | None, typer.Option(help="train, validation or (by default) test; of --data any that it has.")]
_Source = Annotated[str | None, typer.Option(help="Which publication of the benchmark, by its Hub id.")]
_Path = Annotated[
    str | None, typer.Option(help="The benchmark's files instead of the Hub's; for phantoms SEED:COUNT[:KINDS].")
]
_DataRevision = Annotated[str | None, typer.Option(help="Revision of the benchmark on the Hub.")]
_ImageFolder = Annotated[
    Path | None,
    typer.Option(
        help="Where the image files are that the questions name: a folder or .zip.", callback=checked(_check_exists)
    ),
]
_InvalidRecords = Annotated[
    str,
    typer.Option(
        help="error, or skip: leave malformed records out, and say so.", callback=checked(one_of(("error", "skip")))
    ),
]
_Length = Annotated[int, typer.Option(min=1, help="Length L of the canvas.")]
_Block = Annotated[int, typer.Option(min=1, help="Length B of a block.")]
_Steps = Annotated[int, typer.Option(min=1, help="Number Z of denoising steps.")]
_Bootstrap = Annotated[int, typer.Option(min=0, help="Of the 95 % intervals; 0 for none.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON instead of Markdown.")]


def _check_data(benchmark: str | None, data: str | None, split: str | None, **for_benchmarks) -> None:
    """Refuse options that do not go together, before anything is imported."""
    if (benchmark is None) == (data is None):
        raise typer.BadParameter(
            f"{'none' if data is None else 'both'} given; exactly one is needed.", param_hint="--benchmark, --data"
        )
    if data is not None:
        for name, value in for_benchmarks.items():
            if value is not None:
                raise typer.BadParameter(f"{value!r}; it goes with --benchmark.", param_hint=f"--{name}")
    elif split is not None and split not in SPLITS:
        raise typer.BadParameter(f"{split!r}; allowed are {', '.join(SPLITS)}.", param_hint="--split")
    elif for_benchmarks["path"] is not None and benchmark != "phantoms":
        try:
            _check_exists(for_benchmarks["path"])
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--path") from None


def _load_questions(benchmark, data, split, invalid_records, limit, image_folder, **for_benchmarks):
    """The questions that are asked, and the report about what was loaded."""
    from lladamedv.processing.datasets import load_own_vqa, load_vqa

    options = {"image_folder": image_folder, "invalid_records": invalid_records}
    if data is not None:
        dataset, report = load_own_vqa(data, split, **options)
    else:
        dataset, report = load_vqa(benchmark, split or "test", **options, **for_benchmarks)
    if not len(dataset):
        raise ValueError(
            f"No question is left. {'; '.join(report.summary().splitlines())}. --image-folder says where images are."
        )
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset)))), report


def _load(model: str, revision: str | None, dtype: str, device: str):
    """Model and processor, by default on this process's device."""
    from lladamedv.evaluation.runs import process_state

    return load_model(model, dtype, process_state().device if device == "auto" else device, revision)


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
    model: Model,
    output: _Output,
    benchmark: _Benchmark = None,
    data: _Data = None,
    split: _Split = None,
    source: _Source = None,
    path: _Path = None,
    image_folder: _ImageFolder = None,
    revision: _DataRevision = None,
    invalid_records: _InvalidRecords = "error",
    limit: _Limit = None,
    max_new_tokens: _Length = 64,
    block_length: _Block = 64,
    steps: _Steps = 64,
    option: Options = None,
    scoring: Annotated[
        str,
        typer.Option(
            help="generate, or likelihood: yes or no, whichever is the likelier answer.",
            callback=checked(one_of(("generate", "likelihood"))),
        ),
    ] = "generate",
    train_candidates: Annotated[
        bool,
        typer.Option("--train-candidates", help="Also LLaVA-Med's choice among the open answers of the train split."),
    ] = False,
    batch_size: _BatchSize = 8,
    model_revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    bootstrap_samples: _Bootstrap = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap, and of sampling.")] = 0,
    as_json: _Json = False,
) -> None:
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
          --block-length 8 --steps 24
    """
    of_benchmark = {"source": source, "path": path, "revision": revision}
    _check_data(benchmark, data, split, **of_benchmark)
    options = parse_options(option, max_new_tokens=max_new_tokens, block_length=block_length, steps=steps)
    check_generation(model, options)
    quiet()
    from lladamedv.evaluation.vqa import evaluate_vqa, render_summary
    from lladamedv.processing.datasets import training_open_answers

    given = {"image_folder": image_folder, "invalid_records": invalid_records, **of_benchmark}
    dataset, report = _load_questions(benchmark, data, split, limit=limit, **given)
    candidates = None
    if train_candidates:
        candidates = training_open_answers(_load_questions(benchmark, data, "train", limit=None, **given)[0])
    loaded, processor = _load(model, model_revision, dtype, device)
    summary = evaluate_vqa(
        loaded, processor, dataset, report, output, model_name=model, options=options, scoring=scoring,
        batch_size=batch_size, candidates=candidates, bootstrap_samples=bootstrap_samples, seed=seed,
    )  # fmt: skip
    _finish(summary, render_summary(summary), as_json, output)


@eval_app.command()
def chat(
    questions: Annotated[
        Path,
        typer.Option(help="The benchmark's file, llava_med_eval_qa50_qa.jsonl.", callback=checked(_check_exists)),
    ],
    output: _Output,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a model to answer, or `demo`.", callback=checked(find_folder)),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --model: a file of answers, ours or in a published form.", callback=checked(_check_exists)
        ),
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(help="Where the images are; needed with --model.", callback=checked(_check_exists)),
    ] = None,
    limit: _Limit = None,
    max_new_tokens: _Length = 256,
    block_length: _Block = 64,
    steps: _Steps = 256,
    option: Options = None,
    batch_size: _BatchSize = 1,
    model_revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
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
    if (model is None) == (answers is None):
        given = "none" if model is None else "both"
        raise typer.BadParameter(f"{given} given; exactly one is needed.", param_hint="--model, --answers")
    if model is not None and image_folder is None:
        raise typer.BadParameter("missing; a model needs the images.", param_hint="--image-folder")
    key = None if judge_key_env is None else os.environ.get(judge_key_env)
    if judge_key_env is not None and not key:
        raise typer.BadParameter(
            f"{judge_key_env!r}, but there is no such environment variable.", param_hint="--judge-key-env"
        )
    if judge_model is not None and judge_url is None and key is None:
        raise typer.BadParameter(
            "needs --judge-url or --judge-key-env: nothing is sent anywhere without one.", param_hint="--judge-model"
        )
    options = parse_options(option, max_new_tokens=max_new_tokens, block_length=block_length, steps=steps)
    if model is not None:
        check_generation(model, options)
    quiet()
    from lladamedv.evaluation.chat import (
        answer_chat_benchmark,
        judge_answers,
        read_answers,
        summarize,
        to_markdown,
        write_summary,
    )
    from lladamedv.evaluation.judge import OpenAIJudge
    from lladamedv.evaluation.runs import process_state
    from lladamedv.processing.datasets import load_chat_benchmark

    judge = None
    if judge_model is not None:
        judge = OpenAIJudge(judge_model, judge_url, key, reasoning_model=reasoning_judge)
    asked, _ = load_chat_benchmark(questions)
    asked = asked[:limit]
    if model is not None:
        records, report = load_chat_benchmark(questions, image_folder)
        known = {record["id"] for record in asked}
        records = [record for record in records if record["id"] in known]
        if not records:
            raise ValueError(f"`--image-folder` is {str(image_folder)!r}, which has none of the images.")
        if report.missing_images:
            typer.echo(report.summary(), err=True)
            allow_partial = True  # the summary says how many are missing
        loaded, processor = _load(model, model_revision, dtype, device)
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
    benchmark: _Benchmark = None,
    data: _Data = None,
    split: _Split = None,
    source: _Source = None,
    path: _Path = None,
    image_folder: _ImageFolder = None,
    revision: _DataRevision = None,
    invalid_records: _InvalidRecords = "error",
    limit: _Limit = None,
    steps: Annotated[list[int], typer.Option(min=1, help="Z; several times.")] = [256, 128, 64, 32, 16],  # noqa: B006
    max_new_tokens: Annotated[list[int], typer.Option(min=1, help="L; several times.")] = [256],  # noqa: B006
    block_length: Annotated[list[int], typer.Option(min=1, help="B; several times.")] = [64],  # noqa: B006
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
    device: Device = "auto",
    bootstrap_samples: _Bootstrap = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap, and of sampling.")] = 0,
    as_json: _Json = False,
) -> None:
    """Sweep steps, canvas and block: words, seconds, repetition and accuracy (LLaDA-MedV's table 3 and figure 5).

    The questions are those of the phantoms, of another --benchmark, or of --data.

    \b
    Example:
      lladamedv analyze decoding --model demo --output runs/decoding --path 9000:60:description \\
          --max-new-tokens 24 --block-length 24 --steps 24 --steps 6 --steps 1
    """
    benchmark = "phantoms" if benchmark is None and data is None else benchmark
    of_benchmark = {"source": source, "path": path, "revision": revision}
    _check_data(benchmark, data, split, **of_benchmark)
    extra = parse_options(option)
    check_generation(None, extra)
    quiet()
    from lladamedv.evaluation.decoding_analysis import analyze_decoding, noise_pictures, to_markdown

    given = {"image_folder": image_folder, "invalid_records": invalid_records, **of_benchmark}
    dataset, report = _load_questions(benchmark, data, split, limit=limit, **given)
    if report.missing_images or report.invalid:
        typer.echo(report.summary(), err=True)
    records = noise_pictures(dataset, seed) if noise else dataset
    loaded, processor = _load(model, model_revision, dtype, device)
    summary = analyze_decoding(
        loaded, processor, records, output, steps=steps, max_new_tokens=max_new_tokens, block_length=block_length,
        batch_size=batch_size, full_canvas=full_canvas, extra_options=extra, name=model, example_id=example_id,
        bootstrap_samples=bootstrap_samples, seed=seed, report=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
    _finish(summary | {"complete": True}, to_markdown(summary), as_json, output)
