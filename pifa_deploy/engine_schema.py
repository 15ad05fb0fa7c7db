"""The shape of engine.json, and what its fields say of each other: checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pifa_deploy.decoder_step import IDS, PAST
from pifa_deploy.errors import InputRefusedError
from pifa_deploy.json_shape import Fields, Many, Named, One, Shape, validate
from pifa_deploy.onnx_folder import MODEL_FILE, SHA256
from pifa_deploy.targets import BACKENDS

SCHEMA = 1
POINTS = ("min", "opt", "max")
# What a record that does not say with which sizes it was built was built with.
SIZES = {"max_batch_size": 1, "max_input_len": 512, "max_cache_len": 512}
_TEXT, _COUNT = One(type="string"), One(type="integer", least=0)
_NAMES, _COUNTS = Many(item=_TEXT), Named(value=_COUNT)
_CAPABILITIES = Many(item=One(type="string", pattern=r"\d{1,2}\.\d"), least=1)
FILE = {"file": _TEXT, "bytes": One(type="integer", least=1), "sha256": SHA256}
LAYER = dict.fromkeys(("name", "type", "precision"), _TEXT)
_OPTIONS: dict[str, Shape] = {
    **dict.fromkeys(SIZES, One(type="integer", least=1)),
    "sparsity": _TEXT,
    "tf32": One(type="boolean"),
    "plugin_library": Fields(required={"file": _TEXT, "op_version": _COUNT}, null=True),
}
_SHAPE = Fields(
    required={
        "schema": One(type="integer", values=(SCHEMA,)),
        "backend": One(type="string", values=BACKENDS),
        "version": _TEXT,
        "onnx": Fields(required={"sha256": Named(value=SHA256)}),
        "compute_capabilities": _CAPABILITIES,
        "profiles": Many(
            item=Named(value=Fields(required=dict.fromkeys(POINTS, Many(item=_COUNT)))),
            least=1,
        ),
        "engines": Many(item=Fields(required={**FILE, "compute_capabilities": _CAPABILITIES}), least=1),
        "seconds": One(type="number"),
        "peak_rss_bytes": _COUNT,
    },
    optional={
        "targets": _NAMES,
        "layers": Many(item=Fields(required=LAYER, optional={"modules": _NAMES})),
        "precision_histogram": _COUNTS,
        "network": Fields(
            optional={
                "layers": _COUNT,
                "precision_histogram": _COUNTS,
                "modules": _NAMES,
                "linears": Named(value=_TEXT),
            }
        ),
        "memory": _COUNTS,
        "options": Fields(optional=_OPTIONS),
        "sparse_weights": One(type="boolean"),
        "tokenizer": _NAMES,
    },
)


def check_engine_json(value: Mapping[str, Any], where: str) -> None:
    """Checks the content of engine.json.

    Args:
        value: as `json.loads` gives it.
        where: names the file in errors.

    Raises:
        InputRefusedError: a field is missing, has a value outside the contract, or does not go with another.
    """
    where = f"{where}: engine"
    validate(value, _SHAPE, where)
    _check_names(value, where)
    _check_capabilities(value, where)
    for i, profile in enumerate(value["profiles"]):
        _check_profile(profile, f"{where}.profiles[{i}]")


def _expect(holds: bool, where: str, found: object, expected: str) -> None:
    if not holds:
        raise InputRefusedError(f"{where} is {found!r}, expected {expected}; build the engine again")


def _check_names(value: Mapping[str, Any], where: str) -> None:
    """Raises for a file outside the folder, and for an origin without its graph."""
    named = value["onnx"]["sha256"]
    _expect(MODEL_FILE in named, f"{where}.onnx.sha256", sorted(named), f"{MODEL_FILE} among them")
    files = {f"engines[{i}].file": engine["file"] for i, engine in enumerate(value["engines"])}
    files |= {f"tokenizer[{i}]": name for i, name in enumerate(value.get("tokenizer", ()))}
    for place, name in files.items():
        plain = name not in ("", ".", "..") and Path(name).name == name
        _expect(plain, f"{where}.{place}", name, "a file name inside the folder")


def _check_capabilities(value: Mapping[str, Any], where: str) -> None:
    """Raises where the engine files and the record do not say the same."""
    built_for = value["compute_capabilities"]
    for i, engine in enumerate(value["engines"]):
        found = engine["compute_capabilities"]
        expected = f"some of {built_for}, the record's compute_capabilities"
        _expect(set(found) <= set(built_for), f"{where}.engines[{i}].compute_capabilities", found, expected)
    served = {each for engine in value["engines"] for each in engine["compute_capabilities"]}
    expected = f"{sorted(served)}, those of its engines"
    _expect(served == set(built_for), f"{where}.compute_capabilities", built_for, expected)


def _check_profile(profile: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Raises where a decoder's input has another rank, or the points of an input are no range."""
    for name, points in profile.items():
        is_ids = name in IDS
        rank = 2 if is_ids else 4 if name.startswith(f"{PAST}.") else len(points["max"])
        for point in POINTS:
            _expect(len(points[point]) == rank, f"{where}.{name}.{point}", points[point], f"{rank} sizes")
        ordered = all(low <= opt <= high for low, opt, high in zip(*map(points.get, POINTS), strict=True))
        shown = ", ".join(f"{point} {points[point]}" for point in POINTS)
        _expect(ordered, f"{where}.{name}", shown, "min <= opt <= max in each place")
        _expect(not is_ids or min(points["max"]) >= 1, f"{where}.{name}.max", points["max"], "sizes of at least 1")
