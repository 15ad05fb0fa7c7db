"""lm-eval's tasks on checkpoints and ONNX folders, under the model name "pifa".

    python -m pifa_deploy.lm_eval_adapter run --model pifa --model_args path=ckpt --tasks arc_easy

lm-eval has no entry points for models of other packages; this runs its own command line after `register()`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig
from transformers.modeling_outputs import CausalLMOutput

from pifa_deploy.checkpoint import read_json_object
from pifa_deploy.contenders import is_onnx, onnx_parameters, runner_logits, tokenizer_place
from pifa_deploy.decoder_step import Step
from pifa_deploy.errors import MissingCapabilityError, PifaDeployError
from pifa_deploy.model_folder import load_model, load_tokenizer, torch_dtype
from pifa_deploy.onnx_folder import OnnxFolder, open_folder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner

NAME = "pifa"
_GENERATION_FILE = "generation_config.json"
# What lm-eval passes to `generate` and what a greedy choice does not depend on.
_GREEDY_OPTIONS = {"use_cache", "temperature", "top_p", "top_k", "min_p"}

Stop = Callable[[torch.Tensor, None], torch.Tensor]


def register() -> type[Any]:
    """Makes "pifa" known to lm-eval in this process and returns the class; again: the same class.

    The class is lm-eval's HFLM on a model that this package loads. Its arguments: `path` (a checkpoint as `load_model`
    takes it, or an ONNX folder), `dtype` ("fp32" when left out, "fp16", "bf16"; an ONNX folder has its own), and HFLM's
    `device`, `batch_size`, `max_batch_size`, `max_length` and `add_bos_token`.

    Raises:
        MissingCapabilityError: lm-eval or accelerate is not installed.
    """
    try:
        from lm_eval.api.registry import MODEL_REGISTRY, register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MissingCapabilityError(f"lm-eval does not load ({error}); pip install 'pifa-deploy[lm-eval]'") from error
    if NAME in MODEL_REGISTRY:
        known: type[Any] = MODEL_REGISTRY[NAME]
        return known
    made = _subclass(HFLM)
    register_model(NAME)(made)
    return made


def open_model(path: str, *, dtype: str | None = None, device: str = "cpu") -> Any:
    """Returns a transformers model, or an OnnxModel, which lm-eval uses as one.

    Args:
        path: see `register`.
        dtype: see `register`.
        device: of a checkpoint; as in HFLM the CPU stands in for a GPU that torch does not find, because lm-eval's
            command line asks for one by default. ONNX folders run on the CPU.

    Raises:
        ValueError: a dtype that does not exist, or another one than an ONNX folder has.
        PifaDeployError: as `is_onnx`, `load_model`, `open_folder` and `OnnxRuntimeRunner`.
    """
    if not is_onnx(path):
        model = load_model(path, dtype=torch_dtype(dtype or "fp32"))
        return model.to(device if torch.cuda.is_available() else "cpu")
    folder = open_folder(path)
    if dtype not in (None, folder.dtype):
        raise ValueError(f"dtype is {dtype!r}, {path} is {folder.dtype}; leave dtype out")
    return OnnxModel(folder)


class OnnxModel:
    """An ONNX folder with as much of a transformers model as lm-eval calls.

    Attributes:
        config: of the model.
        device: the CPU.
        dtype: "fp32" or "fp16".
    """

    def __init__(self, folder: OnnxFolder) -> None:
        """Loads the graph, with as many threads as torch has."""
        self.config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
        self.device = torch.device("cpu")
        self.dtype = folder.dtype
        self._parameters = onnx_parameters(folder)
        self._end = _end_tokens(folder.path, self.config)
        self._runner = OnnxRuntimeRunner(folder, threads=torch.get_num_threads())
        self._logits = runner_logits(self._runner)

    def num_parameters(self) -> int:
        """Returns the numbers in the weights."""
        return self._parameters

    def __call__(self, input_ids: torch.Tensor) -> CausalLMOutput:
        """Returns float32 logits [batch, sequence, vocabulary] of ids [batch, sequence] without padding on the left."""
        return CausalLMOutput(logits=self._logits(input_ids))

    def generate(
        self,
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        max_length: int,
        stopping_criteria: Stop,
        pad_token_id: int,
        do_sample: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        """Continues prompts by the likeliest token each time.

        Args:
            input_ids: int64 [batch, sequence], padded on the left.
            attention_mask: int64 [batch, sequence], 0 hides padding.
            max_length: tokens, the prompt included.
            stopping_criteria: which rows are finished, told by the ids so far.
            pad_token_id: fills a row behind its end.
            do_sample: must be False.
            options: must be such that the likeliest token does not depend on them.

        Returns:
            int64 [batch, up to max_length].

        Raises:
            ValueError: another way to choose tokens was asked for.
        """
        _check_greedy(do_sample, options)
        ids, new, mask, cache = input_ids, input_ids, attention_mask, None
        ended = torch.zeros(len(ids), dtype=torch.bool)
        while ids.shape[1] < max_length and not bool(ended.all()):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            step = Step(input_ids=new.numpy(), attention_mask=mask.numpy(), position_ids=positions.numpy())
            logits, cache = self._runner.step(step, cache)
            best = torch.from_numpy(logits[:, -1].argmax(-1).astype(np.int64))
            new = torch.where(ended, pad_token_id, best)[:, None]
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
            ended |= torch.isin(new[:, 0], self._end) | torch.as_tensor(stopping_criteria(ids, None))
        return ids


def main() -> None:
    """Runs lm-eval's command line with "pifa" among its models."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except PifaDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _subclass(base: type[Any]) -> type[Any]:
    """Returns the class of `register`; `base` is lm-eval's HFLM, which may not be installed."""

    class PifaLM(base):  # type: ignore[misc]
        """See `register`."""

        def __init__(
            self,
            path: str,
            dtype: str | None = None,
            device: str = "cuda",
            batch_size: int | str = 1,
            max_batch_size: int = 64,
            max_length: int | None = None,
            add_bos_token: bool | None = None,
        ) -> None:
            super().__init__(
                pretrained=open_model(path, dtype=dtype, device=device),
                tokenizer=load_tokenizer(tokenizer_place(path)),
                backend="causal",
                batch_size=batch_size,
                max_batch_size=max_batch_size,
                max_length=max_length,
                add_bos_token=add_bos_token,
            )

    return PifaLM


def _check_greedy(do_sample: bool, options: Mapping[str, Any]) -> None:
    other = sorted(options.keys() - _GREEDY_OPTIONS)
    if do_sample or other:
        raise ValueError(f"generation asks for {other[0] if other else 'do_sample'}; ONNX folders generate greedily")


def _end_tokens(folder: Path, config: Any) -> torch.Tensor:
    """Returns the tokens that end a text, from where transformers takes them."""
    file = folder / _GENERATION_FILE
    found = read_json_object(file).get("eos_token_id") if file.is_file() else None
    found = config.eos_token_id if found is None else found
    return torch.tensor([] if found is None else found, dtype=torch.int64).flatten()


if __name__ == "__main__":
    main()
