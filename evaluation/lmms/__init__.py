"""The plug-in for lmms-eval: this model under the name `llada_medv`, and medical VQA tasks scored as everywhere here.

    pip install ".[lmms]"    # in the folder of the sources
    lmms-eval --model llada_medv --model_args pretrained=FOLDER_OR_HUB_ID --tasks lladamedv_vqa --batch_size 8 \\
        --include_path "$(python -c 'from lladamedv.evaluation.lmms import TASKS; print(TASKS)')"

lmms-eval finds `manifest` by the entry point group `lmms_eval.models`. Nothing else here is imported until it asks for
the model or for a task.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

TASKS = Path(__file__).parent / "tasks"


def manifest() -> ModelManifest:
    """What lmms-eval needs to know about the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="llada_medv", chat_class_path=f"{__name__}.model.LLaDAMedV")


__all__ = ["TASKS", "manifest"]
