"""Whether alignment changes what the model answers: the recipe `demo_dpo`, and plain DPO, which breaks it; or another.

    python benchmarks/dpo_demo.py [--recipe RECIPE] [--adapter FOLDER]

Trains as `lladamedv train` does, in this process, or takes adapters that were trained, and asks the model before and
after: the question that the recipe evaluates first, and the old ones. Beside it, how often the rewards prefer the right
answer, with the right pictures and with each other's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
import yaml
from peft import PeftModel

from lladamedv.demo import DEMO_MODEL, HELD_OUT_SEED, answer, evaluate_demo, load_model
from lladamedv.evaluation.answering import question_about
from lladamedv.processing.phantoms import NEW_CLOSED_KIND, PhantomVQA, candidates_of
from lladamedv.trainers.recipes import recipe_file
from lladamedv.trainers.sft import main as train


PLAIN = ["--loss_type", "sigmoid", "--loss_weights", "1", "--train_data", f"phantoms:5000:2400:{NEW_CLOSED_KIND}"]


def preferred(model, processor, examples, pictured) -> torch.Tensor:
    """The likelihood of the right answer minus that of the likeliest wrong one, in nats, exactly, `(examples,)`."""
    differences = []
    for example, other in zip(examples, pictured):
        inputs = processor.apply_chat_template(
            question_about(other.image, example.question), add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        wrong = [each for each in candidates_of(example.topic) if each != example.answer]
        candidates = [example.answer, *wrong]
        scores = model.score(**inputs, candidates=candidates, tokenizer=processor.tokenizer).log_likelihood[0]
        differences.append(scores[0] - scores[1:].max())
    return torch.stack(differences)


def measure(model, processor, kind: str, questions: int, pairs: int, reference=None) -> dict[str, float]:
    """Shares of right answers, to the new `kind` and by old kinds, and of pairs that the rewards against `reference`
    rank rightly."""
    size = model.config.vision_config.image_size
    new = list(PhantomVQA(HELD_OUT_SEED, questions, [kind], size))
    answers = answer(model, processor, [example.messages() for example in new])
    right = sum(given.lower() == example.answer.lower() for given, example in zip(answers, new)) / len(new)
    old = evaluate_demo(model, processor, list(PhantomVQA(HELD_OUT_SEED, questions, image_size=size)))
    found = {"new question": right, "old, closed": old.closed, "old, open": old.open, "descriptions": old.description}
    if reference is not None:
        new = new[:pairs]
        for name, shift in (("rewards, right pictures", 0), ("rewards, other pictures", pairs // 3)):
            pictured = [*new[shift:], *new[:shift]]
            reward = preferred(model, processor, new, pictured) - preferred(reference, processor, new, pictured)
            found[name] = float((reward > 0).double().mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo_dpo")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adapter", help="what was trained before; nothing is trained then")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, processor = load_model(DEMO_MODEL)
    recipe = str(recipe_file(options.recipe))
    kind = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))["eval_data"].split(":")[3].split(",")[0]
    numbers = kind, options.questions, options.pairs
    results = {"before": measure(model, processor, *numbers)}
    runs = {options.recipe: []} if options.adapter is None else {options.adapter: None}
    if "demo_dpo" in runs:
        runs["plain DPO"] = PLAIN
    with tempfile.TemporaryDirectory() as temporary:
        for name, flags in runs.items():
            folder, start = f"{temporary}/{name}", time.perf_counter()
            if flags is None:
                folder = options.adapter
            else:
                train(["--config", recipe, "--output_dir", folder, "--report_to", "none", *flags])
                print(f"{name}: trained in {time.perf_counter() - start:.0f} s")
            tuned = PeftModel.from_pretrained(load_model(DEMO_MODEL)[0], folder).merge_and_unload().eval()
            results[name] = measure(tuned, processor, *numbers, model)
    for name, values in results.items():
        print(f"{name}: " + ", ".join(f"{kind} {value:.1%}" for kind, value in values.items()))


if __name__ == "__main__":
    main()
