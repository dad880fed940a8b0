"""Tiny trainings in a process of their own, for tests that kill it or run two: `[[FOLDER, OPTIONS], …]`, as JSON.

A sharded run is trained again from its `checkpoint-2`, into `FOLDER/resumed`.
"""

import json
import sys
import weakref
from pathlib import Path

from tests.training import adapters, make_trainer, tiny_model


def train(folder: Path, options: dict, checkpoint: Path | None = None):
    options = dict(options)
    peft_config = adapters() if options.pop("lora", False) else None
    # What is resumed does not depend on the weights that it starts from; adapters do on those beneath them.
    model = tiny_model(seed=0 if peft_config or checkpoint is None else 5)
    trainer = make_trainer(options.pop("method", "sft"), folder, model=model, peft_config=peft_config, **options)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()
    return trainer


def main() -> None:
    for folder, options in json.loads(sys.argv[1]):
        folder = Path(folder)
        trainer = train(folder, options)
        if trainer.is_world_process_zero():
            losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
            (folder / "losses.json").write_text(json.dumps(losses))
        if "fsdp" in options:
            trainer = train(folder / "resumed", options, folder / "checkpoint-2")
    wrapped = weakref.ref(trainer.model_wrapped)
    trainer.end()
    assert wrapped() in (trainer.model, None)  # DDP's wrapper would hold the process group


if __name__ == "__main__":
    main()
