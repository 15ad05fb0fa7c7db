"""A small model with a tokenizer that really reads English, its artefacts, and the command line in process."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config

from pifa_deploy.calibration import CALIBRATION_TEXT, packaged_text

SIZES = {
    "vocab_size": 384,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}
CHAT_TEMPLATE = "{% for message in messages %}Q: {{ message['content'] }}\n{% endfor %}A:"
Q_PROJ = "model.layers.0.self_attn.q_proj"
SINGLE = "model.safetensors"


def passage(name: str, characters: int) -> str:
    """Returns text from the middle of a packaged book."""
    text = packaged_text(name).read_text(encoding="utf-8")
    return text[len(text) // 2 :][:characters]


@functools.cache
def tokenizer_json() -> str:
    """Returns a byte-level BPE tokenizer of 384 tokens that was trained on the packaged text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([passage(CALIBRATION_TEXT, 40_000)], trainer)
    return str(tokenizer.to_str())


def small_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json()), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def small_model(kind: str = "llama", **changes: Any) -> Any:
    """Returns a random model whose features differ in size, as those of trained models do; biases are not zero."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(FAMILIES[kind](**{**SIZES, **changes}), dtype=torch.float32)
        scale = torch.logspace(0.5, -1.5, SIZES["hidden_size"])
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
            elif "norm" in name:
                parameter.data *= scale
            else:
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


def save_dense(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    small_model(kind, **changes).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Outcome:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    def failed(self, code: int, pattern: str) -> None:
        """Asserts exit code, one error line that matches, no traceback, nothing else but stages, layers and notes."""
        assert self.code == code, self.err
        assert len(self.errors) == 1, self.err
        assert re.search(pattern, self.errors[0]), self.errors[0]
        assert "Traceback" not in self.out + self.err
        # transformers' bar while it saves: shown to people, and in a test process that was not started for a log file.
        lines = [line for line in self.err.splitlines() if line and not line.startswith("Writing model shards:")]
        others = [line for line in lines if line not in self.errors]
        assert all(re.search(r": \d+\.\d s$|^layer \d+/\d+: |^note: ", line) for line in others), self.err


def content(folder: Path) -> dict[str, str]:
    """Returns relative path -> SHA-256 of every file below a folder, hidden ones too; folders map to ""."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


# Changes to a copied folder.


def change_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        held = load_file(folder / SINGLE)
        changed = change(held.pop(name))
        save_file(held if changed is None else {**held, name: changed}, folder / SINGLE, metadata={"format": "pt"})

    return corrupt


def change_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return corrupt


def with_entry(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


def write(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, part: float) -> Callable[[Path], Any]:
    def corrupt(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * part)])

    return corrupt


def shard_elsewhere(folder: Path) -> None:
    """Moves the weights out of the folder and lets an index point there."""
    names = list(load_file(folder / SINGLE))
    (folder / SINGLE).rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (folder / f"{SINGLE}.index.json").write_text(json.dumps(index))
