"""`lladamedv push`, `push-dataset` and `space`: models, data sets and demos for the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import AsJson, Revision, checked, one_of, print_json, progress, quiet
from .cli_evaluation import BENCHMARKS, SPLITS
from .loading import DEMO
from .paths import check_new_folder


def _check_folder(folder: Path) -> None:
    if not folder.expanduser().is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}.")


def check_repo(repo: str) -> None:
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", repo) or "--" in repo or ".." in repo:
        raise ValueError(f"{repo!r} is no Hub id, OWNER/NAME.")


def _check_space_model(model: str) -> None:
    if model != DEMO and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        raise ValueError(f"{model!r}; allowed are a Hub id, OWNER/NAME, and {DEMO}.")


def _check_splits(splits: list[str]) -> None:
    for split in splits:
        one_of(SPLITS)(split)


_Repo = Annotated[
    str,
    typer.Argument(
        metavar="REPO",
        help="Hub id, OWNER/NAME; created as a private one if there is none.",
        callback=checked(check_repo),
    ),
]
_Public = Annotated[bool, typer.Option("--public", help="Create a public repository, or push to one.")]
_Replace = Annotated[
    bool, typer.Option("--replace", help="Push over a repository of another kind, and delete what it holds.")
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and list only; nothing is sent.")]
_Branch = Annotated[str | None, typer.Option("--branch", help="Branch to push to, created if there is none.")]


def push(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Folder of a model, or of LoRA adapters.", callback=checked(_check_folder)
        ),
    ],
    repo: _Repo,
    adapter_merge: Annotated[
        bool, typer.Option("--merge", help="Merge adapters into their model and push that.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the adapters' model; to merge, also a folder.")
    ] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option(help="Pattern of files not to push, as 'checkpoint-*'; several times.")
    ] = None,
    public: _Public = False,
    replace: _Replace = False,
    revision: _Branch = None,
    dry_run: _DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Push a model's folder to the Hub, checked, and as one commit.

    \b
    Examples:
      lladamedv push converted ME/llada-medv --dry-run
      lladamedv push converted ME/llada-medv
      lladamedv push adapters ME/llada-medv-lora --base-model ME/llada-medv
    """
    quiet()
    from lladamedv.hub_cards.push import push_folder

    plan = push_folder(
        folder, repo, private=not public, adapter_merge=adapter_merge, base_model=base_model, leave_out=leave_out or (),
        replace=replace, dry_run=dry_run, revision=revision, report=progress(as_json),
    )  # fmt: skip
    if as_json:
        print_json(plan)


def push_dataset(
    benchmark: Annotated[
        str,
        typer.Argument(
            metavar="BENCHMARK",
            help="vqa-rad, slake, path-vqa or phantoms.",
            callback=checked(one_of(BENCHMARKS)),
        ),
    ],
    repo: _Repo,
    splits: Annotated[
        list[str] | None,
        typer.Option("--split", help="train, validation or test; by default all.", callback=checked(_check_splits)),
    ] = None,
    source: Annotated[str | None, typer.Option(help="Which publication of the benchmark, by its Hub id.")] = None,
    path: Annotated[str | None, typer.Option(help="Local data instead of the Hub's; for phantoms SEED:COUNT.")] = None,
    image_folder: Annotated[Path | None, typer.Option(help="Where image files named in --path are.")] = None,
    data_revision: Annotated[str | None, typer.Option("--revision", help="Revision of the source on the Hub.")] = None,
    recipe_only: Annotated[
        bool, typer.Option("--recipe-only", help="Push no records, but a program that builds them.")
    ] = False,
    public: _Public = False,
    replace: _Replace = False,
    revision: _Branch = None,
    dry_run: _DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Push a VQA benchmark in one form to the Hub, or how to build it where its licence forbids more.

    \b
    Examples:
      lladamedv push-dataset phantoms ME/phantoms --path 1:500 --dry-run
      lladamedv push-dataset slake ME/slake --recipe-only
    """
    quiet()
    from lladamedv.hub_cards import push as hub

    plan = hub.push_dataset(
        benchmark, repo, splits=splits, source=source, path=path, image_folder=image_folder,
        data_revision=data_revision, private=not public, recipe_only=recipe_only, replace=replace,
        dry_run=dry_run, revision=revision, report=progress(as_json),
    )  # fmt: skip
    if as_json:
        print_json(plan)


def space(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The Space's title.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.", callback=checked(check_new_folder))],
    model: Annotated[
        str,
        typer.Option(
            help="Hub id of a model, or `demo` for the one that comes with this.", callback=checked(_check_space_model)
        ),
    ] = DEMO,
    revision: Revision = None,
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
