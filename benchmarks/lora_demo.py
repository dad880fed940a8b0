"""Whether fine-tuning teaches something new and keeps the old: LoRA on the demo model, for a question it never saw.

    python benchmarks/lora_demo.py

Runs the recipe `demo_lora` as `lladamedv train` does, in this process, and asks the model before and after: the new
question ("Which side is free of lesions?", where the demo model names the side of the lesions) and the old ones.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from peft import PeftModel

from lladamedv.demo import DEMO_MODEL, HELD_OUT_SEED, answer, evaluate_demo, load_model
from lladamedv.processing.phantoms import NEW_KIND, PhantomVQA
from lladamedv.trainers.recipes import recipe_file
from lladamedv.trainers.sft import main as train


def measure(model, processor, questions: int) -> dict[str, float]:
    """Shares of right answers, by kind of question."""
    size = model.config.vision_config.image_size
    new = list(PhantomVQA(HELD_OUT_SEED, questions // 3, [NEW_KIND], size))
    answers = answer(model, processor, [example.messages() for example in new])
    right = sum(given.lower() == example.answer.lower() for given, example in zip(answers, new)) / len(new)
    old = evaluate_demo(model, processor, list(PhantomVQA(HELD_OUT_SEED, questions, image_size=size)))
    return {"new": right, "closed": old.closed, "open": old.open, "description": old.description}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, processor = load_model(DEMO_MODEL)
    before = measure(model, processor, options.questions)
    with tempfile.TemporaryDirectory() as folder:
        start, used = time.perf_counter(), time.process_time()
        train(["--config", str(recipe_file("demo_lora")), "--output_dir", folder, "--report_to", "none"])
        seconds, cpu = time.perf_counter() - start, time.process_time() - used
        adapter = sum(file.stat().st_size for file in Path(folder).glob("adapter_model.safetensors"))
        tuned = PeftModel.from_pretrained(load_model(DEMO_MODEL)[0], folder).merge_and_unload().eval()
    after = measure(tuned, processor, options.questions)
    print(f"trained in {seconds:.0f} s ({cpu:.0f} s of CPU), adapter of {adapter / 1e3:.0f} kB")
    for kind in before:
        print(f"{kind:12} {before[kind]:6.1%} before   {after[kind]:6.1%} after   {after[kind] - before[kind]:+6.1%}")


if __name__ == "__main__":
    main()
