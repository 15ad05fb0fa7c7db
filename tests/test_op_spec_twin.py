"""The operators' contract stands in two languages; here they are one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pifa_deploy import op_spec

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What plugins/pifaLinear/pifaLinearSpec.h says."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path_factory.mktemp("spec") / "print_spec"
    source = PLUGINS / "tests" / "printSpec.cpp"
    command = [compiler, "-std=c++17", "-I", str(PLUGINS / "pifaLinear"), str(source), "-o", str(program)]
    subprocess.run(command, check=True, timeout=60)
    printed: dict[str, Any] = json.loads(subprocess.check_output([program], timeout=10))
    return printed


def test_namespace_and_versions_are_the_same(spec: dict[str, Any]) -> None:
    assert spec["namespace"] == op_spec.PLUGIN_NAMESPACE == op_spec.DOMAIN
    assert spec["version"] == op_spec.PLUGIN_VERSION
    assert spec["op_version"] == op_spec.OP_VERSION


def test_attributes_are_the_same_and_in_the_same_order(spec: dict[str, Any]) -> None:
    assert tuple(spec["integers"]) == op_spec.INT_ATTRIBUTES
    assert tuple(spec["texts"]) == op_spec.STRING_ATTRIBUTES


def test_operators_have_the_same_forms(spec: dict[str, Any]) -> None:
    assert {name: op["form"] for name, op in spec["ops"].items()} == op_spec.FORMS
    assert all(op["is_column"] == (op["form"] == "column") for op in spec["ops"].values())


def test_operators_have_the_same_inputs_in_the_same_order(spec: dict[str, Any]) -> None:
    expected = {name: list(op_spec.inputs_of(name, bias=True)) for name in op_spec.FORMS}
    assert {name: op["inputs"] for name, op in spec["ops"].items()} == expected
