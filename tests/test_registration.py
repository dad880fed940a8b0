"""`import lladamedv` registers the Auto classes in whatever order things are imported, and loads no PyTorch itself."""

import subprocess
import sys

import pytest


CHECK = """
import lladamedv
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

config = AutoConfig.for_model("lladamedv")
assert type(config) is lladamedv.LLaDAMedVConfig
assert AutoModelForImageTextToText._model_mapping[type(config)] is lladamedv.LLaDAMedVForConditionalGeneration
"""


@pytest.mark.parametrize(
    "first",
    [
        "import lladamedv",
        pytest.param("import transformers, lladamedv", marks=pytest.mark.slow),
        pytest.param("import lladamedv.trainers", marks=pytest.mark.slow),
        "import sys, lladamedv; [sys.modules.pop(name) for name in [*sys.modules] if name.startswith('lladamedv')]",
        # Modules of Transformers that import the Auto classes while they are imported themselves.
        pytest.param(
            "import lladamedv; from transformers import LlamaForCausalLM, LlavaOnevisionForConditionalGeneration",
            marks=pytest.mark.slow,
        ),
        # Ours, which import Transformers while they are imported.
        pytest.param(
            "from lladamedv.modeling_lladamedv.generation_config_lladamedv import LLaDAMedVGenerationConfig",
            marks=pytest.mark.slow,
        ),
        "from lladamedv.processing.processing_lladamedv import LLaDAMedVProcessor",
    ],
)
def test_every_order_of_imports_registers(first, tmp_path):
    """In a script of the name of the command line, which once was taken for it."""
    script = tmp_path / "lladamedv.py"
    script.write_text(f"import sys\nsys.path.pop(0)\n{first}\n{CHECK}")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_no_library(tmp_path):
    code = "import sys, lladamedv; assert not {'torch', 'transformers', 'numpy', 'PIL'} & {*sys.modules}"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
