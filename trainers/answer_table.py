"""What the model answers while it is trained: a few held-out questions, the reference beside each answer."""

from __future__ import annotations

import json
import logging
from html import escape
from itertools import groupby
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

from lladamedv.hub_cards.loss_curve import write_to_look_at
from lladamedv.processing.datasets.messages import check_row, show_images
from lladamedv.processing.pictures import as_url, reduced


_WIDTH = 224  # pixels of a picture on the page, at most
_PRINTED = 8  # answers that a terminal shows
_RELOAD = '<meta http-equiv="refresh" content="20">'  # while the model is trained
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Answers during training</title><style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
section { display: flex; flex-wrap: wrap; gap: 1rem; border-top: 1px solid #999; padding: 1rem 0; }
section > div:last-child { flex: 1 1 18rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 0; }
section > div:first-child { flex: 0 1 11rem; } img { border-radius: 6px; width: 100%; }
table { border-collapse: collapse; } th, td { text-align: left; padding: 2px 1rem 2px 0; vertical-align: top; }
th, td:not(:nth-child(2)) { white-space: nowrap; }
.right td { color: light-dark(#17692a, #7fd894); } .right td:nth-child(2)::after { content: " \\2713"; }
</style></head><body><main><h1>Answers during training</h1>
"""
logger = logging.getLogger(__name__)


class AnswerTableCallback(TrainerCallback):
    """Generates answers at every evaluation, and prints and logs them as a Markdown table.

    The table goes to whatever the trainer reports to, and the answers to `output_dir/answers.jsonl`, one line per
    answer, and, beside the pictures that they are about, to `output_dir/answers.html`. Another run in the same folder
    begins both files anew, a resumed one goes on from its checkpoint. Neither is ever pushed to the Hub.

    The share of answers that are the reference, but for case, is logged as `eval_answer_accuracy`. If it has fallen
    since its best evaluation by more than chance explains (McNemar's test: lost minus won answers above two standard
    errors), a warning says so, once. Every process generates the same answers, which sharded models need.

    Args:
        trainer ([`MaskedDiffusionSFTTrainer`]): whose model is asked.
        rows (`list[dict]`): rows with `messages` and images; what stands before a row's last answer is the prompt.
    """

    def __init__(self, trainer, rows):
        self.trainer, self.rows = trainer, [check_row(row) for row in rows]
        self.best, self.warned = [], False  # which answers were right at the best evaluation so far
        self.records, self.running = [], False  # of this run; whether it goes on
        fetch = trainer.processing_class.image_processor.fetch_images
        self.pictures = [[as_url(reduced(image, _WIDTH)) for image in fetch(row["images"])] for row in self.rows]

    def on_train_begin(self, args, state, control, **kwargs):
        file, self.running = Path(args.output_dir) / "answers.jsonl", True
        if state.global_step and file.is_file():  # resumed
            lines = file.read_text(encoding="utf-8").splitlines()
            records = [each for each in map(json.loads, lines) if each["step"] <= state.global_step]
            asked = [tuple(_asked(row).values()) for row in self.rows]
            if [(each["id"], each["question"], each["reference"]) for each in records] != asked * (
                len(records) // len(asked)
            ):
                logger.warning("%s holds answers to other rows than are asked now; it begins anew.", file)
                records = []
            self.records = records

    def on_train_end(self, args, state, control, **kwargs):
        self.running = False
        if self.records and state.is_world_process_zero:
            self._write(args)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        records = [{"step": state.global_step, **self._answer(row)} for row in self.rows]
        equal = [_is_right(record) for record in records]
        metrics["eval_answer_accuracy"] = sum(equal) / len(equal)  # may choose the best checkpoint
        self.trainer.log({"eval_answer_accuracy": metrics["eval_answer_accuracy"]})
        lost, won = (sum(one > two for one, two in zip(*each)) for each in ((self.best, equal), (equal, self.best)))
        if lost - won > 2 * (lost + won) ** 0.5 and not self.warned:
            self.warned = True
            logger.warning(
                "Step %d: %d of %d answers are no longer right, and %d have become so, since the best evaluation: the "
                "model is getting worse at what `log_answers` asks.", state.global_step, lost, len(equal), won,
            )  # fmt: skip
        self.best = max(self.best, equal, key=sum)
        if not state.is_world_process_zero:
            return
        self.records = [each for each in self.records if each["step"] < state.global_step] + records
        self._write(args)
        table, more = _markdown(records), len(records) - _PRINTED
        tqdm.write(_markdown(records[:_PRINTED]) + (f"\n{more} more in answers.html" if more > 0 else ""))
        # Not `trainer.log`: a terminal would show no text of this length, and TensorBoard takes numbers only.
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.tb_writer.add_text("answers", table, state.global_step)
            elif not isinstance(callback, (PrinterCallback, ProgressCallback)):
                callback.on_log(args, state, control, logs={"answers": table}, **kwargs)

    def _write(self, args) -> None:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in self.records]
        for name, text in (("answers.jsonl", "".join(lines)), ("answers.html", self._page())):
            write_to_look_at(Path(args.output_dir) / name, text.encode())

    def _page(self) -> str:
        """Every question with its pictures, the right answer, and the answers so far, as HTML."""
        parts = []
        for number, (row, urls) in enumerate(zip(self.rows, self.pictures)):
            asked = self.records[number :: len(self.rows)]
            shown = "".join(f'<img src="{url}" alt="Picture {place} of row {number + 1}">'
                            for place, url in enumerate(urls, 1))  # fmt: skip
            lines = ""
            for answer, same in groupby(asked, key=lambda record: record["answer"]):
                first, *_, last = [*same] * 2  # the same record, if there is one alone
                steps = f"{first['step']} to {last['step']}" if first is not last else first["step"]
                kind = "right" if _is_right(last) else "wrong"
                lines += f'<tr class="{kind}"><td>{steps}</td><td>{escape(answer)}</td>'
                lines += f"<td>{last['confidence']:.1%}</td></tr>"
            parts.append(
                f"<section><div>{shown}</div><div><h2>{escape(asked[-1]['question'])}</h2>"
                f"<p>Right answer: <b>{escape(asked[-1]['reference'])}</b> <small>{escape(str(row['id']))}</small></p>"
                f"<table><tr><th>Step</th><th>Answer</th><th>Confidence</th></tr>{lines}</table></div></section>"
            )
        last = self.records[-len(self.rows) :]
        right = f"{sum(map(_is_right, last))} of {len(last)} answers are the right ones after step {last[0]['step']}."
        said = f"<p>{right} Green and a tick: the same words, but for case.</p>"
        said += "<p>This page holds the pictures: pass it on only where they may go.</p>"
        page = _PAGE.replace("<title>", _RELOAD * self.running + "<title>")
        return f"{page}{said}{''.join(parts)}</main></body></html>\n"

    @torch.no_grad()
    def _answer(self, row: dict) -> dict:
        model, processor = self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.processing_class
        prompt = row["messages"][: _last_answer(row)]
        inputs = processor.apply_chat_template(
            show_images(prompt, row["images"]), add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        ).to(model.device)  # fmt: skip
        was_training = model.training
        model.eval()
        output = model.generate(**inputs, return_dict_in_generate=True)
        model.train(was_training)
        answer = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        confidence = round(float(output.answer_confidence[0]), 4)
        return {**_asked(row), "answer": answer.strip(), "confidence": confidence}


def _last_answer(row: dict) -> int:
    return max(number for number, message in enumerate(row["messages"]) if message["role"] == "assistant")


def _asked(row: dict) -> dict:
    """What a record says of its row."""
    last, messages = _last_answer(row), row["messages"]
    return {"id": row["id"], "question": _text(messages[last - 1]), "reference": _text(messages[last])}


def _is_right(record: dict) -> bool:
    return record["answer"].casefold() == record["reference"].casefold()


def _text(message: dict) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text").strip()


def _markdown(records: list[dict]) -> str:
    names = list(records[0])
    cells = [[str(record[name]).replace("|", "\\|").replace("\n", " ") for name in names] for record in records]
    return "\n".join(f"| {' | '.join(row)} |" for row in [names, ["---"] * len(names), *cells])


__all__ = ["AnswerTableCallback"]
