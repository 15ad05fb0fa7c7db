"""`compress --method mpifa` on the GPU against the CPU: same factors, how much faster: bench_compress.py --out FILE.

The model is made on the spot: a small LLaMA with random weights whose singular values fall, as a trained model's do; of
a flat spectrum no two machines keep the same subspace. Needs a GPU; ends with 3 without.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pifa_deploy  # noqa: F401 - registers the checkpoint format with transformers

# Both runs round in float32; whitening squares the condition of a layer's inputs.
WEIGHT_TOLERANCE = 1e-2
ERROR_TOLERANCE = 1e-3
DECAY = 0.8


@dataclass(frozen=True, kw_only=True)
class Model:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    samples: int
    sequence_length: int


SMALL = Model(hidden=768, intermediate=2048, layers=3, heads=12, samples=16, sequence_length=512)


def make_model(folder: Path, model: Model) -> Path:
    """Writes a dense model and a tokenizer with one token a letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = [*string.ascii_letters, *string.digits, *" .,;:'\"-!?\n"]
    vocabulary = {"<unk>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads,
        max_position_embeddings=model.sequence_length,
    )
    torch.manual_seed(0)
    dense = LlamaForCausalLM(config)
    for module in dense.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            m, n = module.weight.shape
            falling = torch.arange(1, n + 1) ** -DECAY
            module.weight.data = torch.randn(m, n) * falling @ torch.linalg.qr(torch.randn(n, n))[0]
            module.weight.data *= m**0.5 / module.weight.norm()
    dense.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def compress_on(device: str, source: Path, target: Path, model: Model) -> dict[str, Any]:
    from pifa_deploy.calibration import CalibrationOptions, packaged_text
    from pifa_deploy.compression import CompressOptions, compress_model

    options = CompressOptions(
        density=0.5,
        method="mpifa",
        # Other layouts reorder features by the pivots, and the linears could not be compared one by one.
        layout="pivoted",
        calibration=(str(packaged_text("emma.txt")),),
        windows=CalibrationOptions(samples=model.samples, sequence_length=model.sequence_length),
        device=device,
    )
    began = time.perf_counter()
    summary = compress_model(source, target, options)
    return {"seconds": time.perf_counter() - began, "error": summary.error, "shares": dict(summary.shares)}


def products(folder: Path) -> dict[str, tuple[torch.Tensor, set[int]]]:
    """Returns by linear the matrix that its factors stand for, in float64, and its pivot rows."""
    from transformers import AutoModelForCausalLM

    from pifa_deploy.linear import PifaLinear

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    found = {}
    for name, module in loaded.named_modules():
        if isinstance(module, PifaLinear):
            eye = torch.eye(module.in_features, dtype=torch.float64)
            found[name] = (module.double()(eye).T.detach(), set(module.pivot_rows.tolist()))
    return found


def compare(first: Path, second: Path) -> dict[str, float]:
    """Returns how far two checkpoints of one model are apart: of the linears the worst."""
    a, b = products(first), products(second)
    if not a or a.keys() != b.keys():
        raise RuntimeError(f"{len(a)} and {len(b)} factorised linears, expected the same ones")
    apart = [float((a[name][0] - b[name][0]).norm() / a[name][0].norm()) for name in a]
    shared = [len(a[name][1] & b[name][1]) / len(a[name][1]) for name in a]
    return {"linears": len(a), "largest_relative_difference": max(apart), "least_share_of_same_pivots": min(shared)}


def judge(report: dict[str, Any]) -> list[str]:
    """Returns what is wrong; pivots may differ where two rows are as good."""
    errors = [report[device]["error"] for device in ("cpu", "cuda")]
    wrong = []
    if not report["factors"]["largest_relative_difference"] <= WEIGHT_TOLERANCE:
        found = report["factors"]["largest_relative_difference"]
        wrong.append(f"factors differ by {found:.1e}, expected at most {WEIGHT_TOLERANCE:.0e}")
    if not abs(errors[0] - errors[1]) <= ERROR_TOLERANCE * errors[0]:
        wrong.append(f"errors are {errors[0]:.6f} on the CPU and {errors[1]:.6f} on the GPU")
    return wrong


def run(folder: Path, model: Model, accelerator: str = "cuda") -> dict[str, Any]:
    dense = make_model(folder / "dense", model)
    report: dict[str, Any] = {"cuda": compress_on(accelerator, dense, folder / "cuda", model)}
    report["cpu"] = compress_on("cpu", dense, folder / "cpu", model)
    report["threads"] = torch.get_num_threads()
    report["factors"] = compare(folder / "cpu", folder / "cuda")
    report["speed_up"] = report["cpu"]["seconds"] / report["cuda"]["seconds"]
    return report | {"wrong": judge(report)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: not decided")
        return 3
    with tempfile.TemporaryDirectory() as folder:
        report = run(Path(folder), SMALL)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    factors = report["factors"]
    print(
        f"compress: GPU {report['cuda']['seconds']:.1f} s, CPU {report['cpu']['seconds']:.1f} s; "
        f"largest difference of {factors['linears']} linears {factors['largest_relative_difference']:.1e}"
        + "".join(f"; {each}" for each in report["wrong"])
    )
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
