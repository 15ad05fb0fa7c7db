"""engine.json as a contract, and what is read from a build log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pifa_deploy.engine_record import (
    EngineLayer,
    EngineRecord,
    histogram,
    layers_in_log,
    memory_in_log,
    read_engine_json,
)
from pifa_deploy.errors import InputMissingError, InputRefusedError

RECORD: dict[str, Any] = {
    "schema": 1,
    "backend": "tensorrt-rtx",
    "version": "1.7.1",
    "onnx": {"sha256": {"model.onnx": "a" * 64}},
    "compute_capabilities": ["8.6"],
    "profiles": [{"input_ids": {"min": [1, 1], "opt": [1, 1], "max": [1, 8]}}],
    "engines": [{"file": "model.engine", "bytes": 5, "sha256": "b" * 64, "compute_capabilities": ["8.6"]}],
    "seconds": 1.5,
    "peak_rss_bytes": 1000,
}


def _write(folder: Path, record: dict[str, Any]) -> Path:
    (folder / "engine.json").write_text(json.dumps(record))
    (folder / "model.engine").write_bytes(b"12345")
    return folder


def test_a_record_survives_being_written_and_read(tmp_path: Path) -> None:
    record = read_engine_json(_write(tmp_path, RECORD))
    assert record.engines[0].bytes == 5
    assert EngineRecord.from_json(json.loads(json.dumps(record.to_json())), "again") == record
    assert record.sparse_weights is False  # as folders of earlier versions have none
    sparse = read_engine_json(_write(tmp_path, {**RECORD, "sparse_weights": True}))
    assert EngineRecord.from_json(json.loads(json.dumps(sparse.to_json())), "again").sparse_weights is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, r"schema is 2, expected 1"),
        ({"backend": "onnx"}, r"backend is 'onnx', expected 'tensorrt-rtx' or 'tensorrt'"),
        ({"onnx": {}}, r"onnx\.sha256 is None"),
        ({"onnx": {"sha256": {"model.onnx": "short"}}}, r"onnx\.sha256\.model\.onnx is 'short', .*\{64\}"),
        (
            {"onnx": {"sha256": {"config.json": "0" * 64}}},
            r"onnx\.sha256 is .*config\.json.*expected model\.onnx among",
        ),
        ({"compute_capabilities": ["sm86"]}, r"compute_capabilities\[0\] is 'sm86'"),
        ({"compute_capabilities": []}, r"compute_capabilities is \[\], expected at least 1"),
        (
            {"compute_capabilities": ["8.9"]},
            r"engines\[0\]\.compute_capabilities is \['8\.6'\], expected some of \['8\.9'\], the record's",
        ),
        (
            {"compute_capabilities": ["8.6", "8.9"]},
            r"engine\.compute_capabilities is \['8\.6', '8\.9'\], expected \['8\.6'\], those of its engines",
        ),
        ({"profiles": [{"x": {"min": [1]}}]}, r"profiles\[0\]\.x\.opt is None"),
        ({"profiles": ["x"]}, r"profiles\[0\] is 'x', expected an object"),
        ({"profiles": 3}, r"profiles is 3"),
        ({"profiles": []}, r"profiles is \[\], expected at least 1"),
        ({"engines": []}, r"engines is \[\]"),
        ({"engines": [{**RECORD["engines"][0], "file": "../x"}]}, r"engines\[0\]\.file is '\.\./x'"),
        ({"engines": [{**RECORD["engines"][0], "bytes": 6}]}, r"model\.engine: its size is 5, expected 6 bytes"),
        ({"engines": [{**RECORD["engines"][0], "bytes": True}]}, r"engines\[0\]\.bytes is True, expected an integer"),
        ({"engines": [{**RECORD["engines"][0], "sha256": None}]}, r"engines\[0\]\.sha256 is None"),
        ({"layers": [{"name": "x"}]}, r"layers\[0\]\.type is None"),
        ({"targets": 3}, r"targets is 3, expected a list"),
        ({"tokenizer": ["../config.json"]}, r"tokenizer\[0\] is '\.\./config\.json', expected a file name inside"),
        ({"seconds": "1"}, r"seconds is '1', expected a finite number"),
        ({"sparse_weights": 1}, r"sparse_weights is 1, expected true or false"),
        ({"network": {"modules": 3}}, r"network\.modules is 3, expected a list"),
        ({"memory": {"weights": None}}, r"memory\.weights is None, expected an integer"),
        ({"options": {"max_cache_len": "many"}}, r"options\.max_cache_len is 'many', expected an integer"),
        ({"options": {"max_cache_len": None}}, r"options\.max_cache_len is None, expected an integer"),
        ({"options": {"max_input_len": 0}}, r"options\.max_input_len is 0, expected at least 1"),
        ({"options": {"plugin_library": "x"}}, r"options\.plugin_library is 'x', expected an object"),
        ({"options": {"plugin_library": {"file": "x"}}}, r"options\.plugin_library\.op_version is None"),
    ],
)
def test_a_record_outside_the_contract_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefusedError, match=message):
        read_engine_json(_write(tmp_path, {**RECORD, **change}))


@pytest.mark.parametrize(
    ("name", "points", "message"),
    [
        ("input_ids", {"min": [], "opt": [], "max": []}, r"input_ids\.min is \[\], expected 2 sizes"),
        ("input_ids", {"max": []}, r"input_ids\.max is \[\], expected 2 sizes"),
        ("position_ids", {"min": [1]}, r"position_ids\.min is \[1\], expected 2 sizes"),
        ("input_ids", {"max": [1, -1]}, r"input_ids\.max\[1\] is -1, expected at least 0"),
        ("input_ids", {"min": [0, 0], "opt": [0, 0], "max": [1, 0]}, r"input_ids\.max is \[1, 0\], .* at least 1"),
        ("past_key_values.0.key", {"max": [1]}, r"past_key_values\.0\.key\.max is \[1\], expected 4 sizes"),
        ("past_key_values.0.key", {"max": [1, 2, 0, 8]}, r"opt \[1, 2, 4, 8\], max \[1, 2, 0, 8\].*min <= opt <= max"),
        ("pixels", {"min": [1], "opt": [1, 1], "max": [1, 1]}, r"pixels\.min is \[1\], expected 2 sizes"),
    ],
)
def test_a_profile_whose_sizes_do_not_go_together_is_refused(
    tmp_path: Path, name: str, points: dict[str, Any], message: str
) -> None:
    cache = {"min": [1, 2, 0, 8], "opt": [1, 2, 4, 8], "max": [1, 2, 8, 8]}
    sound = cache if name.startswith("past") else {"min": [1, 1], "opt": [1, 1], "max": [1, 8]}
    read_engine_json(_write(tmp_path, {**RECORD, "profiles": [{name: sound}]}))
    with pytest.raises(InputRefusedError, match=rf"engine\.json: engine\.profiles\[0\].*{message}") as error:
        read_engine_json(_write(tmp_path, {**RECORD, "profiles": [{name: {**sound, **points}}]}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(set(RECORD) - {"schema", "backend"}))
def test_a_record_without_a_field_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputRefusedError, match=name):
        read_engine_json(_write(tmp_path, {key: value for key, value in RECORD.items() if key != name}))


def test_a_folder_without_a_record_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="give a folder written by `pifa-deploy build`"):
        read_engine_json(tmp_path)


def test_a_missing_engine_file_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, RECORD)
    (tmp_path / "model.engine").unlink()
    with pytest.raises(InputRefusedError, match=r"model\.engine: its size is None, expected 5 bytes"):
        read_engine_json(tmp_path)


def test_layers_and_memory_are_read_from_the_log() -> None:
    log = (
        "[V] Total Activation Memory: 340 bytes\n[V] Total Weights Memory: 28 bytes\n[X] Layers:\n"
        "    Name: y_p_2+y_p_myl0_2, LayerType: gemm, Inputs: [ { Name: a, Datatype: Float }], Constants: [], "
        "Outputs: [ { Name: b, Datatype: Half }], TacticName: t\n"
        "    Name: y_np_U7_myl0_3, LayerType: gemm, Inputs: [ { Datatype: Float }], Outputs: [ { Datatype: Half }]\n"
        "    Name: start, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: \n"
    )
    layers = layers_in_log(log, {"y_p_2": "up", "y_p": "gate", "y_np": "gate"})
    assert layers == (
        EngineLayer(name="y_p_2+y_p_myl0_2", type="gemm", precision="Half", modules=("up", "gate")),
        EngineLayer(name="y_np_U7_myl0_3", type="gemm", precision="Half", modules=("gate",)),
        EngineLayer(name="start", type="shape_call", precision="none"),
    )
    assert histogram(layers) == {"Half": 2, "none": 1}
    assert memory_in_log(log) == {"activations": 340, "weights": 28}
    assert layers_in_log("nothing of the kind") == ()
