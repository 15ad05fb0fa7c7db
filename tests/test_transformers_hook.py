"""transformers understands PIFA checkpoints, whichever of the two is imported first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

LOAD = """
import sys, torch
folder, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
assert sum(type(module).__name__ == "PifaLinear" for module in model.modules()) == 14
torch.save(model(torch.arange(1, 9)[None]).logits, out)
"""

ORDERS = {
    "before": "import pifa_deploy\nassert 'transformers' not in sys.modules\nimport transformers\n",
    "after": "import transformers\nfrom transformers import PreTrainedModel\nimport pifa_deploy\n",
}


@pytest.mark.parametrize("order", ORDERS)
def test_checkpoints_load_wherever_the_import_stands(
    order: str, pifa_checkpoint: Callable[..., Path], pifa_model: Callable[..., torch.nn.Module], tmp_path: Path
) -> None:
    code = "import sys\n" + ORDERS[order] + LOAD
    done = subprocess.run(
        [sys.executable, "-c", code, str(pifa_checkpoint()), str(tmp_path / "logits")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = pifa_model()(torch.arange(1, 9)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits"), expected)


def test_a_lazy_import_of_transformers_before_still_waits_for_the_model_classes() -> None:
    code = (
        "import sys, transformers\n"
        "import pifa_deploy\n"
        "waiting = 'transformers.modeling_utils' not in sys.modules\n"
        "assert waiting != ('pifa_deploy.transformers_quantizer' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_installing_twice_adds_one_finder() -> None:
    code = (
        "import sys, importlib, pifa_deploy\n"
        "from pifa_deploy import transformers_hook\n"
        "count = len(sys.meta_path)\n"
        "transformers_hook.install()\n"
        "assert len(sys.meta_path) == count\n"
        "importlib.reload(pifa_deploy)\n"
        "assert len(sys.meta_path) == count\n"
        "assert not [name for name in sys.modules if name.startswith('transformers')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_installing_when_transformers_is_loaded_registers_once() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    from pifa_deploy import transformers_hook, transformers_quantizer

    transformers_hook.install()
    assert AUTO_QUANTIZER_MAPPING["pifa"] is transformers_quantizer.PifaQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["pifa"] is transformers_quantizer.PifaConfig
