"""Pushing to the Hub: what leaves this machine is checked and listed first, and arrives as one commit or not at all.

Models, adapters and data sets go the same way: all checks of files, then all questions to the Hub that may refuse, then
the upload by `huggingface_hub`, which repeats requests and sends no large file twice. The folder that is pushed is
never changed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files as package_files
from pathlib import Path
from tempfile import TemporaryDirectory

import jinja2
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, SpaceCardData, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from lladamedv.processing.datasets import SOURCES, load_vqa

from . import build_dataset_card, is_hub_id, may_redistribute, scrub
from .cards import state_in_card
from .checks import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter_files, check_model_files, checked_files
from .licences import CARD
from .privacy import SECRET


MAIN = "main"
# What a push of ours writes; such files are deleted in the same commit if they are no longer among those pushed. A
# model.safetensors left beside new shards, for one, would be loaded instead of them.
_OURS = (
    "*.safetensors", "*.safetensors.index.json", "*.py", "additional_chat_templates/*", "data/*.parquet",
    "calibration.json",
)  # fmt: skip
_SHARD_BYTES = 500_000_000
_SPACE_TEMPLATE = package_files(__package__) / "space_template"
_SPACE_PACKAGES = ("lladamedv", "gradio", "torch", "transformers", "huggingface_hub", "safetensors", "pillow", "numpy")
_HINTS = {
    401: "the token is missing or not valid; `hf auth login` or HF_TOKEN gives one",
    403: "the token may not write there",
    404: "there is no such repository, or the token may not see it",
    412: "the repository has changed meanwhile",
    429: "too many requests",
}


@dataclass(frozen=True)
class PushPlan:
    """What is pushed, or with `dry_run` would be.

    Attributes:
        repo, repo_type: where to.
        kind: "model", "adapter", "dataset" or "recipe".
        private: whether the repository is to be a private one.
        files: sizes in bytes by the names in the repository.
        left_out: files of the folder that are not pushed: what a training leaves for itself, and what `leave_out` says.
        url: of the commit; `None` for a dry run.
    """

    repo: str
    repo_type: str
    kind: str
    private: bool
    files: dict[str, int]
    left_out: tuple[str, ...] = ()
    url: str | None = None

    def summary(self) -> str:
        size, visibility = sum(self.files.values()), "private" if self.private else "public"
        return f"{self.kind} {self.repo}: {len(self.files)} files, {size / 1e6:.1f} MB, {visibility}"


def push_folder(
    folder: str | Path,
    repo: str,
    *,
    private: bool = True,
    adapter_merge: bool = False,
    base_model: str | None = None,
    leave_out: Sequence[str] = (),
    replace: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    report: Callable[[str], object] = print,
) -> PushPlan:
    """Push a model's folder, or one of LoRA adapters, as one commit.

    Args:
        folder: with weights as safetensors, configuration, processor, remote code and card; of adapters with
            `adapter_config.json` and their weights.
        repo: Hub id, created if there is none.
        private: whether the repository is private; a public one is never pushed to unless this is `False`.
        adapter_merge: merge the adapters into their model and push that.
        base_model: Hub id of the model that adapters belong to, if their configuration names a local folder; to merge,
            also a folder.
        leave_out: patterns such as "*.png" of files and folders that are not pushed, besides what a training leaves for
            itself (checkpoints, `training_args.bin`, reports, …). Whatever else does not belong to a model is an error.
        replace: whether to push over a repository of another kind; what was there is deleted in the same commit.
        dry_run: only check and list; no request is made.
        revision: branch to push to, created from main if there is none.
        commit_message: by default what is pushed.
        token: of the Hub; by default the one of `hf auth login` or HF_TOKEN.
        report: called with each line of text.

    Returns:
        What was pushed, and where it is.

    Raises:
        ValueError: in one line; before anything is uploaded if an argument, the folder or the repository is not what it
            should be.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"`folder` is {str(folder)!r}; no such folder.")
    is_adapter, check, changes = (folder / ADAPTER_CONFIG).is_file(), check_model_files, None
    if (adapter_merge or base_model is not None) and not is_adapter:
        name, value = ("adapter_merge", True) if adapter_merge else ("base_model", base_model)
        raise ValueError(f"`{name}` is {value!r}, but {str(folder)!r} holds no adapters ({ADAPTER_CONFIG}).")
    kind = "adapter" if is_adapter and not adapter_merge else "model"
    target = _Target(repo, kind, private, replace, revision, token, commit_message)
    with TemporaryDirectory() as merged:
        if adapter_merge:
            _merge(folder, base_model, Path(merged), offline=dry_run)
            folder, leave_out = Path(merged), ()
        elif is_adapter:
            check, changes = check_adapter_files, _with_base_model(folder, base_model)
        files, left_out = checked_files(folder, leave_out, check, target.secret, changes)
        return target.push(files, left_out, dry_run, report)


def push_dataset(
    benchmark: str,
    repo: str,
    *,
    splits: Sequence[str] | None = None,
    source: str | None = None,
    path: str | Path | None = None,
    image_folder: str | Path | None = None,
    data_revision: str | None = None,
    private: bool = True,
    recipe_only: bool = False,
    replace: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    token: str | None = None,
    report: Callable[[str], object] = print,
) -> PushPlan:
    """Push a VQA benchmark in the form of [`load_vqa`], or how to build it, as one commit.

    Args:
        benchmark, source, path, image_folder, data_revision: what to load; see [`load_vqa`].
        repo: Hub id of a data set, created if there is none.
        splits: by default all that the source has.
        recipe_only: push no records, but a card with the program that loads them and what was counted.
        dry_run: load and list only; nothing is sent to the Hub.
        private, replace, revision, token, report: as for [`push_folder`].

    Raises:
        ValueError: as [`push_folder`], and for data that must not be passed on, unless `recipe_only`.
    """
    if benchmark not in SOURCES or (source is not None and source not in SOURCES[benchmark]):
        load_vqa(benchmark, source=source)  # says what is allowed
    allowed, reason = may_redistribute(benchmark)
    if not (allowed or recipe_only):
        raise ValueError(
            f"`benchmark` is {benchmark!r}, which must not be passed on: {reason}. `recipe_only` publishes how to "
            "build it instead."
        )
    target = _Target(repo, "recipe" if recipe_only else "dataset", private, replace, revision, token)
    options = {"source": source, "path": path, "image_folder": image_folder, "revision": data_revision}
    splits = splits or SOURCES[benchmark][source or next(iter(SOURCES[benchmark]))].splits
    loaded = {split: load_vqa(benchmark, split, **options) for split in splits}
    for _, each in loaded.values():
        report(each.summary())
    facts = _combined(loaded)
    recipe = {name: facts[name] for name in ("benchmark", "reference", "revision")}
    recipe |= {"lladamedv": version("lladamedv"), "rows": {split: len(rows) for split, (rows, _) in loaded.items()}}
    name = target.repo.rpartition("/")[2]
    card = build_dataset_card(facts, name, version("lladamedv"), has_images=not recipe_only)
    with TemporaryDirectory() as staged:
        files: dict[str, Path | bytes] = {} if recipe_only else _write_parquet(loaded, Path(staged))
        files |= {"recipe.json": (json.dumps(recipe, indent=2) + "\n").encode(), CARD: str(card).encode()}
        return target.push(files, (), dry_run, report)


def check_target(repo: str, private: bool = True, argument: str = "repo", token: str | None = None) -> None:
    """Ask whether a model could be pushed, which hours of other work may depend on.

    Raises:
        ValueError: that names `argument`, if it could not.
    """
    _Target(repo, "model", private, token=token, argument=argument).look()


# Adapters


def _with_base_model(folder: Path, base_model: str | None) -> dict[str, bytes]:
    """The files that change so that adapters name their model by its Hub id, in configuration and card."""
    config = _adapter_config(folder)
    stated = str(config.get("base_model_name_or_path") or "")
    if base_model is None and not is_hub_id(stated):
        raise ValueError(
            f"`base_model_name_or_path` in {ADAPTER_CONFIG} is {stated!r}, which is no Hub id; `base_model` "
            "gives its Hub id, or `adapter_merge` pushes the whole model."
        )
    if base_model is not None and not is_hub_id(base_model):
        raise ValueError(f"`base_model` is {base_model!r}; allowed is a Hub id, OWNER/NAME.")
    changes, wanted, card = {}, base_model or stated, folder / CARD
    if stated != wanted:
        config["base_model_name_or_path"] = wanted
        changes[ADAPTER_CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        # PEFT writes where the model was loaded from into front matter and tags of its cards.
        named = _read_card(card).data.get("base_model")
        for name in {stated, named} - {wanted, None, ""} if isinstance(named, str) else ():
            text = text.replace(name, wanted)
        changes[CARD] = text.encode()
    return changes


def _read_card(file: Path) -> ModelCard:
    try:
        return ModelCard.load(file, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"`folder` is {str(file.parent)!r}, whose {CARD} is no card: {' '.join(str(error).split())}."
        ) from error


def _adapter_config(folder: Path) -> dict:
    try:
        return dict(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`folder` is {str(folder)!r}, whose {ADAPTER_CONFIG} cannot be read: {error}") from error


def _merge(folder: Path, base_model: str | None, out: Path, offline: bool) -> None:
    """Write the whole model that adapters and theirs make into `out`."""
    for name in (CARD, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"`folder` is {str(folder)!r}, which is not pushed: {name} is missing.")
    from peft import PeftModel

    from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
    from lladamedv.processing import LLaDAMedVProcessor

    base = base_model or _adapter_config(folder).get("base_model_name_or_path") or ""
    try:
        model = LLaDAMedVForConditionalGeneration.from_pretrained(base, dtype="auto", local_files_only=offline)
        # Without memory for what the adapters' configuration says before their weights are seen.
        model = PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True).merge_and_unload()
        processor = folder if (folder / "processor_config.json").is_file() else base
        loaded = LLaDAMedVProcessor.from_pretrained(processor, local_files_only=offline)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"`adapter_merge` is True, but these adapters and their model {base!r} cannot be loaded: "
            f"{' '.join(str(error).split())} `base_model` names another place."
        ) from error
    model.save_pretrained(out)
    loaded.save_pretrained(out)
    card = _read_card(folder / CARD)
    card.data.library_name = "transformers"
    card.data.base_model, card.data.base_model_relation = (base, "finetune") if is_hub_id(base) else (None, None)
    tags = card.data.tags or []
    card.data.tags = [tag for tag in tags if tag not in ("lora", "peft") and not tag.startswith("base_model:")]
    note = "> The adapters that this card describes are merged into these weights: load them as a model, without PEFT."
    # A calibration of the adapters is none of the merged weights, which are rounded anew.
    card.text = scrub(f"\n{note}\n\n{state_in_card(card.text.lstrip(), 'Answer sets', '')}")
    card.save(out / CARD)


# Data sets


def _write_parquet(loaded: dict, folder: Path) -> dict[str, Path | bytes]:
    """Splits as files under the names by which the Hub knows them, images included."""
    from lladamedv.processing.datasets.readers import embedded

    files = {}
    for split, (dataset, _) in loaded.items():
        table = embedded(dataset, folder / f"{split}.arrow")
        count = max(1, -(-table.data.nbytes // _SHARD_BYTES))
        for number in range(count):
            name = f"data/{split}-{number:05d}-of-{count:05d}.parquet"
            files[name] = folder / Path(name).name
            table.shard(count, number, contiguous=True).to_parquet(files[name])
    return files


def _combined(loaded: dict) -> dict:
    """The reports of several splits as one; pictures that splits share count once."""
    reports = [each.as_dict() for _, each in loaded.values()]
    if len(reports) == 1:
        return reports[0]
    total = dict(reports[0])
    for name, value in reports[0].items():
        if type(value) in (list, int):
            total[name] = sum((each[name] for each in reports), type(value)())
    total["images"] = len({name for dataset, _ in loaded.values() for name in dataset["image_id"]})
    shared = set.intersection(*(set(each["published"]) for each in reports)) - {"images"}
    published = sum((Counter({name: each["published"][name] for name in shared}) for each in reports), Counter())
    return total | {"split": ", ".join(loaded), "published": dict(published)}


# Spaces


def write_space(
    name: str,
    out: str | Path,
    model: str,
    *,
    revision: str | None = None,
    report: Callable[[str], object] = print,
) -> None:
    """Write the folder of a Gradio Space: app.py, requirements.txt with the versions installed here, and README.md.

    Args:
        name: its title, or its Hub id, whose last part is the title then.
        out: folder to create; it must not exist, or be empty.
        model: Hub id of the model, or "demo" for the one that comes with this package.
        revision: of the model; a Space that names none gets whatever is the newest when it starts.
        report: called with each line of text.

    Raises:
        ValueError: before anything is written, if an argument is not what it should be, or Gradio is not installed.
    """
    out, is_demo = Path(out).expanduser(), model == "demo"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"`out` is {str(out)!r}, which exists already; allowed is a new or an empty folder.")
    if not (is_demo or is_hub_id(model)):
        raise ValueError(f"`model` is {model!r}; allowed are a Hub id, OWNER/NAME, and 'demo'.")
    if revision is not None and not re.fullmatch(r"[\w./-]+", revision):
        raise ValueError(f"`revision` is {revision!r}; allowed are a commit, a branch and a tag.")
    title = name.rpartition("/")[2].strip()
    if not title or not title.isprintable():
        raise ValueError(f"`name` is {name!r}; it must not be empty, and must be one line.")
    try:
        versions = {package: version(package).partition("+")[0] for package in _SPACE_PACKAGES}
    except PackageNotFoundError as error:
        raise ValueError(
            f'{error.name} is not installed, so that its version cannot be pinned; `pip install "lladamedv[app]"`.'
        ) from error
    data = SpaceCardData(
        title=title, sdk="gradio", sdk_version=versions["gradio"], app_file="app.py", license="apache-2.0",
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}", models=None if is_demo else [model],
        tags=["lladamedv", "masked-diffusion", "medical", "research-only", "not-a-medical-device"],
    )  # fmt: skip
    facts = {
        "model": model, "revision": revision or "", "title": title, "versions": versions, "card_data": data,
        "subject": "The tiny demo model of lladamedv" if is_demo else f"`{model}`",
        "link": None if is_demo else f"https://huggingface.co/{model}",
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for file in _SPACE_TEMPLATE.iterdir():
        template = jinja2.Template(file.read_text(encoding="utf-8"), keep_trailing_newline=True)
        (out / file.name.removesuffix(".jinja")).write_text(template.render(facts), encoding="utf-8")
    report(f"wrote {out}; `hf upload ME/SPACE {out} --repo-type space` makes it a Space")
    report(
        f"its requirements.txt names lladamedv=={versions['lladamedv']}; where the package index has none, put a wheel "
        "of it (`pip wheel --no-deps .` in its sources) into the folder and its file's name into requirements.txt"
    )


# The Hub


@dataclass
class _Target:
    """A repository, and all requests to the Hub about it."""

    repo: str
    kind: str
    private: bool
    replace: bool = False
    revision: str | None = None
    token: str | None = None
    message: str | None = None
    argument: str = "repo"  # by what name the caller knows `repo`

    def __post_init__(self):
        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise ValueError(f"`{self.argument}` is {self.repo!r}, which is no Hub id: {error}") from error
        self.repo_type = "dataset" if self.kind in ("dataset", "recipe") else "model"
        self.secret = self.token or get_token()
        self.api = HfApi(token=self.token, library_name="lladamedv", library_version=version("lladamedv"))

    def push(self, files: dict[str, Path | bytes], left_out, dry_run: bool, report) -> PushPlan:
        """One commit of these files."""
        sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
        plan = PushPlan(self.repo, self.repo_type, self.kind, self.private, dict(sorted(sizes.items())), left_out)
        if dry_run:
            for name, size in (plan.files | dict.fromkeys(left_out, "left out")).items():
                report(f"{size:>14,}  {name}" if isinstance(size, int) else f"{size:>14}  {name}")
            report(f"{plan.summary()}; nothing was sent")
            return plan
        if left_out:
            report(f"left out: {', '.join(left_out)}")
        self.look()
        with self._in_one_line("which could not be pushed to"):
            url = self._commit(files)
        plan = dataclasses.replace(plan, repo=self.repo, url=url)
        folder = "datasets/" if self.repo_type == "dataset" else ""
        report(f"pushed to {self.api.endpoint}/{folder}{self.repo}: {plan.summary()}")
        return plan

    def look(self) -> None:
        """Ask whether the repository can be pushed to.

        Raises:
            ValueError: if it cannot.
        """
        with self._in_one_line("but the login at the Hub fails"):
            user = self.api.whoami()
        if "/" not in self.repo:
            self.repo = f"{user['name']}/{self.repo}"
        with self._in_one_line("which could not be looked up"):
            self._missing = False
            try:
                info = self.api.repo_info(**self._place, revision=self.revision)
            except RevisionNotFoundError:
                info = self.api.repo_info(**self._place)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                self._missing = True
                return
        self._check(info)

    @property
    def _place(self) -> dict[str, str]:
        return {"repo_id": self.repo, "repo_type": self.repo_type}

    def _check(self, info) -> str | None:
        """Refuse what would publish by mistake, or destroy; the kind of what is there."""
        there, where = _kind_of(info), f"`{self.argument}` is {self.repo!r}, which"
        if self.private and info.private is False:
            raise _RefusedError(f"{where} is public; allowed with `private=False` (--public).")
        if there not in (None, self.kind) and not self.replace:
            raise _RefusedError(
                f"{where} holds {there}, not {self.kind}; `replace` deletes that and pushes this instead."
            )
        return there

    def _commit(self, files: dict[str, Path | bytes]) -> str:
        if self._missing:
            self.api.create_repo(**self._place, private=self.private, exist_ok=True)
        if self.revision not in (None, MAIN):
            self.api.create_branch(**self._place, branch=self.revision, exist_ok=True)
        # Looked up anew: another process may have been faster, and the commit stands on what was checked.
        info = self.api.repo_info(**self._place, revision=self.revision)
        replaces = self._check(info) not in (None, self.kind)
        stale = [
            name for each in info.siblings or []
            if (name := each.rfilename) not in files and name != ".gitattributes"
            and (replaces or any(fnmatchcase(name, pattern) for pattern in _OURS))
        ]  # fmt: skip
        operations = [CommitOperationAdd(name, file) for name, file in sorted(files.items())]
        operations += [CommitOperationDelete(name, is_folder=False) for name in stale]
        return self.api.create_commit(
            **self._place, operations=operations, revision=self.revision, parent_commit=info.sha,
            commit_message=self.message or f"Upload {self.kind} with lladamedv {version('lladamedv')}",
        ).commit_url  # fmt: skip

    @contextmanager
    def _in_one_line(self, what: str):
        """Turn what the client raises into one line that holds no token."""
        try:
            yield
        except _RefusedError:
            raise
        except Exception as error:  # the client raises many kinds
            # Not `from error`: a traceback would show what was taken out of the line.
            raise ValueError(
                f"`{self.argument}` is {self.repo!r}, {what}: {_reason(error, self.secret)}. A second try does not "
                "send again what has arrived there."
            ) from None


class _RefusedError(ValueError):
    """By the checks here, not by the Hub."""


def _kind_of(info) -> str | None:
    """What a repository holds; `None` if nothing but a card."""
    names = {each.rfilename for each in info.siblings or []} - {CARD, ".gitattributes", "LICENSE"}
    if ADAPTER_CONFIG in names:
        return "adapter"
    if "config.json" in names:
        model_type = (info.config or {}).get("model_type", "lladamedv")
        return "model" if model_type == "lladamedv" else f"a model of type {model_type!r}"
    if any(name.endswith(".parquet") for name in names):
        return "dataset"
    if "recipe.json" in names:
        return "recipe"
    return "other files" if names else None


def _reason(error: BaseException, secret: str | None) -> str:
    """Why a call of the Hub's client failed, in one line without tokens and signed addresses."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if answer is None:
        text = f"{type(causes[-1]).__name__}: {causes[-1] if str(causes[-1]) else error}"
    else:
        status, wait = answer.response.status_code, answer.response.headers.get("Retry-After")
        hint = _HINTS.get(status) or ("the Hub has a problem" if status >= 500 else "the Hub refuses")
        text = f"HTTP {status}, {hint}" + (f", try again in {wait} s" if wait else "")
        text += f" ({answer.server_message})" if answer.server_message else ""
    text = re.sub(r"\?[\w-]+=\S+", "", " ".join(text.split()))
    if secret:
        text = text.replace(secret, "(token)")
    return SECRET.sub("(token)", text).rstrip(".")


__all__ = ["PushPlan", "check_target", "push_dataset", "push_folder", "write_space"]
