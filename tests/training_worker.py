"""A tiny training in a process of its own, for tests that kill it or run two: `FOLDER JSON-OPTIONS [FLAG …]`.

`resume` goes on from the last checkpoint; `twice` trains again from `checkpoint-2`, into `FOLDER/resumed`.
"""

import json
import sys
import weakref
from pathlib import Path

from peft import LoraConfig
from transformers.trainer_utils import get_last_checkpoint

from tests.test_masked_diffusion_sft_trainer import make_trainer, tiny_model


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    adapters = LoraConfig(**options.pop("lora")) if "lora" in options else None
    trainer = make_trainer(folder, peft_config=adapters, **options)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if "resume" in sys.argv else None)
    trainer.save_model()
    if trainer.is_world_process_zero():
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        (folder / "losses.json").write_text(json.dumps(losses))
    if "twice" in sys.argv:
        model = tiny_model(seed=0 if adapters else 5)  # what is resumed does not depend on the weights it starts from
        trainer = make_trainer(folder / "resumed", model=model, peft_config=adapters, **options)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        trainer.save_model()
    wrapped = weakref.ref(trainer.model_wrapped)
    trainer.end()
    assert wrapped() in (trainer.model, None)  # DDP's wrapper would hold the process group


if __name__ == "__main__":
    main()
