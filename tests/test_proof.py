"""What an engine contains, read from real builds and from the words of TensorRT's log, and the gates on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_engine_record import RECORD, _write

from pifa_deploy.cli.main import run
from pifa_deploy.engine_child import keep_inspected
from pifa_deploy.engine_layers import NOT_PICKED, sparse_tactics
from pifa_deploy.engine_record import layers_in_log
from pifa_deploy.errors import InputRefusedError
from pifa_deploy.inspection import inspect_path
from pifa_deploy.proof import PRECISIONS, ProofGates, judge_proof, prove

MODULES = ("model.layers.0.up", "model.layers.0.down")


def log_line(name: str, kind: str, inputs: str = "Half", output: str = "Half", nodes: int = 1) -> str:
    sources = "".join(f"[ONNX Layer: node_{i}]" for i in range(nodes))
    return (
        f"    Name: {name}, LayerType: {kind}, Inputs: [ {{ Name: x, Dimensions: [-1,6], Datatype: {inputs} }}, "
        f"{{ Name: mask, Datatype: Int64, Format: f }}], Constants: [ {{ Name: alpha, Datatype: Float, Format: f }}], "
        f"Outputs: [ {{ Name: y, Datatype: {output}, Format: f }}], TacticName: t, StreamId: 0, Metadata: {sources}"
    )


def engine(
    folder: Path, *lines: str, layers: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (), **changes: Any
) -> Path:
    """Writes an engine folder whose log has these lines and whose record has these (name, type, precision, modules)."""
    names = ("name", "type", "precision", "modules")
    entries = [{**dict(zip(names, layer, strict=True)), "modules": list(layer[3])} for layer in layers]
    record = {"network": {"modules": list(MODULES)}, "layers": entries, **changes}
    _write(folder, {**RECORD, **record})
    (folder / "build.log").write_text("\n".join(lines) + "\n")
    return folder


def decision(folder: Path, **gates: Any) -> tuple[bool | None, str, str]:
    (found,) = judge_proof(prove(folder), ProofGates(**gates))
    return found.passed, found.value, found.reason


def test_a_half_precision_engine_passes_though_its_factors_are_float_constants(tmp_path: Path) -> None:
    engine(tmp_path, log_line("a", "gemm"), log_line("b", "kgen", "Float", "Float", nodes=3))
    assert decision(tmp_path, precision="fp16") == (True, "1 Half", "")
    found = prove(tmp_path).to_json()
    assert (found["precisions"], found["matrix_precisions"]) == ({"Half": 1, "Float": 1}, {"Half": 1})
    assert (found["layers"], found["fused_layers"], found["source"]) == (2, 1, "build.log")


@pytest.mark.parametrize(
    ("words", "found"),
    [("Row major linear FP16 format", "FP16"), ("Channel major INT8 format where channel % 4 == 0", "INT8")],
)
def test_a_log_that_has_the_data_type_in_words_is_understood(tmp_path: Path, words: str, found: str) -> None:
    line = log_line("a", "gemm", words, words).replace("Datatype", "Format/Datatype").replace(", Format: f", "")
    assert decision(engine(tmp_path, line), precision="fp16") == (True, f"1 {found}", "")
    assert [layer.precision for layer in layers_in_log(line)] == [found]
    wide = line.replace(words, "Row major linear FP32")
    assert decision(engine(tmp_path, wide), precision="fp16")[:2] == (False, "1 FP32")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a", "gemm"), ("a", "runtime_fusion"), ("a", "custom_layer"), ("a", "PluginV3"), ("__myl_FcAdd_myl1_7", "kgen")],
)
def test_a_product_of_float_inputs_fails_though_its_output_is_half(tmp_path: Path, name: str, kind: str) -> None:
    engine(tmp_path, log_line(name, kind, "Float", "Half"), log_line("other", "gemm"))
    passed, value, reason = decision(tmp_path, precision="fp16")
    assert (passed, reason) == (False, f"wider: {name}")
    assert "1 Float" in value
    assert decision(tmp_path, precision="fp32")[0] is True


@pytest.mark.parametrize("name", ["__myl_MoveReplConc_myl0_5", "__myl_CastMulMeanAddSqrtDivMulCastMul_myl0_1"])
def test_generated_layers_without_a_product_may_be_wide(tmp_path: Path, name: str) -> None:
    engine(tmp_path, log_line(name, "kgen", "Float", "Float"), log_line("a", "gemm"))
    assert decision(tmp_path, precision="fp16")[0] is True


def test_a_subgraph_whose_layers_are_not_listed_leaves_the_precision_undecided(tmp_path: Path) -> None:
    engine(tmp_path, log_line("a", "gemm"), log_line("{ForeignNode[x...y]}", "Myelin"))
    passed, _, reason = decision(tmp_path, precision="fp16")
    assert passed is None
    assert reason == "build.log does not say what these compute in: {ForeignNode[x...y]}"


def test_an_engine_without_a_list_of_layers_is_not_decided(tmp_path: Path) -> None:
    engine(tmp_path)
    assert decision(tmp_path, precision="fp16") == (
        None,
        "no layers",
        "engine.json lists no layer that multiplies matrices",
    )


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="required precision is 'half', expected one of fp32, fp16"):
        ProofGates(precision="half")
    for name in PRECISIONS:
        ProofGates(precision=name)


def test_every_module_has_to_be_in_a_plugin_layer(tmp_path: Path) -> None:
    up, down = (("up_myl0_1", "custom_layer", "Half", MODULES[:1]), ("d", "gemm", "Half", MODULES[1:]))
    engine(tmp_path, layers=(up, down))
    assert decision(tmp_path, plugin=True) == (False, "1 of 2 modules", f"without: {MODULES[1]}")
    engine(tmp_path, layers=(up, ("d", "PluginV3", "Half", MODULES[1:])))
    assert decision(tmp_path, plugin=True) == (True, "2 of 2 modules", "")


def test_a_module_that_no_layer_names_is_missed(tmp_path: Path) -> None:
    engine(tmp_path, layers=(("up", "custom_layer", "Half", MODULES[:1]),))
    assert decision(tmp_path, plugin=True)[:2] == (False, "1 of 2 modules")


@pytest.mark.parametrize(
    ("network", "reason"),
    [({}, "does not list the PIFA modules; build the engine again"), ({"modules": []}, "the model has no PIFA module")],
)
def test_the_plugin_gate_is_open_without_a_list_of_modules(
    tmp_path: Path, network: dict[str, Any], reason: str
) -> None:
    engine(tmp_path, network=network)
    passed, _, why = decision(tmp_path, plugin=True)
    assert passed is None
    assert reason in why


TOLD = "[V] (Sparsity) Found 3 layer(s) eligible to use sparse tactics: a, b, c\n"
OLD = "[I] [TRT] (Sparsity) Layers eligible for sparse math: MatMul_1, Gemm_2\n"


@pytest.mark.parametrize(
    ("log", "eligible", "picked", "label"),
    [
        (TOLD + "[V] (Sparsity) Chose 2 layer(s) using sparse tactics: a, c\n", 3, 2, "2:4"),
        (TOLD + "[V] (Sparsity) Chose 0 layer(s) using sparse tactics\n", 3, 0, NOT_PICKED),
        (TOLD * 2 + "(Sparsity) Chose 1 layer(s) using sparse tactics: a\n" + TOLD.replace("3", "1"), 1, 1, "2:4"),
        (
            OLD + "[I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: MatMul_1\n",
            2,
            1,
            "2:4",
        ),
        (OLD + "[I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers:\n", 2, 0, NOT_PICKED),
        ("Flags | [SPARSE_WEIGHTS]\n", None, None, NOT_PICKED),
    ],
)
def test_sparse_kernels_are_told_by_the_last_statement_of_the_log(
    log: str, eligible: int | None, picked: int | None, label: str
) -> None:
    found = sparse_tactics(log, allowed=True)
    assert (found.eligible, found.picked, found.label) == (eligible, picked, label)
    assert len(found.picked_layers) == (picked or 0)
    assert sparse_tactics(log, allowed=False).label is None


@pytest.mark.parametrize(
    ("log", "allowed", "expected"),
    [
        ("(Sparsity) Chose 2 layer(s) using sparse tactics: a, c", True, (True, "2 layers", "")),
        (
            TOLD + "(Sparsity) Chose 0 layer(s) using sparse tactics",
            True,
            (False, "0 layers", "3 layers were eligible, a dense kernel was faster for each"),
        ),
        ("", True, (None, "not stated", "the build log says nothing of sparse tactics")),
        (
            "",
            False,
            (
                False,
                "not stated",
                "the engine was built without leave to use sparse kernels; build with --sparsity enable",
            ),
        ),
    ],
)
def test_the_sparse_gate_asks_for_a_picked_kernel(
    tmp_path: Path, log: str, allowed: bool, expected: tuple[bool | None, str, str]
) -> None:
    engine(tmp_path, log, sparse_weights=allowed)
    assert decision(tmp_path, sparse=True) == expected


def inspected(name: str, kind: str, inputs: str, key: str = "Format/Datatype") -> dict[str, Any]:
    return {"Name": name, "LayerType": kind, "Inputs": [{"Name": "x", key: inputs}], "Outputs": [{key: "Half"}]}


@pytest.mark.parametrize(
    ("words", "key", "passed"),
    [
        ("Half", "Format/Datatype", True),
        ("Float", "Datatype", False),
        ("Row major linear FP16 format", "Format/Datatype", True),
        ("Row major linear FP32", "Format/Datatype", False),
    ],
)
def test_the_engine_inspector_is_believed_before_the_log(tmp_path: Path, words: str, key: str, passed: bool) -> None:
    engine(tmp_path, log_line("a", "gemm", "Float" if passed else "Half"))
    (tmp_path / "inspector.json").write_text(json.dumps({"Layers": [inspected("a", "gemm", words, key)]}))
    assert prove(tmp_path).source == "inspector.json"
    assert decision(tmp_path, precision="fp16")[0] is passed


def test_an_inspector_that_gives_names_only_decides_nothing(tmp_path: Path) -> None:
    engine(tmp_path)
    (tmp_path / "inspector.json").write_text(json.dumps({"Layers": ["a", "b"]}))
    assert decision(tmp_path, precision="fp16")[::2] == (
        None,
        "inspector.json does not say what these compute in: a, b",
    )


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("", "not JSON"),
        ('{"Error": "engine information is not available"}', "Layers is no list of layers"),
        ('{"Layers": []}', "TensorRT's EngineInspector told of no layer; build.log says what there is"),
    ],
)
def test_what_the_inspector_tells_without_layers_is_not_kept(tmp_path: Path, told: str, message: str) -> None:
    engine(tmp_path, log_line("a", "gemm"))
    with pytest.raises(InputRefusedError, match=message):
        keep_inspected(told, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("inspector.json")]
    assert prove(tmp_path).source == "build.log"
    keep_inspected(json.dumps({"Layers": ["a"]}), tmp_path)
    assert prove(tmp_path).source == "inspector.json"


def test_a_malformed_inspector_file_is_refused(tmp_path: Path) -> None:
    engine(tmp_path)
    (tmp_path / "inspector.json").write_text('{"Layers": 3}')
    with pytest.raises(InputRefusedError, match=r"inspector\.json: Layers is no list of layers; write it again"):
        prove(tmp_path)


# --- real engines -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A PIFA engine and a 2:4 engine of TensorRT-RTX, in fp16."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'pifa-deploy[rtx]'")
    pytest.importorskip("polygraphy", reason="Polygraphy is not installed: pip install 'pifa-deploy[rtx]'")
    from decoder_fixtures import dense_decoder
    from sparse_fixtures import save_sparse
    from test_engine import _save, _toy_decoder

    from pifa_deploy.engine import BuildOptions, build_engines
    from pifa_deploy.onnx_export import ExportOptions, export_checkpoint

    folder = tmp_path_factory.mktemp("proof")
    _save(_toy_decoder(), folder / "toy")
    save_sparse(folder / "model", dense_decoder(hidden_size=64, intermediate_size=96, num_hidden_layers=1))
    export_checkpoint(folder / "model", folder / "sparse", ExportOptions(dtype="fp16"))
    options = BuildOptions(targets=("rtx4090",), max_input_len=16, max_cache_len=16)
    for name in ("toy", "sparse"):
        build_engines(folder / name, folder / f"{name}_engine", options)
    return {name: folder / f"{name}_engine" for name in ("toy", "sparse")}


@pytest.mark.tensorrt
def test_the_bodies_of_pifa_are_products_of_half_and_no_plugin(real: dict[str, Path]) -> None:
    proof = prove(real["toy"])
    assert proof.source == "build.log"
    assert proof.modules is not None
    assert len(proof.modules) == 3
    gates = ProofGates(precision="fp16", plugin=True)
    assert [each.passed for each in judge_proof(proof, gates)] == [True, False]
    # The log and engine.json were read by different code.
    recorded = json.loads((real["toy"] / "engine.json").read_text())["layers"]
    assert [layer.name for layer in proof.layers] == [layer["name"] for layer in recorded]
    gemms = {layer["name"] for layer in recorded if layer["type"] == "gemm"}
    assert gemms == {layer.name for layer in proof.products}


@pytest.mark.tensorrt
def test_inspect_calls_a_sparse_engine_without_a_picked_kernel_by_its_name(
    real: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect_path(real["sparse"]).facts["sparse_label"] == NOT_PICKED
    assert inspect_path(real["toy"]).facts["sparse_label"] is None
    assert run(["inspect", str(real["sparse"])]) == 0
    assert NOT_PICKED in capsys.readouterr().out


@pytest.mark.tensorrt
def test_an_edited_log_is_found_out(real: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(real["toy"], tmp_path / "engine"))
    log = (folder / "build.log").read_text()
    (folder / "build.log").write_text(log.replace("Datatype: Half", "Datatype: Float"))
    assert decision(folder, precision="fp16")[0] is False
