"""Compressing takes memory for one decoder layer and its activations: the weights stay in their files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_fixtures import passage, save_dense, small_model, small_tokenizer

from pifa_deploy.calibration import HELD_OUT_TEXT
from pifa_deploy.compression import ActivationOptions, CompressOptions
from pifa_deploy.compression.distributed import Processes
from pifa_deploy.compression.flow import open_flows
from pifa_deploy.density import rank_for_density
from pifa_deploy.model_folder import load_model

WIDE = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 8}
LAYERS, WINDOWS, LENGTH, BATCH_TOKENS = 6, 32, 512, 4096


# Where the weights are


def mapped_ranges(folder: Path) -> list[range]:
    """Returns the addresses at which this process sees the files of a folder."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, place = line.split(maxsplit=5)
        if Path(place).parent == folder:
            start, end = (int(part, 16) for part in addresses.split("-"))
            found.append(range(start, end))
    return found


def assert_mapped(model: Any, folder: Path) -> None:
    ranges = mapped_ranges(folder)
    for name, parameter in model.named_parameters():
        assert any(parameter.data_ptr() in addresses for addresses in ranges), name


@pytest.fixture(scope="module", params=["fp32", "bf16", "fp32 in shards", "bf16 in shards"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mapped")
    model = small_model().to(torch.bfloat16 if request.param.startswith("bf16") else torch.float32)
    model.save_pretrained(place, max_shard_size="40KB" if request.param.endswith("shards") else "1GB")
    assert (len(list(place.glob("*.safetensors"))) > 1) == request.param.endswith("shards")
    return place


def test_a_loaded_weight_is_a_view_of_its_file(folder: Path) -> None:
    model = load_model(folder, dtype=None)
    assert_mapped(model, folder)
    assert {parameter.dtype for parameter in model.parameters()} == {model.config.dtype}


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_views_of_their_file_again_when_activations_have_entered(tied: bool, tmp_path: Path) -> None:
    save_dense(tmp_path, tie_word_embeddings=tied)
    model = load_model(tmp_path, dtype=None)
    alone = Processes(rank=0, count=1, device=torch.device("cpu"))
    options = CompressOptions(calibration=("text",), activations=ActivationOptions(batch_tokens=32))
    with open_flows(model, torch.arange(96).view(3, 32), options, group=alone) as flows:
        assert_mapped(model, tmp_path)
        assert flows.numbers == (0, 1, 2)
    assert_mapped(model, tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


# How much memory there is beside them

PEAK = """
import json, sys, threading, time
from pathlib import Path
import torch
from pifa_deploy import compression
from pifa_deploy.calibration import CalibrationOptions

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024

def sample():
    while True:
        name, size = step[0], anonymous() - base
        if name == step[0]:
            peaks[name] = max(peaks.get(name, 0), size)
        time.sleep(0.002)

source, out, options = json.loads(sys.argv[1])
windows = CalibrationOptions(**options.pop("windows"))
activations = options.pop("activations")
activations["folder"] = Path(activations["folder"]) if activations.get("folder") else None
activations = compression.ActivationOptions(**activations)
chosen = compression.CompressOptions(windows=windows, activations=activations, **options)
write = compression.write_result

def writing(*args):
    step[0] = "write"
    return write(*args)

compression.write_result = writing
step, peaks, base = ["compress"], {}, anonymous()
threading.Thread(target=sample, daemon=True).start()
summary = compression.compress_model(source, out, chosen)
print(json.dumps({"activation_bytes": summary.activation_bytes, **peaks}))
"""


def peaks(source: Path, out: Path, **options: Any) -> dict[str, int]:
    """Returns step -> most bytes of anonymous memory above what the imports take, of a compression on its own."""
    # Every array in pages of its own, as the arrays of a large model are: what is freed is gone.
    environment = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, json.dumps([str(source), str(out), options])],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


def wide_model(folder: Path, **changes: Any) -> Path:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=384, num_hidden_layers=LAYERS, max_position_embeddings=1024, **WIDE)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, dtype=changes.get("dtype", torch.float32))
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder, max_shard_size=changes.get("max_shard_size", "10GB"))
    small_tokenizer().save_pretrained(folder)
    return folder


def needed(tokens: int, batch_tokens: int, sizes: dict[str, int], itemsize: int) -> dict[str, int]:
    """Returns the parts of docs/compression's estimate for method mpifa, in bytes."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    layer = 4 * hidden**2 + 3 * hidden * inner
    return {
        "layers": 2 * 4 * layer,
        "activations": tokens * itemsize * (2 * hidden + 3 * hidden + inner),
        "kept": tokens * itemsize * 3 * hidden,
        "moments": 28 * inner**2,
        "solver": 8 * 8 * inner**2,
        "batch": 4 * batch_tokens * (10 * hidden + 4 * inner),
    }


def placing(sizes: dict[str, int], rank: int) -> int:
    """Returns what placing the pivots of one MLP takes: U and V of three matrices, a basis each, five more of one."""
    return 8 * 12 * sizes["intermediate_size"] * rank


def estimate(parts: dict[str, int], *, on_disk: bool) -> int:
    held, kept = (0, 0) if on_disk else (parts["activations"], parts["kept"])
    return parts["layers"] + max(held + parts["moments"] + parts["batch"], kept + parts["solver"])


def test_llama_7b_needs_less_than_24_gib() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 11008}
    imports = 300 * 2**20
    parts = needed(128 * 2048, 4096, sizes, itemsize=2)
    assert imports + estimate(parts, on_disk=False) < 22 * 2**30
    assert imports + estimate(parts, on_disk=True) < 10 * 2**30
    rank = rank_for_density(11008, 4096, 0.5)
    assert parts["layers"] + placing(sizes, rank) < estimate(parts, on_disk=True)


@pytest.mark.slow
@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
def test_one_layer_and_its_activations_are_in_memory(on_disk: bool, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(passage(HELD_OUT_TEXT, 30_000), encoding="utf-8")
    source = wide_model(tmp_path / "dense")
    activations = {"dtype": "bf16", "batch_tokens": BATCH_TOKENS}
    found = peaks(
        source,
        tmp_path / "out",
        calibration=[str(tmp_path / "text.txt")],
        windows={"samples": WINDOWS, "sequence_length": LENGTH},
        activations={**activations, "folder": str(tmp_path / "activations") if on_disk else ""},
    )
    parts = needed(WINDOWS * LENGTH, BATCH_TOKENS, WIDE, itemsize=2)
    assert found["activation_bytes"] == parts["activations"]
    assert found["compress"] < estimate(parts, on_disk=on_disk)
    every_layer = LAYERS * (parts["layers"] // 2 + parts["activations"] - 2 * WINDOWS * LENGTH * 512 * 2)
    assert found["compress"] < every_layer // 2
    rank = rank_for_density(WIDE["intermediate_size"], WIDE["hidden_size"], 0.5)
    assert found["write"] < parts["layers"] + placing(WIDE, rank)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shard", ["10GB", "20MB"])
def test_the_model_is_never_in_memory_as_a_whole(dtype: str, shard: str, tmp_path: Path) -> None:
    source = wide_model(
        tmp_path / "dense", dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, max_shard_size=shard
    )
    stored = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    found = peaks(source, tmp_path / "out", method="magnitude", dtype=dtype, windows={}, activations={})
    # Pruning itself takes float64 copies, scores and orders of one linear, 12 numbers of 8 bytes a weight.
    one_linear = 12 * 8 * WIDE["hidden_size"] * WIDE["intermediate_size"]
    layer = needed(1, 1, WIDE, itemsize=2)["layers"] // 2
    assert found["compress"] < one_linear + layer + layer // 2
    assert found["write"] < stored // 2
