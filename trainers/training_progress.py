"""A training as people watch it: a line for each log, the time left, and the loss curve while it runs."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from lladamedv.hub_cards.loss_curve import draw_loss_curve


# What a line shows of a log of the training, in this order; trackers and `log_history` have all of it.
_SHOWN = (
    "loss", "reward", "frac_reward_zero_std", "rewards/margins", "rewards/accuracies", "mean_token_accuracy", "kl",
    "grad_norm", "learning_rate",
)  # fmt: skip
_IN_BAR = {"loss": "loss", "reward": "reward", "learning_rate": "rate"}
_SPEEDS = ("_runtime", "_per_second", "_num_tokens")
_PAUSE = 20  # of its time, drawing the curve takes one part in so many at most


class TrainingProgressCallback(ProgressCallback):
    """Instead of Transformers' own: short lines that keep their order, with the time left; in a terminal, bars, too.

    What is piped into a file is lines alone. A log that repeats is written once for each step, by the main process.
    """

    def __init__(self):
        super().__init__()
        self._has_bars, self._began = False, (0.0, 0)

    def on_train_begin(self, args, state, control, **kwargs):
        self._began, self.current_step = (time.monotonic(), state.global_step), state.global_step
        self._has_bars = sys.stderr.isatty() and not args.disable_tqdm
        if self._has_bars and state.is_world_process_zero:
            # The time left is that at the mean pace of this process, evaluations included, as in the lines.
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, smoothing=0, dynamic_ncols=True, leave=False,
                bar_format="{percentage:3.0f}% {bar} step {n_fmt}/{total_fmt}, {remaining} left{postfix}",
            )  # fmt: skip

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self._has_bars:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self._has_bars:
            super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self._has_bars:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, (int, float))}
        names = [name for name in _SHOWN if name in numbers]
        if "train_runtime" in numbers:
            names = ["train_runtime", "train_loss"]
        elif not names:
            names = [name for name in numbers if name.startswith("eval_") and not name.endswith(_SPEEDS)]
        if self.training_bar is not None and "loss" in numbers:
            shown = [f"{label} {numbers[name]:.3g}" for name, label in _IN_BAR.items() if name in numbers]
            self.training_bar.set_postfix_str(", ".join(shown), refresh=False)
        values = [f"{name} {numbers[name]:.4g}" for name in names if name in numbers]
        if values:
            tqdm.write("  ".join([f"step {state.global_step}/{state.max_steps}", *values, *self._time_left(state)]))
            sys.stdout.flush()

    def _time_left(self, state) -> list[str]:
        began, first = self._began
        if not first < state.global_step < state.max_steps:
            return []
        left = (time.monotonic() - began) / (state.global_step - first) * (state.max_steps - state.global_step)
        return [f"{tqdm.format_interval(left)} left"]


class LossCurveCallback(TrainerCallback):
    """Draws `output_dir/loss_curve.png` while a training runs and when it ends, from all that was logged, before a
    resumed run's checkpoint, too."""

    def __init__(self):
        self._next = 0.0

    def on_log(self, args, state, control, **kwargs):
        began = time.monotonic()
        if state.is_world_process_zero and began >= self._next:
            draw_loss_curve(Path(args.output_dir) / "loss_curve.png", state.log_history)
            self._next = time.monotonic() + _PAUSE * (time.monotonic() - began)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            draw_loss_curve(Path(args.output_dir) / "loss_curve.png", state.log_history)


__all__ = ["LossCurveCallback", "TrainingProgressCallback"]
