"""The ONNX folder as a contract: a sound one opens, and each way to break it is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from pifa_deploy import onnx_passes, op_spec
from pifa_deploy.errors import ExitCode, InputMissingError, InputRefusedError
from pifa_deploy.onnx_export import save_graph
from pifa_deploy.onnx_folder import external_files, open_folder

MANIFEST = {"schema": 1, "artefact": "onnx", "dtype": "fp32", "source_sha256": None, "modules": {}}
NODE = "model.layers.0.mlp.up_proj"
WEIGHT = f"{NODE}.pivot_weight"
# More than the exporter keeps inside the file.
M, N, R = 48, 40, 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as the exporter writes it, of a single PifaLinear."""
    random = np.random.default_rng(0)
    arrays = {
        WEIGHT: random.normal(size=(R, N)).astype(np.float32),
        f"{NODE}.coefficients": random.normal(size=(M - R, R)).astype(np.float32),
        f"{NODE}.output_index": np.arange(M, dtype=np.int32),
    }
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["tokens", N]))
    constants = [ir.Value(name=name, const_value=ir.tensor(value, name=name)) for name, value in arrays.items()]
    for value, array in zip(constants, arrays.values(), strict=True):
        value.shape = ir.Shape(array.shape)
    attributes = op_spec.attributes(op_spec.OP_TYPE, rank=R, out_features=M)
    node = ir.node("PifaLinear", [x, *constants], attributes=attributes, domain="pifa", name=NODE)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": onnx_passes.OPSET, "pifa": 1}
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=constants, opset_imports=opsets, name="one")
    model = ir.Model(graph, ir_version=10)
    onnx_passes.attach_function_bodies(model)
    save_graph(model, tmp_path)
    (tmp_path / "pifa.json").write_text(json.dumps(MANIFEST))
    return tmp_path


def change(folder: Path, edit: Callable[[onnx.ModelProto], Any]) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def initializer(model: onnx.ModelProto, name: str = WEIGHT) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def external(tensor: TensorProto, **entries: Any) -> TensorProto:
    """Makes the tensor take its data from a file, or changes how it does."""
    known = {entry.key: entry.value for entry in tensor.external_data} | {key: str(v) for key, v in entries.items()}
    tensor.ClearField("external_data")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in known.items():
        if value != "None":
            tensor.external_data.add(key=key, value=value)
    return tensor


def refused(folder: Path, *parts: str) -> None:
    """`open_folder` refuses, and its message holds all `parts`."""
    with pytest.raises(InputRefusedError, match=".*".join(map(re.escape, parts))) as info:
        open_folder(folder)
    assert info.value.exit_code == ExitCode.INPUT_REFUSED


def test_a_sound_folder_opens(folder: Path) -> None:
    opened = open_folder(folder)
    assert opened.model_path == folder / "model.onnx"
    assert opened.dtype == "fp32"
    assert external_files(opened.model) == ["model.onnx.data"]
    assert opened.weight_bytes() == 4 * (R * N + (M - R) * R + M)
    assert open_folder(folder / "model.onnx").path == folder


def test_a_foreign_file_without_a_manifest_opens(folder: Path) -> None:
    (folder / "pifa.json").unlink()
    assert open_folder(folder).manifest == {}


def test_a_link_to_the_folder_opens(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    link = tmp_path_factory.mktemp("links") / "link"
    link.symlink_to(folder)
    assert open_folder(link).cache_layers == 0


@pytest.mark.parametrize("name", ["", "nowhere", "nowhere/model.onnx"])
def test_a_missing_folder_is_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match=r"model\.onnx: no such file; give a folder written by") as info:
        open_folder(tmp_path / name)
    assert info.value.exit_code == ExitCode.USAGE


class TestGraphFile:
    def test_cut_short_anywhere_is_refused(self, folder: Path) -> None:
        whole = (folder / "model.onnx").read_bytes()
        for length in range(len(whole)):
            (folder / "model.onnx").write_bytes(whole[:length])
            refused(folder, str(folder / "model.onnx"))

    @pytest.mark.parametrize("content", [b"GIF89a" * 9, b"{}", b"\xff" * 64, bytes(64)])
    def test_something_else_is_refused(self, content: bytes, folder: Path) -> None:
        (folder / "model.onnx").write_bytes(content)
        refused(folder, str(folder / "model.onnx"), "not a readable ONNX file")

    def test_an_empty_graph_is_refused(self, folder: Path) -> None:
        change(folder, lambda model: model.graph.ClearField("node"))
        refused(folder, str(folder / "model.onnx"), "holds no graph")

    def test_an_empty_file_is_refused(self, folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"")
        refused(folder, str(folder / "model.onnx"), "holds no graph")


class TestNodes:
    def test_an_unknown_operator_version_is_refused(self, folder: Path) -> None:
        def edit(model: onnx.ModelProto) -> None:
            next(opset for opset in model.opset_import if opset.domain == "pifa").version = 2

        change(folder, edit)
        refused(folder, str(folder / "model.onnx"), NODE, "pifa::PifaLinear version 2, this program knows")

    def test_an_operator_without_a_version_is_refused(self, folder: Path) -> None:
        def edit(model: onnx.ModelProto) -> None:
            model.opset_import.remove(next(opset for opset in model.opset_import if opset.domain == "pifa"))

        change(folder, edit)
        refused(folder, NODE, "version None")

    def test_another_operator_of_the_domain_is_refused(self, folder: Path) -> None:
        change(folder, lambda model: setattr(model.graph.node[0], "op_type", "PifaConv"))
        refused(folder, NODE, "pifa::PifaConv version 1")

    def test_a_node_without_its_body_is_refused(self, folder: Path) -> None:
        change(folder, lambda model: model.ClearField("functions"))
        refused(folder, NODE, "no function body")

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("form", "diagonal", "form is 'diagonal', expected 'row' of PifaLinear"),
            ("form", None, "form is None"),
            ("plugin_namespace", None, "plugin_namespace is None, expected 'pifa'"),
            ("plugin_namespace", "", "plugin_namespace is ''"),
            ("plugin_version", "2", "has plugin_version '2', this program knows '1'"),
            ("plugin_version", None, "has plugin_version 'None'"),
            ("rank", None, "attribute rank is None, expected an integer"),
            ("rank", "8", "attribute rank is '8', expected an integer"),
            ("out_features", 1.5, "attribute out_features is 1.5, expected an integer"),
        ],
    )
    def test_an_attribute_outside_the_contract_is_refused(
        self, name: str, value: Any, message: str, folder: Path
    ) -> None:
        def edit(model: onnx.ModelProto) -> None:
            node = model.graph.node[0]
            node.attribute.remove(next(attribute for attribute in node.attribute if attribute.name == name))
            if value is not None:
                node.attribute.append(helper.make_attribute(name, value))

        change(folder, edit)
        refused(folder, f"{folder / 'model.onnx'}: {NODE}", message)


def in_initializer(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.initializer.append(tensor)


def in_sparse_initializer(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.sparse_initializer.add(dims=[9]).values.CopyFrom(tensor)


def in_attribute(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))


def in_tensors_attribute(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.graph.node.append(helper.make_node("Foreign", [], ["unused"], domain="foreign", values=[tensor]))


def in_function(model: onnx.ModelProto, tensor: TensorProto) -> None:
    model.functions[0].node.append(helper.make_node("Constant", [], ["unused"], value=tensor))


def in_subgraph(model: onnx.ModelProto, tensor: TensorProto) -> None:
    branch = helper.make_graph([], "branch", [], [], initializer=[tensor])
    model.graph.node.append(helper.make_node("If", ["x"], ["unused"], then_branch=branch, else_branch=branch))


def in_nested_subgraph(model: onnx.ModelProto, tensor: TensorProto) -> None:
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    inner = helper.make_graph([constant], "inner", [], [])
    outer = helper.make_graph([helper.make_node("Loop", ["x"], ["l"], body=inner)], "outer", [], [])
    model.functions[0].node.append(helper.make_node("If", ["x"], ["i"], then_branch=outer, else_branch=outer))


PLACES = [
    in_initializer,
    in_sparse_initializer,
    in_attribute,
    in_tensors_attribute,
    in_function,
    in_subgraph,
    in_nested_subgraph,
]


class TestExternalData:
    def test_missing_is_refused(self, folder: Path) -> None:
        (folder / "model.onnx.data").unlink()
        refused(folder, str(folder / "model.onnx.data"), "missing", NODE)

    @pytest.mark.parametrize("left", [0, 1, 4 * R * N, -1])
    def test_cut_short_is_refused(self, left: int, folder: Path) -> None:
        data = (folder / "model.onnx.data").read_bytes()
        (folder / "model.onnx.data").write_bytes(data[:left])
        refused(folder, str(folder / "model.onnx.data"), NODE, "the file is cut short")

    @pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
    @pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "..", "", "sub/weights", "link"])
    def test_outside_the_folder_is_refused_wherever_the_tensor_stands(
        self, location: str, place: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        outside = tmp_path_factory.mktemp("outside") / "secret"
        outside.write_bytes(bytes(64))
        (folder / "link").symlink_to(outside)
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_bytes(bytes(64))
        tensor = external(TensorProto(name="hostile", data_type=TensorProto.FLOAT, dims=[9]), location=location)
        change(folder, lambda model: place(model, tensor))
        expected = "link" if location == "link" else f"takes its data from {location!r}"
        with pytest.raises(InputRefusedError, match=re.escape(expected)) as info:
            open_folder(folder)
        assert "hostile" in str(info.value)
        assert str(folder) in str(info.value)

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"offset": -4}, "-4"),
            ({"length": 4 * R * N - 4}, f"its shape needs {4 * R * N}"),
            ({"length": 4 * R * N + 4}, f"its shape needs {4 * R * N}"),
            ({"length": -1}, "-1"),
            ({"offset": 10**15}, "the file is cut short"),
            ({"offset": "four"}, "malformed external data"),
            ({"length": "1e3"}, "malformed external data"),
        ],
    )
    def test_another_range_than_the_shape_needs_is_refused(
        self, entries: dict[str, Any], message: str, folder: Path
    ) -> None:
        change(folder, lambda model: external(initializer(model), **entries))
        refused(folder, WEIGHT, message)

    @pytest.mark.parametrize(
        ("field", "value"),
        [("dims", [R, N + 1]), ("dims", [R, -N]), ("data_type", 0), ("data_type", 99), ("data_type", 8)],
    )
    def test_a_shape_or_type_that_the_data_cannot_have_is_refused(self, field: str, value: Any, folder: Path) -> None:
        def edit(model: onnx.ModelProto) -> None:
            tensor = initializer(model)
            if field == "dims":
                tensor.dims[:] = value
            else:
                tensor.data_type = value

        change(folder, edit)
        refused(folder, str(folder / "model.onnx"), WEIGHT)

    def test_a_length_left_out_is_taken_from_the_shape(self, folder: Path) -> None:
        change(folder, lambda model: external(initializer(model), length=None))
        open_folder(folder)
        change(folder, lambda model: initializer(model).dims.append(1000))
        refused(folder, WEIGHT, "the file is cut short")


class TestManifest:
    def changed(self, folder: Path, **fields: Any) -> None:
        manifest = {key: value for key, value in (MANIFEST | fields).items() if value != "absent"}
        (folder / "pifa.json").write_text(json.dumps(manifest))

    @pytest.mark.parametrize("schema", [0, 2, "1", None, "absent"])
    def test_an_unknown_schema_is_refused(self, schema: Any, folder: Path) -> None:
        self.changed(folder, schema=schema)
        shown = None if schema == "absent" else schema
        refused(folder, str(folder / "pifa.json"), f"schema is {shown!r}, this program reads 1")

    @pytest.mark.parametrize("dtype", ["absent", None, "int3", "float32", 16, ["fp16"], {}])
    def test_a_missing_or_unknown_dtype_is_refused(self, dtype: Any, folder: Path) -> None:
        self.changed(folder, dtype=dtype)
        shown = None if dtype == "absent" else dtype
        refused(folder, str(folder / "pifa.json"), f"dtype is {shown!r}, expected one of fp32, fp16, bf16")

    @pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
    def test_the_dtypes_of_an_export_are_known(self, dtype: str, folder: Path) -> None:
        self.changed(folder, dtype=dtype)
        assert open_folder(folder).dtype == dtype

    def test_a_hash_that_is_no_text_is_refused(self, folder: Path) -> None:
        self.changed(folder, source_sha256=7)
        refused(folder, str(folder / "pifa.json"), "source_sha256 is 7")

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            (7, "files is 7, expected an object"),
            ({"config.json": "0" * 64}, "files.config.json is '000"),
            ({"config.json": {"bytes": 1}}, "files.config.json.sha256 is None, expected a value"),
            ({"config.json": {"bytes": 1, "sha256": "short"}}, "files.config.json.sha256 is 'short'"),
            ({"config.json": {"bytes": -1, "sha256": "0" * 64}}, "files.config.json.bytes is -1, expected at least 0"),
        ],
    )
    def test_a_malformed_list_of_files_is_refused(self, files: Any, message: str, folder: Path) -> None:
        self.changed(folder, files=files)
        refused(folder, f"{folder / 'pifa.json'}: {message}")

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", "[" * 100_000])
    def test_anything_but_an_object_is_refused(self, text: str, folder: Path) -> None:
        (folder / "pifa.json").write_text(text)
        refused(folder, str(folder / "pifa.json"), "expected a JSON object")

    def test_bytes_that_are_no_text_are_refused(self, folder: Path) -> None:
        (folder / "pifa.json").write_bytes(b"\xff\xfe\x00{}")
        refused(folder, str(folder / "pifa.json"), "not JSON")

    def test_an_empty_object_is_refused(self, folder: Path) -> None:
        (folder / "pifa.json").write_text("{}")
        refused(folder, str(folder / "pifa.json"), "schema is None")


def test_a_manifest_of_another_dtype_than_the_graph_is_refused(folder: Path) -> None:
    def add_cache(model: onnx.ModelProto) -> None:
        shape = ["batch_size", 2, "past_sequence_length", 8]
        model.graph.input.append(helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT16, shape))

    change(folder, add_cache)
    refused(folder, "pifa.json", "'fp32'", "fp16")
