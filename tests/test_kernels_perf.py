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

import pytest
import torch
from kernel_fixtures import host_kernels

from pifa_deploy.cuda_kernels import Kernels
from pifa_deploy.density import rank_for_density

PERF = Path(__file__).resolve().parents[1] / "perf"
sys.path.insert(0, str(PERF))

import bench_compress  # noqa: E402
import bench_linear  # noqa: E402
import bench_model  # noqa: E402
import verdict  # noqa: E402
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


def test_both_kernel_rows_of_a_decoder_are_compared(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    options = bench_model.Options(device="cpu", dtype=torch.float32, density=0.5, prompt=9, rounds=1, kernels=kernels)
    for kind in bench_model.OUR_KERNELS:
        with monkeypatch.context() as other, torch.no_grad():
            # Dense weights are others than those of the factors.
            other.setitem(bench_model.KINDS, kind, bench_model.KINDS["dense"])
            rows = bench_model.measure(SMALL, options)
        assert rows[kind]["failed"].startswith("wrong result: differs from plain operators by ")
        right = {each for each in bench_model.OUR_KERNELS if "failed" not in rows[each]}
        assert right == set(bench_model.OUR_KERNELS) - {kind}
        code, why = verdict.judge([("small", rows, bench_model.OUR_KERNELS)])
        assert (code, why.partition(" differs")[0]) == (1, f"small, {kind}: wrong result:")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"ours": {"ms": 1.0}, "2:4": {"failed": "ImportError: no cuSPARSELt"}}, (0, "1 points, no wrong result")),
        ({"ours": {"failed": "RuntimeError: wrong result: relative error nan"}}, (1, "ours: RuntimeError: wrong")),
        ({"ours": {"ms": 1.0}, "2:4": {"failed": "RuntimeError: NaN or Inf in the output"}}, (1, "2:4: RuntimeError")),
        ({"ours": {"failed": "KernelError: no Information"}}, (3, "not decided: p, ours: KernelError")),
        ({"2:4": {"ms": 1.0}}, (3, "not decided: p, ours: not measured")),
    ],
)
def test_a_benchmark_is_judged_by_its_rows(rows: dict[str, dict[str, str]], expected: tuple[int, str]) -> None:
    code, why = verdict.judge([("p", rows, ["ours"])])
    assert code == expected[0]
    assert expected[1] in why
    # A wrong result counts wherever it is.
    wrong = ("q", {"dense": {"failed": "wrong result: 1.0"}}, ["ours"])
    assert verdict.judge([("p", rows, ["ours"]), wrong])[0] == 1


def test_nothing_measured_is_not_decided() -> None:
    assert verdict.judge([]) == (3, "not decided: nothing was measured")
    assert verdict.judge([("p", {"dense": {"ms": 1.0}}, [])]) == (3, "not decided: p: no row of the kernels")


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
    assert done.stdout.endswith("\n2 points, no wrong result\n")
    report["results"][1]["rows"]["PIFA GEMM"] = {"failed": "KernelError: made up"}
    assert bench_linear.verdict(report) == (3, "not decided: small at 0.7, 9 tokens, PIFA GEMM: KernelError: made up")
    report["results"][0]["rows"]["dense"] = {"failed": "RuntimeError: wrong result: relative error 1.00e+00"}
    assert bench_linear.verdict(report)[0] == 1
    done = subprocess.run([*program, *options, "--seconds", "0"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (3, "not decided: nothing was measured")
