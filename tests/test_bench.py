"""`bench` on small models: what is timed, what contenders must have in common, gates, bounds, memory and refusals."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_fixtures import Outcome, small_model, small_tokenizer
from torch import nn

from pifa_deploy.bench import BenchOptions, check_fixed, run_bench
from pifa_deploy.checkpoint import FactorizationRecord, ModuleSpec, validate
from pifa_deploy.cli import console
from pifa_deploy.contender_bounds import BoundOptions
from pifa_deploy.decoder_step import StepLimits
from pifa_deploy.engine_record import EngineFile, EngineRecord
from pifa_deploy.equal_rank import to_low_rank
from pifa_deploy.errors import (
    ExitCode,
    FactorizationError,
    MisfitError,
    MissingCapabilityError,
    PifaDeployError,
    StageFailedError,
)
from pifa_deploy.latency import ClockOptions
from pifa_deploy.linear import LowRankLinear, PifaLinear
from pifa_deploy.model_folder import load_model
from pifa_deploy.peak_memory import measure_memory, status_bytes
from pifa_deploy.relayout import RelayoutOptions, relayout_checkpoint
from pifa_deploy.timed_contenders import RunOptions, TimedContender, drawn_step, engine_modules, open_timed
from pifa_deploy.transformers_quantizer import factorised_modules

pytest_plugins = ("cli_plugin",)

QUICK = ("--warm-up", "0", "--iterations", "4", "--duration", "0", "--rounds", "4", "--device", "cpu", "--threads", "1")
CPU = RunOptions(device="cpu", threads=1)


def has_onnx_runtime() -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'pifa-deploy[cpu]'")


@pytest.fixture(scope="module")
def equal_rank(checkpoint: Path) -> Path:
    """The low-rank checkpoint with the ranks of the PIFA one."""
    relayout_checkpoint(checkpoint, checkpoint.parent / "equal-rank", RelayoutOptions(layout="low-rank"))
    return checkpoint.parent / "equal-rank"


@pytest.fixture(scope="module")
def report(dense: Path, checkpoint: Path, onnx_folder: Path) -> dict[str, Any]:
    has_onnx_runtime()
    options = BenchOptions(
        prefill=(16, 48),
        decode=(24,),
        batch=2,
        run=CPU,
        clock=ClockOptions(warm_up_ms=0, iterations=12, duration_s=0, rounds=12),
        bounds=BoundOptions(bandwidth_gb_s=10, peak_tflops=0.1),
    )
    places = {"dense": str(dense), "pifa": str(checkpoint), "onnx": str(onnx_folder)}
    value: dict[str, Any] = json.loads(json.dumps(run_bench(places, options, console.stage).to_json()))
    return value


def test_contenders_say_what_they_are(report: dict[str, Any], checkpoint: Path) -> None:
    found = {one["name"]: one for one in report["contenders"]}
    assert [(one["kind"], one["runtime"]) for one in found.values()] == [
        ("dense", "torch"),
        ("pifa", "torch"),
        ("pifa", "onnxruntime"),
    ]
    record = validate(checkpoint)
    sizes = [(spec.rank, spec.out_features, spec.in_features) for spec in record.modules.values()]
    density = sum(r * (m + n - r) for r, m, n in sizes) / sum(m * n for _, m, n in sizes)
    assert found["dense"]["density"] is None
    assert found["pifa"]["density"] == found["onnx"]["density"] == pytest.approx(density)
    assert found["pifa"]["parameters"] == load_model(checkpoint, dtype=None).num_parameters()
    assert all(one["memory"]["weights_bytes"] > 4 * one["parameters"] * 0.9 for one in found.values())


def test_prefill_and_decode_are_cases_of_their_own(report: dict[str, Any]) -> None:
    sizes = [(case["phase"], case["batch"], case["tokens"], case["past"]) for case in report["cases"]]
    assert sizes == [("prefill", 2, 16, 0), ("prefill", 2, 48, 0), ("decode", 2, 1, 24)]
    for case in report["cases"]:
        for row in case["rows"]:
            assert len(row["samples_ms"]) == len(row["round_ms"]) == 12
            assert row["gpu_compute_ms"] is row["enqueue_ms"] is row["joules_per_token"] is None
            expected = case["batch"] * case["tokens"] / row["latency_ms"]["median"] * 1e3
            assert row["tokens_per_s"] == pytest.approx(expected)
            assert row["bound_fraction"] == pytest.approx(row["bound_ms"] / row["latency_ms"]["median"])


def test_speed_ups_are_ratios_within_the_rounds(report: dict[str, Any]) -> None:
    assert report["baseline"] == "dense"
    for case in report["cases"]:
        base = case["rows"][0]
        assert base["speed_up"] == {"median": 1, "low": 1, "high": 1, "confidence": 0.95}
        for row in case["rows"][1:]:
            ratios = sorted(one / other for one, other in zip(base["round_ms"], row["round_ms"], strict=True))
            assert row["speed_up"]["median"] == pytest.approx((ratios[5] + ratios[6]) / 2)
            assert row["speed_up"]["low"] <= row["speed_up"]["median"] <= row["speed_up"]["high"]


def test_the_report_has_the_fields_of_its_contract(report: dict[str, Any]) -> None:
    assert (report["artefact"], report["schema"]) == ("bench", 1)
    assert report["passed"] is None
    assert report["decisions"] == []
    assert report["fixed"] is None
    assert report["options"]["run"] == {"device": "cpu", "threads": 1, "cuda_graph": False, "dtype": None}


def test_the_command_shows_tables_and_writes_json(
    pifa_deploy: Callable[..., Outcome], dense: Path, checkpoint: Path, tmp_path: Path
) -> None:
    found = pifa_deploy(
        "bench",
        f"a={dense}",
        f"b={checkpoint}",
        *QUICK,
        "--decode",
        8,
        "--baseline",
        "b",
        "--json",
        tmp_path / "x.json",
    )
    assert found.code == 0, found.err
    assert found.out.startswith("No GPU is used: everything below was measured on the CPU (")
    assert "\ndecode at 8\n" in found.out
    assert "prefill" not in found.out
    assert "warning: 4 rounds: intervals are too narrow below 10" in found.out
    value = json.loads((tmp_path / "x.json").read_text())
    assert value["baseline"] == "b"
    assert value["command"].startswith(f"pifa-deploy bench a={dense} b={checkpoint} --decode 8 --device cpu")
    assert [case["rows"][1]["speed_up"]["median"] for case in value["cases"]] == [1]


@pytest.mark.parametrize(("limit", "code", "word"), [(0.001, 0, "passed"), (1000, ExitCode.GATE_FAILED, "FAILED")])
def test_a_gate_decides_the_exit_code(
    pifa_deploy: Callable[..., Outcome], dense: Path, limit: float, code: int, word: str
) -> None:
    found = pifa_deploy("bench", f"a={dense}", f"b={dense}", *QUICK, "--prefill", 4, "--gate-speed-up", f"b={limit}")
    assert found.code == code, found.err
    assert f"\n{word}: prefill 4: speed-up of b, lower end" in found.out


def test_a_spread_above_its_limit_fails_only_with_a_gate(pifa_deploy: Callable[..., Outcome], dense: Path) -> None:
    command = ("bench", f"a={dense}", f"b={dense}", *QUICK, "--prefill", 4, "--max-spread", 1e-9)
    assert pifa_deploy(*command).code == 0
    found = pifa_deploy(*command, "--gate-speed-up", "b=0.01")
    assert found.code == ExitCode.GATE_FAILED
    assert "FAILED: prefill 4: largest coefficient of variation" in found.out


# What contenders have in common.


def contender(
    name: str, modules: dict[str, ModuleSpec], kind: str = "pifa", pruned: dict[str, int] | None = None
) -> TimedContender:
    return TimedContender(
        name=name,
        path=name,
        kind=kind,
        runtime="torch",
        device="cpu",
        dtype="fp32",
        weight_bytes=None,
        loaded_bytes=0,
        parameters=None,
        vocabulary=None,
        modules=modules,
        pruned=pruned or {},
        runner=None,
    )


def spec(rank: int, form: str = "pifa") -> ModuleSpec:
    return ModuleSpec(rank=rank, in_features=100, out_features=100, format=form)


DENSE = contender("dense", {}, "dense")


def test_equal_density_is_checked_within_two_per_cent() -> None:
    pifa = contender("pifa", {"q": spec(29)})  # 29 * 171 = 4959
    check_fixed((DENSE, pifa, contender("low", {"q": spec(25, "lowrank")})), "density")  # 5000
    message = r"--fixed density: pifa has density 0\.4959 and low 0\.5200, expected within 2%; compress them to one"
    with pytest.raises(ValueError, match=message):
        check_fixed((DENSE, pifa, contender("low", {"q": spec(26, "lowrank")})), "density")


def test_half_of_the_numbers_are_a_density_too() -> None:
    low = contender("low", {"q": spec(25, "lowrank")})
    check_fixed((low, contender("sparse", {}, "2:4", {"q": 10_000})), "density")
    check_fixed((low, contender("engine", {}, "2:4")), "density")


def test_a_linear_that_only_one_of_them_compresses_counts_as_dense_in_the_other() -> None:
    both = contender("both", {"q": spec(25, "lowrank"), "k": spec(25, "lowrank")})
    one = contender("one", {"q": spec(25, "lowrank")})
    assert one.density == both.density
    with pytest.raises(ValueError, match=r"both has density 0\.5000 and one 0\.7500, expected within 2%"):
        check_fixed((both, one), "density")
    sparse = contender("sparse", {}, "2:4", {"q": 10_000})
    with pytest.raises(ValueError, match=r"both has density 0\.5000 and sparse 0\.7500, expected within 2%"):
        check_fixed((both, sparse), "density")


def test_equal_rank_is_checked_layer_by_layer() -> None:
    pifa = contender("pifa", {"q": spec(30), "k": spec(20)})
    check_fixed((DENSE, pifa, contender("low", {"q": spec(30, "lowrank"), "k": spec(20, "lowrank")})), "rank")
    with pytest.raises(
        ValueError, match=r"--fixed rank: k has rank 20 in pifa and 21 in low, expected the same; `pifa"
    ):
        check_fixed((pifa, contender("low", {"q": spec(30, "lowrank"), "k": spec(21, "lowrank")})), "rank")
    with pytest.raises(ValueError, match=r"k has rank 20 in pifa and None in low"):
        check_fixed((pifa, contender("low", {"q": spec(30, "lowrank")})), "rank")


@pytest.mark.parametrize("fixed", ["density", "rank"])
def test_there_must_be_two_to_compare(fixed: str) -> None:
    with pytest.raises(ValueError, match=rf"--fixed {fixed} compares compressed models and there are 1, expected at"):
        check_fixed((DENSE, contender("pifa", {"q": spec(30)})), fixed)


# The low-rank model of equal rank.


def matrix(layer: nn.Module, in_features: int) -> torch.Tensor:
    """Returns W [m, n] as the layer computes it."""
    with torch.no_grad():
        zero = layer(torch.zeros(1, in_features))
        return (layer(torch.eye(in_features)) - zero).T.double()


def test_the_low_rank_model_is_the_same_function_at_the_same_ranks(checkpoint: Path, equal_rank: Path) -> None:
    pifa, low = (factorised_modules(load_model(folder, dtype=torch.float32)) for folder in (checkpoint, equal_rank))
    assert list(pifa) == list(low)
    for name, layer in low.items():
        assert isinstance(layer, LowRankLinear)
        assert layer.rank == pifa[name].rank
        exact = matrix(pifa[name], layer.in_features)
        error = torch.linalg.norm(matrix(layer, layer.in_features) - exact) / torch.linalg.norm(exact)
        assert error < 2e-6, name
        sizes = torch.linalg.svdvals(exact)[: layer.rank].sqrt()
        for factor in (layer.low_rank_u, layer.low_rank_v):  # balanced: both carry the roots of the singular values
            torch.testing.assert_close(torch.linalg.svdvals(factor.double()), sizes, rtol=1e-4, atol=1e-6)
    record = validate(equal_rank)
    assert {spec.format for spec in record.modules.values()} == {"lowrank"}
    assert record.density is None


def test_biases_and_dtype_stay(tmp_path: Path) -> None:
    from pifa_deploy.transformers_quantizer import attach

    model = small_model("qwen2").half()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith("q_proj"):
            layer = PifaLinear(module.in_features, module.out_features, 7, bias=True)
            torch.nn.init.normal_(layer.pivot_weight)
            torch.nn.init.normal_(layer.coefficients)
            layer.bias = module.bias
            layer.pivot_rows = torch.arange(3, 10, dtype=torch.int32)
            layer.derive_output_index()
            model.set_submodule(name, layer.half())
    attach(model, source="svd", density=0.3, details={})
    model.save_pretrained(tmp_path / "pifa")
    small_tokenizer().save_pretrained(tmp_path / "pifa")
    summary = relayout_checkpoint(tmp_path / "pifa", tmp_path / "low", RelayoutOptions(layout="low-rank"))
    assert summary.modules == {"lowrank": 2}
    pifa, low = (factorised_modules(load_model(tmp_path / name, dtype=None)) for name in ("pifa", "low"))
    for name, layer in low.items():
        assert layer.low_rank_u.dtype == torch.float16  # type: ignore[union-attr]
        assert layer.bias is not None
        assert torch.equal(layer.bias, pifa[name].bias)  # type: ignore[arg-type]


def test_a_pair_beyond_its_dtype_is_refused_by_name(checkpoint: Path) -> None:
    model = load_model(checkpoint, dtype=torch.float16)
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    with torch.no_grad():
        layer.pivot_weight.fill_(6e4)  # one singular value, whose root is beyond 65504
        layer.coefficients.fill_(6e4)
    with pytest.raises(FactorizationError, match=r"model\.layers\.1\.mlp\.up_proj: its low-rank pair is not finite in"):
        to_low_rank(model)


def test_tables_of_equal_rank_and_equal_density_are_told_apart(
    pifa_deploy: Callable[..., Outcome], dense: Path, checkpoint: Path, equal_rank: Path
) -> None:
    places = (f"dense={dense}", f"low={equal_rank}", f"pifa={checkpoint}")
    found = pifa_deploy("bench", *places, *QUICK, "--prefill", 4, "--fixed", "rank")
    assert found.code == 0, found.err
    assert "; equal rank\n" in found.out
    pifa_deploy("bench", *places, *QUICK, "--prefill", 4, "--fixed", "density").failed(
        ExitCode.USAGE, r"--fixed density: pifa has density 0\.\d+ and low 0\.\d+, expected within 2%"
    )


def test_relayout_writes_the_low_rank_model(
    pifa_deploy: Callable[..., Outcome], checkpoint: Path, tmp_path: Path
) -> None:
    found = pifa_deploy("relayout", checkpoint, tmp_path / "low", "--layout", "low-rank")
    assert found.code == 0, found.err
    assert found.out == f"{tmp_path / 'low'}: 14 lowrank, max |C| 0\n"


# Engines, as far as they can be looked at without a GPU.


def engine_record(**network: Any) -> EngineRecord:
    file = EngineFile(file="model.engine", bytes=10, sha256="0" * 64, compute_capabilities=("8.6",))
    return EngineRecord(
        backend="tensorrt-rtx",
        version="1.7",
        onnx_sha256={},
        compute_capabilities=("8.6",),
        profiles=(),
        network=network,
        engines=(file,),
        seconds=1.0,
        peak_rss_bytes=1,
    )


def test_an_engine_is_what_its_configuration_says_but_for_layers_left_dense() -> None:
    modules = {"q": spec(30), "k": spec(20), "v": spec(10, "lowrank")}
    config = {"quantization_config": FactorizationRecord(modules=modules, source="svd").to_json()}
    assert engine_modules(engine_record(), {}, "here") == {}
    assert engine_modules(engine_record(), config, "here") == modules
    found = engine_modules(engine_record(modules=["q"]), config, "here")
    assert list(found) == ["q", "v"]


def test_an_engine_needs_a_gpu(pifa_deploy: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text("{}")
    pifa_deploy("bench", tmp_path, *QUICK).failed(ExitCode.NOT_DECIDED, "is an engine folder, which runs on a GPU only")


def test_a_size_beyond_an_engine_is_refused_before_anything_is_timed() -> None:
    found = contender("engine", {})
    object.__setattr__(found, "runner", SimpleNamespace(limits=StepLimits(tokens=512, past=256)))
    found.check_sizes((128, 512), (256,))
    with pytest.raises(MisfitError, match=r"--prefill 513 is more than the 512 that the engine was built for; build"):
        found.check_sizes((513,), ())
    with pytest.raises(MisfitError, match=r"--decode 257 is more than the 256 .* build it with a larger --max-cache"):
        found.check_sizes((), (257,))


# Memory.


def test_memory_is_measured_while_nothing_is_loaded(dense: Path) -> None:
    titles: list[str] = []

    @contextlib.contextmanager
    def stage(title: str) -> Iterator[None]:
        titles.append(title)
        yield

    clock = ClockOptions(warm_up_ms=0, iterations=4, duration_s=0, rounds=4)
    options = BenchOptions(prefill=(8,), decode=(), run=CPU, clock=clock, memory=True)
    found = run_bench({"a": str(dense)}, options, stage).memory["a"]
    assert titles == ["memory of a", "load a", "prefill 8"]
    assert found["peak_bytes"] == found["host_bytes"] > found["libraries_bytes"] > found["weights_bytes"] > 0


@pytest.mark.parametrize(
    ("place", "steps", "run"),
    [("none", [(1, 8, 0)], CPU), ("none", [], replace(CPU, cuda_graph=True)), ("dense", [(1, -1, 0)], CPU)],
)
def test_what_a_contender_is_refused_for_is_told_by_the_process_that_measures_its_memory(
    dense: Path, place: str, steps: list[tuple[int, int, int]], run: RunOptions
) -> None:
    def refused() -> None:
        contender = open_timed("a", str(dense.parent / place), run)
        drawn_step(steps[0][1], 0, batch=1, vocabulary=contender.vocabulary or 1)

    with pytest.raises((PifaDeployError, ValueError)) as here:
        refused()
    with pytest.raises(type(here.value)) as there:
        measure_memory(str(dense.parent / place), steps, run)
    assert (type(there.value), str(there.value)) == (type(here.value), str(here.value))


def test_memory_is_that_of_a_process_of_its_own(dense: Path) -> None:
    found = measure_memory(str(dense), [(1, 16, 0), (2, 1, 8)], CPU)
    assert found.peak_bytes == found.host_bytes >= found.libraries_bytes > 50_000_000
    assert found.activations_bytes is None


def test_a_process_that_fails_is_told_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho Traceback >&2\necho 'MemoryError: no room' >&2\nexit 9\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(
        StageFailedError, match=r"here: the process that .* ended with status 9: MemoryError: no room; it may need more"
    ):
        measure_memory("here", [(1, 1, 0)], CPU)
    fake.write_text("#!/bin/sh\nexec sleep 5\n")
    with pytest.raises(StageFailedError, match=r"here: measuring its memory took more than 0\.2 s, and was ended"):
        measure_memory("here", [(1, 1, 0)], CPU, timeout_s=0.2)


def test_the_peak_is_read_from_the_kernels_figures() -> None:
    assert status_bytes("VmPeak:\t  900 kB\nVmHWM:\t  512 kB\nVmRSS:\t 1 kB\n", "VmHWM") == 512 * 1024
    assert status_bytes("Name:\tpython\n", "VmHWM") == 0


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--baseline", "other"), "'other' is no contender, expected one of dense"),
        (("--gate-speed-up", "other=1.2"), "'other' is no contender, expected one of dense"),
        (("--gate-speed-up", "dense=1.2"), "a gate asks about 'dense', the baseline, whose speed-up is always 1"),
        (
            ("--gate-speed-up", "dense=3", "--gate-speed-up", "dense=0.1"),
            "--gate-speed-up names 'dense' twice, expected one limit for each",
        ),
        (("--gate-speed-up", "dense"), "--gate-speed-up is 'dense', expected NAME=X such as pifa=1.2"),
        (("--gate-speed-up", "dense=fast"), "--gate-speed-up is 'dense=fast', expected NAME=X"),
        (("--prefill", "0"), r"prefill is \[0\], decode \[\] and batch 1, expected at least 1"),
        (("--rounds", "1"), "rounds is 1 and iterations 4, expected at least 2 and 1"),
        (
            ("--target", "orin-agx"),
            "--target orin-agx bounds a GPU and the contenders run on the CPU; give ",
        ),
        (("--target", "nonsense"), "target 'nonsense' is unknown"),
        (("--bandwidth", "3"), "a bound needs --target, or both --bandwidth and --peak-tflops"),
        (("--threads", "0"), "threads is 0, expected at least 1"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    pifa_deploy: Callable[..., Outcome], dense: Path, arguments: tuple[str, ...], message: str
) -> None:
    pifa_deploy("bench", f"dense={dense}", *QUICK, *arguments).failed(ExitCode.USAGE, message)


def test_two_contenders_of_one_name_are_refused(pifa_deploy: Callable[..., Outcome], dense: Path) -> None:
    pifa_deploy("bench", dense, dense, *QUICK).failed(ExitCode.USAGE, r"are both named 'dense'; name one as NAME=")
    pifa_deploy("bench", f"={dense}", *QUICK).failed(ExitCode.USAGE, r"PLACE is '=.*', expected \[NAME=\]PLACE")


def test_options_that_mean_nothing_to_a_plan_are_refused(
    pifa_deploy: Callable[..., Outcome], dense: Path, tmp_path: Path
) -> None:
    outcome = pifa_deploy("bench", dense, "--choose", tmp_path / "plan.json", "--memory")
    outcome.failed(ExitCode.USAGE, "--memory has no meaning with --choose, which times layers; leave it out")


def test_no_gpu_is_nothing_decided(pifa_deploy: Callable[..., Outcome], dense: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    pifa_deploy("bench", dense, *QUICK, "--device", "cuda").failed(ExitCode.NOT_DECIDED, "finds no CUDA device; use")
    with pytest.raises(MissingCapabilityError, match="a CUDA graph was asked for on the CPU, expected a GPU; leave"):
        open_timed("a", str(dense), RunOptions(device="cpu", cuda_graph=True))


def test_a_step_of_a_batch_reads_other_tokens_at_the_right_places() -> None:
    step = drawn_step(5, 7, batch=3, vocabulary=11)
    assert step.input_ids.shape == (3, 5)
    assert 0 <= step.input_ids.min() <= step.input_ids.max() < 11
    assert step.attention_mask.shape == (3, 12)
    assert step.position_ids.tolist() == [[7, 8, 9, 10, 11]] * 3


def test_choosing_writes_a_plan_for_the_exporter(
    pifa_deploy: Callable[..., Outcome], checkpoint: Path, tmp_path: Path
) -> None:
    has_onnx_runtime()
    plan = tmp_path / "plan.json"
    found = pifa_deploy("bench", checkpoint, *QUICK, "--choose", plan, "--prefill", 8, "--generated", 4)
    assert found.code == 0, found.err
    assert found.out.startswith(f"{plan}: ")
    value = json.loads(plan.read_text())
    assert value["workload"] == {"prompt": 8, "generated": 4}
    assert value["layers"].keys() == validate(checkpoint).modules.keys()
    pifa_deploy("bench", checkpoint, f"b={checkpoint}", "--choose", plan).failed(
        ExitCode.USAGE, "--choose takes one checkpoint and there are 2, expected exactly one"
    )
