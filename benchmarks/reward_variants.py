"""All objectives on rewards at equal compute: what the demo model answers after the same seconds of processor time.

    python benchmarks/reward_variants.py [--seconds 225] [--questions 1000] [--only espo spg]

Each variant learns "Is there only one lesion?", or with --kind new "Which side is free of lesions?", to which the model
never gives the right answer. Half the prompts are old questions, the learning rate falls to 0 with the seconds, and the
model is asked both afterwards. Prints a table; the share of groups without a difference is that of the whole run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from dpo_demo import measure
from transformers import TrainerCallback

from lladamedv.demo import DEMO_MODEL, load_model
from lladamedv.trainers.recipes import recipe_file
from lladamedv.trainers.sft import build_trainer, make_parser, method_of


VARIANTS = {
    "espo": ("demo_grpo", []),
    "diffu_grpo": ("demo_grpo", ["--loss_type", "diffu_grpo"]),
    "diffu_grpo, whole prompts": ("demo_grpo", ["--loss_type", "diffu_grpo", "--p_mask_prompt", "0"]),
    "spg": ("demo_grpo", ["--loss_type", "spg", "--num_draws", "2"]),
    "expected_reward": ("demo_expected_reward", []),
    "closed_form": ("demo_closed_form", []),
}


class SpendSeconds(TrainerCallback):
    """Ends a training after seconds of processor time, with a learning rate that falls to 0 until then."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.process_time()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        left = max(0.0, 1 - (time.process_time() - self.started) / self.seconds)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * left

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = time.process_time() - self.started > self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=225, help="of processor time, for each variant")
    parser.add_argument("--kind", default="new_closed", choices=["new_closed", "new"])
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, processor = load_model(DEMO_MODEL)
    results = {"before": ("", "", measure(model, processor, options.kind, options.questions, 0))}
    for name in options.only:
        recipe, flags = VARIANTS[name]
        with tempfile.TemporaryDirectory() as folder:
            kinds = ",".join([options.kind] * 3 + ["closed", "closed", "open"])
            words = [
                "--config", str(recipe_file(recipe)), "--train_data", f"phantoms:6000:9600:{kinds}",
                "--output_dir", folder, "--report_to", "none", "--num_train_epochs", "100", "--logging_steps", "5",
                "--lr_scheduler_type", "constant", "--eval_strategy", "no", "--log_answers", "0", *flags,
            ]  # fmt: skip
            trainer, _ = build_trainer(*make_parser(method_of(words)).parse_args_and_config(words))
            trainer.add_callback(SpendSeconds(options.seconds))
            trainer.train()
        shares = [entry["frac_reward_zero_std"] for entry in trainer.state.log_history
                  if "frac_reward_zero_std" in entry]  # fmt: skip
        tuned = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().eval()
        found = measure(tuned, processor, options.kind, options.questions, 0)
        results[name] = (trainer.state.global_step, f"{statistics.fmean(shares):.0%}", found)
    kinds = list(results["before"][2])
    print(f"| | steps | without a difference | {' | '.join(kinds)} |\n|{'---|' * (3 + len(kinds))}")
    for name, (steps, share, found) in results.items():
        print(f"| {name} | {steps} | {share} | {' | '.join(f'{found[kind]:.1%}' for kind in kinds)} |")


if __name__ == "__main__":
    main()
