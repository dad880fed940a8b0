"""Numbers for a card, read from the summary.json of an evaluation, so that nothing is typed by hand.

Results of a part of a benchmark, or with answers missing, stand in the card as such and never in the metadata that
leaderboards read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from lladamedv.processing.processing_lladamedv import CHAT_TEMPLATES

from .privacy import is_on_hub, scrub


# What the metadata state; the card's text has all scores.
_HEADLINES = (
    "open_recall", "open_f1", "open_exact_match", "open_recall_llava_med", "closed_accuracy",
    "closed_accuracy_llava_med", "relative_score",
)  # fmt: skip
_MAIN = ("open_recall", "closed_accuracy", "relative_score")
_METRIC_TYPES = ("accuracy", "recall", "precision", "f1", "exact_match", "bleu", "relative_score")
_TITLES = {
    "vqa-rad": "VQA-RAD", "slake": "SLAKE", "path-vqa": "PathVQA", "phantoms": "Phantoms", "own-data": "Own data",
}  # fmt: skip
_CHAT, _CHAT_TITLE = "llava_med_eval_qa50", "LLaVA-Med's biomedical chat"
_CHAT_QUESTIONS = 193  # of the benchmark: arXiv 2306.00890, section 5.1
_GROUPS = ("open", "closed", "all", "conversation", "detailed_description")  # whose headlines the metadata state
_UNKNOWN = "not recorded"
_DECODING = {
    "length of the canvas, L": "max_new_tokens", "length of a block, B": "block_length",
    "denoising steps, Z": "steps", "remasking": "remasking",
}  # fmt: skip
_VQA_METRICS = (
    "in percent, means over questions; words are counted as often as the true answer has them, and yes or no is read "
    "as a word. Names in `_llava_med` follow LLaVA-Med's evaluation (arXiv 2306.00890), which counts repeated words "
    "and looks for substrings"
)
_CHAT_METRICS = (
    "the judge's score of the model divided by its score of the reference answer, in percent, mean over questions "
    "(arXiv 2306.00890, section 5.1)"
)


@dataclass(frozen=True)
class Score:
    """One number: of which group of questions, its name, the value, a 95 % interval or `None`, and the number of
    questions that it is a mean of."""

    group: str
    name: str
    value: float
    interval: Sequence[float] | None
    count: int


@dataclass(frozen=True)
class EvaluationResults:
    """What one run of a benchmark found.

    Args:
        benchmark: its name in metadata.
        title: its name in text, with the split.
        split: of the data.
        dataset_id: on the Hub; `None` if the data were local.
        dataset_revision: commit of `dataset_id`, if it was pinned.
        complete: whether every question that was asked has a score.
        num_scored, num_asked, num_questions: questions with a score, of those asked, of all that the benchmark has.
        is_benchmark: whether these are the published questions of a benchmark, and not the user's own.
        scores: all that there are.
        protocol: how it was measured, as lines of a table.
        arguments: the same for programs.
    """

    benchmark: str
    title: str
    split: str
    dataset_id: str | None
    dataset_revision: str | None
    complete: bool
    num_scored: int
    num_asked: int
    num_questions: int
    is_benchmark: bool
    scores: tuple[Score, ...]
    protocol: dict[str, str]
    arguments: dict

    @classmethod
    def from_file(cls, path: str | Path) -> EvaluationResults:
        """Read the summary.json of `lladamedv eval vqa` or `lladamedv eval chat`, and the prompt from the run.json
        beside it.

        Raises:
            ValueError: for a file that cannot be read or is something else.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
            summary = json.loads(content)
        except (OSError, ValueError) as error:
            raise ValueError(f"`path` is {str(path)!r}, which cannot be read as JSON: {error}") from error
        run_file = path.with_name("run.json")  # all that the answers depend on
        run = json.loads(run_file.read_text(encoding="utf-8")) if run_file.is_file() else {}
        for fields, read in ({"benchmark", "scores", "data"}, _read_vqa), ({"groups", "judge"}, _read_chat):
            if isinstance(summary, dict) and fields <= set(summary):
                results = read(summary, run)
                results.protocol["sha256 of summary.json"] = f"`{hashlib.sha256(content).hexdigest()}`"
                return results
        raise ValueError(
            f"`path` is {str(path)!r}, which is no summary of an evaluation; allowed are the summary.json files of "
            "`lladamedv eval vqa` and `lladamedv eval chat`."
        )

    @property
    def warning(self) -> str:
        """What keeps these numbers from standing beside others; empty if nothing does."""
        if not self.complete:
            lost = self.num_asked - self.num_scored
            return f"INCOMPLETE: {lost} of {self.num_asked} questions have no score; the numbers are of the others."
        if self.num_asked < self.num_questions:
            return f"A part only: {self.num_asked} of {self.num_questions} questions were asked."
        if not self.is_benchmark or self.num_asked > self.num_questions:
            return "Own data: these are not the published questions of a benchmark; compare with no other numbers."
        return ""

    @property
    def headlines(self) -> list[Score]:
        """The scores that metadata may state; none if this is not a result of the whole benchmark."""
        if self.warning:
            return []
        return [score for score in self.scores if score.name in _HEADLINES and score.group in _GROUPS]

    def to_eval_results(self) -> list[EvalResult]:
        """The headlines for the card's `model-index`.

        Open and closed questions are configurations of their own: the Hub merges results that differ in nothing else.
        """
        return [
            EvalResult(
                task_type="visual-question-answering", dataset_type=self.dataset_id or self.benchmark,
                dataset_name=self.title, dataset_config=score.group, dataset_split=self.split,
                dataset_revision=self.dataset_revision, metric_name=score.name, metric_value=score.value,
                metric_type=next(each for each in _METRIC_TYPES if each in score.name), metric_args=self.arguments,
            )
            for score in self.headlines
        ]  # fmt: skip

    def to_entries(self) -> list[EvalResultEntry]:
        """The main score of each group for the Hub's `.eval_results`; none without a data set on the Hub."""
        notes = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        return [
            EvalResultEntry(
                dataset_id=self.dataset_id, task_id=score.group, value=score.value,
                dataset_revision=self.dataset_revision, notes=f"{score.name}, {self.split}; {notes}",
            )
            for score in self.headlines
            if score.name in _MAIN and self.dataset_id is not None
        ]  # fmt: skip


def eval_result_files(results: Sequence[EvaluationResults]) -> dict[str, str]:
    """Files for a model's repository that the Hub shows on the pages of registered benchmarks.

    Returns:
        For each data set its `.eval_results/NAME.yaml` and the text. Whether the medical VQA benchmarks are registered
        is not known here; the Hub ignores files about others.
    """
    files: dict[str, list[EvalResultEntry]] = {}
    for entry in (entry for result in results for entry in result.to_entries()):
        files.setdefault(f".eval_results/{entry.dataset_id.replace('/', '--')}.yaml", []).append(entry)
    return {name: yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False) for name, entries in files.items()}


def _read_vqa(summary: dict, run: dict) -> EvaluationResults:
    data, scores, environment = summary["data"], summary["scores"] or {}, summary["environment"]
    benchmark, left_out = summary["benchmark"], len(summary["left_out"])
    title = f"{_TITLES.get(benchmark, benchmark)} ({summary['split']})"
    if not data["is_published"] and benchmark != "own-data":
        title = f"Own data, read as {title}"
    on_hub = is_on_hub(data) and not data["local"]
    if on_hub:
        source = f"`{data['reference']}`, revision {data['revision'] or 'not pinned'}"
    else:
        source = f"`{data['source']}`" if benchmark == "phantoms" else "local data"
    total = data["questions"] + left_out
    counts = ", ".join(f"{scores.get(f'num_{group}', 0)} {group}" for group in ("open", "closed"))
    decoding = _without_ids(summary["decoding"])
    protocol = {
        **_decoding_lines(decoding),
        "answers by": summary["scoring"],
        "prompt": _prompt_name(run.get("chat_template")),
        "metrics": _VQA_METRICS,
        "questions": f"{counts}; {summary['num_questions']} asked of {total}",
        "data": source,
        "test images in train": data["leakage"],
        "judge": "none",
        "computed in": f"{environment['dtype']} on {environment['device']}, batches of {environment['batch_size']}",
        "fingerprint of the weights": f"`{summary['model_sha256']}`",
    }
    found = tuple(
        Score(group, name, value, scores.get(f"{name}_ci95"), scores[f"num_{group}"])
        for name, value in scores.items() for group in [name.partition("_")[0]]
        if value is not None and group != "num" and not name.endswith("_ci95")
    )  # fmt: skip
    return EvaluationResults(
        benchmark, title, summary["split"], *((data["reference"], data["revision"]) if on_hub else (None, None)),
        # Questions without a true answer cannot be scored.
        complete=summary["complete"], num_scored=summary["num_questions"] - len(summary["failed"]),
        num_asked=summary["num_questions"] + left_out, num_questions=total, is_benchmark=data["is_published"],
        scores=found, protocol=protocol, arguments={**decoding, "scoring": summary["scoring"]},
    )  # fmt: skip


def _read_chat(summary: dict, run: dict) -> EvaluationResults:
    judge, decoding = summary["judge"], run.get("decoding")
    decoding = decoding and _without_ids(decoding)
    judge_model = scrub(judge["model"])  # a local server may call it by its path
    sampling = "".join(f", {name} {value}" for name, value in judge.items() if name not in ("model", "host"))
    prompt = f"{summary['prompt_version']} (sha256 `{summary['prompt_sha256']}`)"
    order = "both orders of the answers" if summary["swap_positions"] else "the reference answer first"
    protocol = {
        **_decoding_lines(decoding),
        "prompt": _prompt_name(run.get("chat_template")),
        "metrics": _CHAT_METRICS,
        "questions": f"{summary['n_judged']} judged of {summary['data_size']}; the benchmark has {_CHAT_QUESTIONS}",
        "questions of several domains": "count for each" if summary["multi_label_domains"] else "count for the first",
        "judge": f"{judge_model}{sampling}; prompt {prompt}; {order}",
        "fingerprint of the weights": f"`{run['model_sha256']}`" if "model_sha256" in run else _UNKNOWN,
    }
    found = tuple(
        Score(group, "relative_score", each["relative_score"], each["relative_score_ci95"], each["n_judged"])
        for group, each in summary["groups"].items()
        if each["relative_score"] is not None
    )
    return EvaluationResults(
        _CHAT, _CHAT_TITLE, "test", None, None, complete=summary["complete"], num_scored=summary["n_judged"],
        num_asked=summary["data_size"], num_questions=_CHAT_QUESTIONS, is_benchmark=True, scores=found,
        protocol=protocol,
        arguments={"judge": judge_model, "prompt": summary["prompt_version"], **(decoding or {})},
    )  # fmt: skip


def _without_ids(decoding: dict) -> dict:
    """Options without ids of tokens, which say nothing without the tokenizer."""
    return {name: value for name, value in decoding.items() if not name.endswith(("_token_id", "suppress_tokens"))}


def _decoding_lines(decoding: dict | None) -> dict[str, str]:
    """How answers were made; `None` if that was not recorded."""
    absent = _UNKNOWN if decoding is None else "the model's default"
    lines = {title: str((decoding or {}).get(name, absent)) for title, name in _DECODING.items()}
    others = [f"{name}={value}" for name, value in (decoding or {}).items() if name not in _DECODING.values()]
    return lines | ({"other options": ", ".join(others)} if others else {})


def _prompt_name(template: str | dict | None) -> str:
    """The name of a chat template of ours, or its hash."""
    if template is None:
        return _UNKNOWN
    text = template["default"] if isinstance(template, dict) else template
    known = next((name for name, ours in CHAT_TEMPLATES.items() if ours == text), None)
    return f"`{known}`" if known else f"another chat template, sha256 `{hashlib.sha256(text.encode()).hexdigest()}`"


__all__ = ["EvaluationResults", "Score", "eval_result_files"]
