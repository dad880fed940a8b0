"""What the model answers while it is trained: a few held-out questions, the reference beside each answer."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

from lladamedv.processing.datasets.messages import check_row, show_images


logger = logging.getLogger(__name__)


class AnswerTableCallback(TrainerCallback):
    """Generates answers at every evaluation, and prints and logs them as a Markdown table.

    The table goes to whatever the trainer reports to, and the answers to `output_dir/answers.jsonl`, one line per
    answer; the share of answers that are the reference, but for case, is logged as `eval_answer_accuracy`. If it has
    fallen since its best evaluation by more than chance explains (McNemar's test: lost minus won answers above two
    standard errors), a warning says so, once. Every process generates the same answers, which sharded models need.

    Args:
        trainer ([`MaskedDiffusionSFTTrainer`]): whose model is asked.
        rows (`list[dict]`): rows with `messages` and images; what stands before a row's last answer is the prompt.
    """

    def __init__(self, trainer, rows):
        self.trainer, self.rows = trainer, [check_row(row) for row in rows]
        self.best, self.warned = [], False  # which answers were right at the best evaluation so far

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        records = [{"step": state.global_step, **self._answer(row)} for row in self.rows]
        equal = [record["answer"].casefold() == record["reference"].casefold() for record in records]
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
        with (Path(args.output_dir) / "answers.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        table = _markdown(records)
        tqdm.write(table)
        # Not `trainer.log`: a terminal would show no text of this length, and TensorBoard takes numbers only.
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.tb_writer.add_text("answers", table, state.global_step)
            elif not isinstance(callback, (PrinterCallback, ProgressCallback)):
                callback.on_log(args, state, control, logs={"answers": table}, **kwargs)

    @torch.no_grad()
    def _answer(self, row: dict) -> dict:
        model, processor = self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.processing_class
        last = max(number for number, message in enumerate(row["messages"]) if message["role"] == "assistant")
        prompt = row["messages"][:last]
        inputs = processor.apply_chat_template(
            show_images(prompt, row["images"]), add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        ).to(model.device)  # fmt: skip
        was_training = model.training
        model.eval()
        output = model.generate(**inputs, return_dict_in_generate=True)
        model.train(was_training)
        answer = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return {
            "id": row["id"], "question": _text(prompt[-1]), "reference": _text(row["messages"][last]),
            "answer": answer.strip(), "confidence": round(float(output.answer_confidence[0]), 4),
        }  # fmt: skip


def _text(message: dict) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text").strip()


def _markdown(records: list[dict]) -> str:
    names = list(records[0])
    cells = [[str(record[name]).replace("|", "\\|").replace("\n", " ") for name in names] for record in records]
    return "\n".join(f"| {' | '.join(row)} |" for row in [names, ["---"] * len(names), *cells])


__all__ = ["AnswerTableCallback"]
