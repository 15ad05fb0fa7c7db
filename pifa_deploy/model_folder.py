"""A causal language model on disk (Hugging Face folder, PIFA checkpoint, GGUF file, hub name) and in memory."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pifa_deploy import transformers_quantizer  # noqa: F401 - registers the "pifa" method
from pifa_deploy.checkpoint import FLOATS, read_config, tensor_files
from pifa_deploy.errors import (
    InputMissingError,
    InputRefusedError,
    MissingCapabilityError,
    PifaDeployError,
    StageFailedError,
    first_line,
)
from pifa_deploy.op_spec import DTYPE_FLAGS
from pifa_deploy.sparse_checkpoint import is_sparse, validate_sparsity
from pifa_deploy.tokenizer_files import CONFIG_FILE, GENERATION_FILE, TOKENIZER_FILES, copy_files

HUB_PREFIX = "hf:"
_GGUF_MAGIC = b"GGUF"
# With a repository in one of these transformers fetches and runs a kernel, whatever trust_remote_code says.
_CODE_FIELDS = ("attn_implementation", "_attn_implementation", "experts_implementation", "kernel_config")


def torch_dtype(flag: str) -> torch.dtype:
    """Returns the torch dtype of "fp32", "fp16" or "bf16"; raises ValueError for another word."""
    if flag not in DTYPE_FLAGS:
        raise ValueError(f"dtype is {flag!r}, expected one of {', '.join(DTYPE_FLAGS)}")
    dtype: torch.dtype = getattr(torch, DTYPE_FLAGS[flag])
    return dtype


def load_model(source: Path | str, *, dtype: torch.dtype | None) -> PreTrainedModel:
    """Loads a causal LM on the CPU in eval mode, every tensor accounted for.

    Args:
        source: a model folder (dense, 2:4-pruned or PIFA checkpoint), a .gguf file, or "hf:ORG/NAME" for the hub.
        dtype: dtype of all weights; as stored when None, and then the weights of a folder are views of its mapped
            files, in memory only while they are read. A GGUF file has none but float32.

    Raises:
        InputMissingError: no such file or folder.
        InputRefusedError: malformed, a tensor missing or left over, a weight that is not finite in `dtype`, or one
            that a 2:4-pruned model records as zero and is not.
        MissingCapabilityError: a GGUF file without the packages that read it.
    """
    place, options = _location(source)
    if isinstance(place, Path) and "gguf_file" not in options and is_sparse(place):
        validate_sparsity(place)
    with _quiet_loading(), _as_refusal(source):
        # Sizes that do not match are reported like the other keys; the loader's own error names no tensor.
        stored = torch.float32 if "gguf_file" in options else "auto"
        model, info = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=dtype or stored,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            **options,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(_key_text(key) for key in info.get(kind) or ())
        if names:
            raise InputRefusedError(
                f"{source}: {kind.replace('_', ' ')}: {names[0]} ({len(names)} in all); "
                f"expected exactly the tensors of {type(model).__name__}"
            )
    check_finite(model, str(source))
    if "gguf_file" in options:
        _forget_quantization(model)
    return model.eval()


def check_finite(model: PreTrainedModel, where: str, *, dtype: torch.dtype | None = None) -> None:
    """Raises InputRefusedError naming a weight that is NaN or Inf, perhaps only in `dtype`; None: the model's."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.to(dtype or tensor.dtype)).all()):
            raise InputRefusedError(
                f"{where}: {name} has NaN or Inf entries in {dtype or tensor.dtype}; expected finite weights, "
                "a wider dtype may hold them"
            )


def _key_text(key: Any) -> str:
    """Returns the name of a tensor that was not loaded; of one of the wrong size both shapes too."""
    if isinstance(key, str):
        return key
    name, found, expected = key
    return f"{name} is {tuple(found)}, the configuration says {tuple(expected)}"


def load_tokenizer(source: Path | str) -> Any:
    """Returns the tokenizer of a model location as `load_model` takes it.

    Raises:
        InputRefusedError: there is none.
    """
    place, options = _location(source)
    with _quiet_loading(), _as_refusal(f"tokenizer of {source}"):
        return AutoTokenizer.from_pretrained(place, **options)


def hub_commit(source: Path | str) -> str | None:
    """Returns the commit that a loaded "hf:ORG/NAME" was at, None for another location or where no cache tells.

    transformers 5.23 no longer leaves it in the configuration; the hub's cache names its folders by it.
    """
    if not str(source).startswith(HUB_PREFIX):
        return None
    found = try_to_load_from_cache(str(source)[len(HUB_PREFIX) :], CONFIG_FILE)
    return Path(found).parent.name if isinstance(found, str) else None


def save_tokenizer(source: Path | str, target: Path) -> bool:
    """Puts the tokenizer files and chat template of `source` beside a new artefact; False if it has none."""
    place, options = _location(source)
    if isinstance(place, str) or "gguf_file" in options:
        load_tokenizer(source).save_pretrained(target)
        return True
    return any(name != GENERATION_FILE for name in copy_files(place, target, TOKENIZER_FILES))


def _location(source: Path | str) -> tuple[Path | str, dict[str, Any]]:
    """Returns what `from_pretrained` takes: place and extra options."""
    # Code that comes with a model is never run, and nobody is asked whether it should be.
    options: dict[str, Any] = {"trust_remote_code": False}
    if str(source).startswith(HUB_PREFIX):
        return str(source)[len(HUB_PREFIX) :], options
    path = Path(source)
    if path.is_file():
        with path.open("rb") as stream:
            magic = stream.read(4)
        if magic != _GGUF_MAGIC:
            raise InputRefusedError(f"{path}: starts with {magic!r}, expected a model folder or a GGUF file")
        return path.parent, {**options, "gguf_file": path.name}
    if not path.is_dir():
        raise InputMissingError(f"{path}: no such file or folder; give a model folder, a .gguf file or hf:ORG/NAME")
    config = read_config(path)
    for field in _CODE_FIELDS:
        if "/" in str(config.get(field) or ""):
            raise InputRefusedError(
                f"{path / 'config.json'}: {field} is {config[field]!r}, code from a hub, which is never loaded; "
                "remove it"
            )
    if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        files = tensor_files(path)
        if "quantization_config" not in config:
            _refuse_integers(files)
    return path, options


def _refuse_integers(files: Mapping[str, Path]) -> None:
    """Raises InputRefusedError for a dense weight of integers, which a load would turn into floats silently."""
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                dtype = file.get_slice(name).get_dtype()
                if name.endswith((".weight", ".bias")) and dtype not in FLOATS:
                    raise InputRefusedError(f"{path}: {name} is {dtype}, expected {'/'.join(sorted(FLOATS))}")


def _forget_quantization(model: PreTrainedModel) -> None:
    """Removes the marks of a GGUF load: the weights are plain floats now and can be saved."""
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer.remove_quantization_config(model)
    for owner, name in ((model.config, "quantization_config"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False


@contextlib.contextmanager
def _as_refusal(source: Path | str) -> Iterator[None]:
    """Turns what the loaders raise on bad files into one line that names the source."""
    try:
        yield
    except PifaDeployError:
        raise
    except ImportError as error:
        advice = "; pip install 'pifa-deploy[demo]' reads GGUF" if str(source).endswith(".gguf") else ""
        raise MissingCapabilityError(
            f"{source} needs a package that is not installed ({first_line(error)}){advice}"
        ) from error
    except MemoryError as error:
        raise StageFailedError(f"{source}: not enough memory to load it; use a machine with more") from error
    except Exception as error:
        if HUB_PREFIX in str(source) and isinstance(error, OSError):
            raise MissingCapabilityError(f"{source}: not to be had from the hub ({first_line(error)})") from error
        raise InputRefusedError(f"{source}: could not be loaded ({first_line(error)})") from error


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Holds back transformers' progress bars and load reports; what matters of them is raised."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
