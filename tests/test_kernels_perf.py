"""What the GPU benchmarks of perf/ can show on a CPU: their models are right, and without a GPU they say so."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from kernel_fixtures import host_kernels

from pifa_deploy.cuda_kernels import Kernels
from pifa_deploy.density import rank_for_density
from pifa_deploy.errors import MisfitError

PERF = Path(__file__).resolve().parents[1] / "perf"
sys.path.insert(0, str(PERF))

import bench_compress  # noqa: E402
import bench_linear  # noqa: E402
import bench_model  # noqa: E402
import bundle_models  # noqa: E402
import check_engine  # noqa: E402
from model_decoder import Decoder, Shape  # noqa: E402

SMALL = Shape(name="small", hidden=128, intermediate=192, heads=4, kv_heads=2, layers=2, whole_layers=6, head_dim=32)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return host_kernels(tmp_path_factory.getbasetemp())


def decoder(kind: str, kernels: Kernels | None = None, length: int = 12) -> Decoder:
    made = Decoder(shape=SMALL, length=length, dtype=torch.float32, device="cpu")
    return made.fill(kind, density=0.5, kernels=kernels)


def test_the_dense_decoder_is_a_llama() -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=SMALL.hidden,
        intermediate_size=SMALL.intermediate,
        num_hidden_layers=SMALL.layers,
        num_attention_heads=SMALL.heads,
        num_key_value_heads=SMALL.kv_heads,
        head_dim=SMALL.head_dim,
        rms_norm_eps=1e-5,
    )
    theirs, ours = LlamaModel(config).eval(), decoder("dense")
    for layer, groups in zip(theirs.layers, ours.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        names = ((attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,))
        for modules, group in zip((*names, (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)), groups, strict=True):
            columns = group(torch.eye(modules[0].in_features))
            for module, weight in zip(modules, columns, strict=True):
                module.weight.data = weight.T.contiguous()
    x = torch.randn(12, SMALL.hidden)
    with torch.no_grad():
        expected = theirs(inputs_embeds=x[None]).last_hidden_state[0]
        found = torch.nn.functional.rms_norm(ours.forward(x, 0), (SMALL.hidden,), eps=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "low-rank, equal density", "PIFA, plain operators", "PIFA, our kernels"])
def test_a_token_behind_a_prompt_is_the_last_of_a_longer_prompt(kernels: Kernels, kind: str) -> None:
    whole, parts = decoder(kind, kernels), decoder(kind, kernels)
    x = torch.randn(12, SMALL.hidden)
    prompt = parts.forward(x[:-1], 0)
    torch.testing.assert_close(
        torch.cat([prompt, parts.forward(x[-1:], 11)]), whole.forward(x, 0), rtol=1e-4, atol=1e-4
    )


def test_kernels_and_plain_operators_have_the_same_weights(kernels: Kernels) -> None:
    options = bench_model.Options(device="cpu", dtype=torch.float32, density=0.5, prompt=9, rounds=3, kernels=kernels)
    pair = [decoder(kind, kernels, 10) for kind in ("PIFA, plain operators", "PIFA, our kernels")]
    assert bench_model.difference(*pair, SMALL, options) <= 1e-5
    assert bench_model.difference(pair[0], decoder("dense", length=10), SMALL, options) > 0.1


def test_the_decoders_are_timed_side_by_side_and_failures_keep_their_reason(kernels: Kernels) -> None:
    options = bench_model.Options(device="cpu", dtype=torch.float32, density=0.5, prompt=9, rounds=3, kernels=kernels)
    random.seed(0)
    with torch.no_grad():
        rows = bench_model.measure(SMALL, options)
        without = bench_model.measure(SMALL, replace(options, kernels=None))
    assert set(rows) == set(bench_model.KINDS)
    done = {kind for kind, row in rows.items() if "failed" not in row}
    assert {"dense", "low-rank, equal density", "PIFA, plain operators", "PIFA, our kernels"} <= done
    assert rows["dense"]["prefill_speed_up"] == rows["dense"]["decode_speed_up"] == 1
    expected = 1e3 / (rows["dense"]["decode_ms"] * 3)
    assert rows["dense"]["decode_tokens_per_s"] == pytest.approx(expected)
    assert without["PIFA, our kernels"] == {"failed": "RuntimeError: no kernel library"}
    lines = bench_model.table({"small": without})
    assert len(lines) == 2 + len(without)
    assert any("no kernel library" in line for line in lines)


def test_equal_density_is_what_the_shapes_promise() -> None:
    for shape in bench_model.SHAPES:
        sizes = [(m, n) for n, outs in shape.linears() for m in outs]
        assert all(rank_for_density(m, n, 0.5, multiple=16) % 16 == 0 for m, n in sizes)
    linears = sum(m * n for n, outs in bench_model.LLAMA_7B.linears() for m in outs)
    assert linears * bench_model.LLAMA_7B.whole_layers == 6_476_005_376  # LLaMA-7B without embedding and head


def test_two_compressions_of_one_model_are_compared_and_judged(tmp_path: Path) -> None:
    model = bench_compress.Model(hidden=48, intermediate=64, layers=1, heads=4, samples=2, sequence_length=64)
    report = bench_compress.run(tmp_path, model, accelerator="cpu")
    assert report["factors"] == {"linears": 7, "largest_relative_difference": 0, "least_share_of_same_pivots": 1}
    assert report["wrong"] == []
    assert report["cpu"]["error"] > 0.01
    report["factors"]["largest_relative_difference"] = 0.5
    report["cuda"]["error"] *= 2
    wrong = bench_compress.judge(report)
    assert [each.split(" ")[0] for each in wrong] == ["factors", "errors"]
    report["factors"]["largest_relative_difference"] = float("nan")
    assert len(bench_compress.judge(report)) == 2
    json.dumps(report)


@pytest.mark.parametrize("program", [bench_model, bench_compress, bench_linear])
def test_without_a_gpu_one_line_says_so(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [program.__name__, "--out", str(tmp_path / "out")])
    assert program.main() == 3
    assert capsys.readouterr() == ("no GPU: not decided\n", "")
    assert list(tmp_path.iterdir()) == []


def test_the_benchmark_checks_and_times_every_contender_that_runs_here(kernels: Kernels, tmp_path: Path) -> None:
    # The second layer is q, k and v of SmolLM2, stacked.
    entry = {"name": "small", "layers": [[96, 80], [960, 576]]}
    (tmp_path / "shapes.json").write_text(json.dumps({"entries": [entry], "densities": [0.7], "tokens": [1, 9]}))
    program = [sys.executable, str(PERF / "bench_linear.py"), "--device", "cpu", "--rounds", "2"]
    options = ["--shapes", str(tmp_path / "shapes.json"), "--library", str(kernels.path), "--out", str(tmp_path)]
    done = subprocess.run([*program, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench_linear.json").read_text())
    assert [(result["tokens"], result["density"]) for result in report["results"]] == [(1, 0.7), (9, 0.7)]
    for result in report["results"]:
        assert len(result["rows"]) == 11
        assert all(row["median_us"] > 0 for row in result["rows"].values()), result["rows"]
    assert "| small | 0.7 | 9 |" in done.stdout
    plotted = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "bench_linear.png").is_file() == plotted
    assert ("plots: bench_linear.png" if plotted else "no plots: matplotlib is not installed") in done.stdout


def test_engines_are_judged_by_their_logits_and_keep_the_words_of_a_refusal(tmp_path: Path) -> None:
    from pifa_deploy.onnx_folder import open_folder
    from pifa_deploy.onnx_runner import OnnxRuntimeRunner

    kind = bundle_models.config()
    kind.update({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1})
    kind.update({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16})
    bundle_models.main(tmp_path, kind)

    def opened(folder: Path, library: Path | None) -> OnnxRuntimeRunner:
        if library is not None:
            raise MisfitError("no plugin here\nbut a second line")
        return OnnxRuntimeRunner(open_folder(folder))

    rows = check_engine.measure(tmp_path, tmp_path / "lib.so", opened)
    assert rows["PIFA, plugin"] == {"failed": "MisfitError: no plugin here\nbut a second line"}
    assert check_engine.judge(rows) == 3
    done = {name: row for name, row in rows.items() if name != "PIFA, plugin"}
    assert list(done) == ["dense", "2:4", "PIFA, plain"]
    assert check_engine.judge(done) == 0
    assert all(row["prefill_ms"] > 0 and row["decode_ms"] > 0 for row in done.values())
    lines = check_engine.table("onnxruntime", rows)
    assert lines[-1] == "| onnxruntime | PIFA, plugin | MisfitError: no plugin here |"
    # The models are different ones: an engine of another would be found out.
    for wrong in ("dense", "2-4"):
        ids, exact = np.load(tmp_path / "logits.npz")["input_ids"], np.load(tmp_path / "logits.npz")[wrong]
        prompt, token = check_engine.relative_errors(opened(tmp_path / "pifa", None), ids, exact)
        assert min(prompt, token) > 0.1
        assert check_engine.judge({"x": {"prefill_error": prompt, "decode_error": 0.0}}) == 1
    assert check_engine.judge({"x": {"prefill_error": 0.0, "decode_error": float("nan")}}) == 1


def test_without_a_gpu_engines_are_not_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = str(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["check_engine", str(tmp_path), "--library", "lib.so", "--out", out])
    assert check_engine.main() == 3
    assert capsys.readouterr() == ("no GPU: not decided\n", "")
