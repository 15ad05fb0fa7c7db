"""Is an ONNX folder the model it was exported from? fp32 PyTorch against ONNX Runtime on real text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from pifa_deploy.calibration import HELD_OUT_TEXT, packaged_text, read_texts, token_ids
from pifa_deploy.digest import model_sha256
from pifa_deploy.errors import InputRefusedError
from pifa_deploy.layouts import low_rank_pair
from pifa_deploy.linear import LowRankLinear
from pifa_deploy.model_folder import load_model, load_tokenizer, torch_dtype
from pifa_deploy.onnx_folder import OnnxFolder, open_folder
from pifa_deploy.parity import Comparison, Difference, Gates, Verdict, gates_for, json_figures, judge, to_json
from pifa_deploy.runners import FloatArray, IntArray, OnnxRuntimeRunner, Runner, Step, TorchRunner
from pifa_deploy.transformers_quantizer import factorised_modules


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What to compare and how strictly.

    Attributes:
        text: UTF-8 files; the packaged held-out text when empty.
        prefill_lengths: prompts run on their own, in tokens.
        padded_lengths: prompts run as one batch, padded on the left to the longest.
        decode_prompt: tokens before the teacher-forced decode steps.
        decode_steps: number of single-token steps through the cache.
        gates: limits; those of the ONNX folder's dtype when None.
    """

    text: tuple[Path, ...] = ()
    prefill_lengths: tuple[int, ...] = (1, 17, 128, 512)
    padded_lengths: tuple[int, ...] = (40, 96, 71)
    decode_prompt: int = 64
    decode_steps: int = 32
    gates: Gates | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for lengths below 1."""
        lengths = (*self.prefill_lengths, *self.padded_lengths, self.decode_prompt)
        if not self.prefill_lengths or min(lengths) < 1 or self.decode_steps < 0:
            raise ValueError(f"lengths are {lengths} and decode_steps {self.decode_steps}, expected at least 1 and 0")

    def tokens_needed(self) -> int:
        """Returns how long the text must be."""
        return max(*self.prefill_lengths, sum(self.padded_lengths), self.decode_prompt + self.decode_steps)


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Figures and decisions of one verification; true when every gate passed."""

    dtype: str
    cases: tuple[Difference, ...]
    overall: Difference
    low_rank: Difference | None
    gates: Gates
    verdict: Verdict

    def __bool__(self) -> bool:
        return bool(self.verdict)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON values; it can be judged again with other gates."""
        return {
            "passed": bool(self),
            "dtype": self.dtype,
            **to_json(self.cases, self.overall),
            "low_rank": json_figures(self.low_rank) if self.low_rank else None,
            "gates": asdict(self.gates),
            "decisions": [json_figures(gate) for gate in self.verdict.gates],
        }


def verify_folder(onnx: Path | str, reference: Path | str, options: VerifyOptions) -> VerifyReport:
    """Compares an ONNX folder in ONNX Runtime with the fp32 PyTorch model of a checkpoint.

    Args:
        onnx: the ONNX folder.
        reference: the checkpoint it was exported from.
        options: see VerifyOptions.

    Raises:
        InputRefusedError: a malformed input, a text that is too short, or a checkpoint that is not the
            ONNX folder's source.
        MissingCapabilityError: the installed ONNX Runtime cannot run the graph: nothing was decided.
    """
    folder = open_folder(onnx)
    _check_source(folder, Path(reference))
    gates = options.gates or gates_for(folder.dtype)
    candidate = OnnxRuntimeRunner(folder)
    model = load_model(reference, dtype=torch.float32)
    ids = _tokens(reference, options)
    twin = low_rank_twin(model, torch_dtype(folder.dtype)) if gates.low_rank_ratio is not None else None
    found, floor = measure(TorchRunner(model), candidate, twin and TorchRunner(twin), ids, options)
    overall = found.overall()
    low_rank = floor.overall() if floor else None
    return VerifyReport(
        dtype=folder.dtype,
        cases=tuple(found.cases),
        overall=overall,
        low_rank=low_rank,
        gates=gates,
        verdict=judge(overall, gates, low_rank=low_rank),
    )


def measure(
    reference: Runner, candidate: Runner, twin: Runner | None, ids: IntArray, options: VerifyOptions
) -> tuple[Comparison, Comparison | None]:
    """Runs every case through all runners; returns the candidate's figures and the low-rank twin's."""
    found, floor = Comparison(), Comparison() if twin else None
    steps = list(cases(ids, options))
    caches: list[Any] = [None, None, None]
    for name, inputs in tqdm(steps, desc="verify", unit="step", disable=None, leave=False):
        if inputs.starts:
            caches = [None, None, None]
        expected, caches[0] = reference.step(inputs, caches[0])
        logits, caches[1] = candidate.step(inputs, caches[1])
        found.add(name, _visible(expected, inputs), _visible(logits, inputs))
        if twin and floor:
            logits, caches[2] = twin.step(inputs, caches[2])
            floor.add(name, _visible(expected, inputs), _visible(logits, inputs))
    return found, floor


def cases(ids: IntArray, options: VerifyOptions) -> Iterator[tuple[str, Step]]:
    """Yields (name, step): prefills, a padded batch, then a prompt and decode steps that share one cache."""
    for length in options.prefill_lengths:
        yield f"prefill {length}", Step.after(0, ids[:length])
    if options.padded_lengths:
        yield f"padded batch {'+'.join(map(str, options.padded_lengths))}", _padded(ids, options.padded_lengths)
    if options.decode_steps:
        yield f"prompt {options.decode_prompt}", Step.after(0, ids[: options.decode_prompt])
        for past in range(options.decode_prompt, options.decode_prompt + options.decode_steps):
            yield f"decode at {past}", Step.after(past, ids[past : past + 1])


def low_rank_twin(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel | None:
    """Returns the same function with every PIFA layer stored as the balanced SVD pair U, V, in `dtype`.

    It shows what rounding costs the stock low-rank format of the very same matrices. None for a model
    without PIFA layers.
    """
    import copy

    layers = {name: layer for name, layer in factorised_modules(model).items() if not isinstance(layer, LowRankLinear)}
    if not layers:
        return None
    # Only what is not replaced has to be copied.
    memo = {id(layer): layer for layer in layers.values()}
    twin = copy.deepcopy(model, memo)
    for name, layer in tqdm(layers.items(), desc="low-rank twin", unit="layer", disable=None, leave=False):
        u, v = _balanced(*low_rank_pair(layer))
        bias = None if layer.bias is None else layer.bias.detach().clone()
        twin.set_submodule(name, LowRankLinear.from_pair(u.to(dtype), v.to(dtype), bias))
    return twin.to(dtype).eval()


def _balanced(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the pair of the same product that shares its singular values evenly between the two."""
    basis, triangle = torch.linalg.qr(left)
    u, s, v = torch.linalg.svd(triangle @ right, full_matrices=False)
    root = s.sqrt()
    return (basis @ u) * root, root[:, None] * v


def _check_source(folder: OnnxFolder, reference: Path) -> None:
    expected = folder.manifest.get("source_sha256")
    if expected and reference.exists() and model_sha256(reference) != expected:
        raise InputRefusedError(
            f"{folder.path / 'pifa.json'}: was exported from a checkpoint with hash {expected[:12]}…, "
            f"{reference} has another; name the checkpoint it came from or export again"
        )


def _tokens(reference: Path | str, options: VerifyOptions) -> IntArray:
    paths = options.text or (packaged_text(HELD_OUT_TEXT),)
    ids = token_ids(read_texts(paths), load_tokenizer(reference))
    if len(ids) < options.tokens_needed():
        raise InputRefusedError(
            f"{', '.join(map(str, paths))}: {len(ids)} tokens, verification needs {options.tokens_needed()}"
        )
    tokens: IntArray = ids.numpy()
    return tokens


def _padded(ids: IntArray, lengths: tuple[int, ...]) -> Step:
    width = max(lengths)
    shape = (len(lengths), width)
    step = Step(
        input_ids=np.full(shape, ids[0]),
        attention_mask=np.zeros(shape, np.int64),
        position_ids=np.zeros(shape, np.int64),
    )
    start = 0
    for row, length in enumerate(lengths):
        step.input_ids[row, width - length :] = ids[start : start + length]
        step.attention_mask[row, width - length :] = 1
        step.position_ids[row, width - length :] = np.arange(length)
        start += length
    return step


def _visible(logits: FloatArray, inputs: Step) -> FloatArray:
    """Returns the logits [positions, vocabulary] of the tokens that are not padding."""
    rows: FloatArray = logits[inputs.attention_mask[:, -logits.shape[1] :] == 1]
    return rows
