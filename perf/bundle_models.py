"""Makes what perf/check_engine.py runs: a random 4-layer decoder dense, 2:4-pruned and factorised, and its logits.

`bundle_models.py FOLDER` writes FOLDER/dense, 2-4 and pifa (ONNX, fp16, 25 MB together) and FOLDER/logits.npz: the
tokens of a prompt and one behind it, and the float32 logits of each model for both, by PyTorch. Needs no GPU.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from check_engine import LOGITS, PROMPT
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pifa_deploy.density import rank_for_density
from pifa_deploy.linear import PifaLinear
from pifa_deploy.model_folder import load_model
from pifa_deploy.onnx_export import ExportOptions, export_checkpoint
from pifa_deploy.sparse_checkpoint import SparseModule, SparsityRecord, write_sparsity
from pifa_deploy.transformers_quantizer import attach

DENSITY = 0.5
RANK_MULTIPLE = 8


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=512,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=4,
        num_attention_heads=10,
        num_key_value_heads=5,
        head_dim=32,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )


def random_model(kind: LlamaConfig, seed: int = 0) -> PreTrainedModel:
    """Returns a model whose linears keep the scale of their inputs, with logits of a spread of about 3."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(kind)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            scale = 3.0 if "lm_head" in name else 1.0
            nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)
    return model.half().eval()


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and ".layers." in name}


def save_sparse(model: PreTrainedModel, folder: Path) -> None:
    """Keeps the two larger weights of each four and writes the folder."""
    masks = {}
    for name, linear in linears(model).items():
        m, n = linear.weight.shape
        kept = linear.weight.view(m, n // 4, 4).abs().float().topk(2, dim=-1).indices
        masks[name] = torch.zeros(m, n // 4, 4, dtype=torch.bool).scatter_(2, kept, True).view(m, n)
        linear.weight.data[~masks[name]] = 0
    model.save_pretrained(folder)
    modules = {name: SparseModule(out_features=m.shape[0], in_features=m.shape[1]) for name, m in masks.items()}
    write_sparsity(folder, SparsityRecord(modules=modules, method="magnitude", details={}), masks)


def save_factorised(model: PreTrainedModel, folder: Path) -> None:
    """Puts random factors of the same scale in place of the weights; the pivots of every other linear are scattered."""
    for number, (name, linear) in enumerate(linears(model).items()):
        m, n = linear.weight.shape
        rank = rank_for_density(m, n, DENSITY, multiple=RANK_MULTIPLE)
        layer = PifaLinear(n, m, rank).half()
        nn.init.normal_(layer.pivot_weight, std=n**-0.5)
        nn.init.normal_(layer.coefficients, std=rank**-0.5)
        rows = torch.randperm(m)[:rank].sort().values if number % 2 else torch.arange(rank)
        layer.pivot_rows.copy_(rows)
        layer.derive_output_index()
        model.set_submodule(name, layer)
    attach(model, source="svd", density=DENSITY, details={})
    model.save_pretrained(folder)


def main(target: Path, kind: LlamaConfig | None = None) -> None:
    kind = kind or config()
    writers = {"dense": lambda m, f: m.save_pretrained(f), "2-4": save_sparse, "pifa": save_factorised}
    ids = torch.randint(kind.vocab_size, (1, PROMPT + 1), generator=torch.Generator().manual_seed(1))
    found: dict[str, np.ndarray] = {"input_ids": ids[0].numpy()}
    for name, write in writers.items():
        with tempfile.TemporaryDirectory() as scratch:
            write(random_model(kind), Path(scratch) / "model")
            export_checkpoint(Path(scratch) / "model", target / name, ExportOptions(dtype="fp16"))
            with torch.no_grad():
                found[name] = load_model(Path(scratch) / "model", dtype=torch.float32)(ids).logits[0].numpy()
    np.savez_compressed(target / LOGITS, **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
