"""The reader of hostile files: allow-list, tensor bounds, pickle stream, zip file."""

from __future__ import annotations

import builtins
import functools
import os
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from research_fixtures import (
    archive_of,
    compressed,
    global_only,
    imported,
    refused,
    rewritten,
    save_research,
    tiny_llama,
    untouched,
)

from pifa_deploy.errors import InputRefusedError
from pifa_deploy.importers.restricted_pickle import ALLOWED, NAMESPACES, InertRecord, load
from pifa_deploy.importers.torch_archive import PickledTensor, TorchArchive


def graph_of(path: Path) -> object:
    with TorchArchive(path) as archive:
        return load(archive)


class Calls:
    """Pickles as a call of `function` with `arguments`, then BUILD with `state`."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("__builtin__", "getattr"),
        ("builtins", "__import__"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("torch.hub", "load"),
        ("torch", "nn.modules.os.system"),
        ("transformersX", "Model"),
        ("utilsX.utils", "SVDLinear"),
        ("collections", "defaultdict"),
        ("copyreg", "_reconstructor"),
        ("pifa_deploy.importers", "import_checkpoint"),
    ],
)
def test_a_global_off_the_allow_list_is_refused_by_name(tmp_path, module, name):
    path = archive_of(tmp_path / "m.pt", global_only(module, name))
    shown = f"{module.replace('__builtin__', 'builtins')}.{name}"
    with pytest.raises(InputRefusedError, match=f"m.pt: data.pkl names the global {shown}, which is not on"):
        imported(path, tmp_path / "out")
    assert untouched(tmp_path / "out")


@pytest.mark.parametrize(
    "payload",
    [
        Calls(os.system, "touch pwned"),
        Calls(builtins.eval, "open('pwned', 'w')"),
        Calls(getattr, "text", "upper"),
        functools.partial(os.system, "touch pwned"),
    ],
    ids=["os.system", "eval", "getattr", "partial"],
)
def test_a_file_that_would_run_something_is_refused_and_runs_nothing(tmp_path, monkeypatch, payload):
    monkeypatch.chdir(tmp_path)
    packed, _ = compressed(tiny_llama(), "svd")
    packed.payload = payload
    with pytest.raises(InputRefusedError, match="nothing of the file was run"):
        imported(save_research(tmp_path / "m.pt", packed), tmp_path / "out")
    assert untouched(tmp_path / "out")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(("module", "name"), [("transformers.no_such_module", "f"), ("utils", "x"), ("torch.nn", "y")])
def test_a_global_of_a_known_package_becomes_a_record_that_nobody_calls(tmp_path, module, name):
    called = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"K\x07\x85R}X\x01\x00\x00\x00aK\x01sb."
    found = graph_of(archive_of(tmp_path / "m.pt", called))
    assert isinstance(found, InertRecord)
    assert (found.origin, found.arguments, found.attributes) == (f"{module}.{name}", (7,), {"a": 1})
    assert module == "torch.nn" or module not in sys.modules


def test_a_record_remembers_elements_and_entries(tmp_path):
    stream = b"\x80\x02ctransformers\nBag\n)\x81(K\x01K\x02e(K\x03K\x04u."
    found = graph_of(archive_of(tmp_path / "m.pt", stream))
    assert (found.elements, found.entries) == ([1, 2], {3: 4})


def test_every_allowed_global_says_why():
    assert all(len(reason) > 8 for _, reason in ALLOWED.values())
    assert all(len(reason) > 8 for reason in NAMESPACES.values())


def test_plain_torch_values_are_read(tmp_path):
    values = {
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:1"),
        "size": torch.Size([2, 3]),
        "set": {1},
        "frozen": frozenset({2}),
        "bytes": bytes(range(256)),
        "ordered": OrderedDict(a=1),
    }
    torch.save(values, tmp_path / "m.pt")
    assert graph_of(tmp_path / "m.pt") == {**values, "device": "cuda:1", "size": (2, 3), "ordered": {"a": 1}}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.uint8])
def test_tensors_of_every_dtype_are_read(tmp_path, dtype):
    truth = torch.arange(12).reshape(3, 4).to(dtype)
    torch.save(
        [truth, truth.T, truth[1:, ::2], torch.empty(0, 3, dtype=dtype), truth[1, 1].expand(4)], tmp_path / "m.pt"
    )
    with TorchArchive(tmp_path / "m.pt") as archive:
        found = [tensor.read() for tensor in load(archive)]
    expected = [truth, truth.T, truth[1:, ::2], torch.empty(0, 3, dtype=dtype), truth[1, 1].expand(4)]
    assert all(
        torch.equal(a, b) and a.dtype == dtype and a.is_contiguous() for a, b in zip(found, expected, strict=True)
    )
    found[0].zero_()
    assert torch.equal(found[1], truth.T)


def placed(offset, size, stride):
    storage = torch.zeros(8).storage()
    return Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (3, 4), (4, 1)),
        (1, (8,), (1,)),
        (9, (0,), (1,)),
        (0, (2, 2), (2**61, 1)),
        (0, (2**40, 2**40), (0, 0)),
        (0, (2**70,), (0,)),
        (-1, (2,), (1,)),
        (4, (2,), (-1,)),
        (0, (-2,), (1,)),
        (0, (True,), (1,)),
        (0, (2,), (1, 1)),
        (0, [2], [1]),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, offset, size, stride):
    torch.save(placed(offset, size, stride), tmp_path / "m.pt")
    with pytest.raises(InputRefusedError, match=r"m.pt: a tensor on data/0 .*expected"):
        graph_of(tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("size", [(2**40,), (2**18 + 16 * 8 + 1,)])
def test_a_tensor_that_repeats_its_storage_without_measure_is_refused(tmp_path, size):
    torch.save(placed(0, size, (0,)), tmp_path / "m.pt")
    assert (tmp_path / "m.pt").stat().st_size < 2000
    with pytest.raises(InputRefusedError, match=r"m.pt: a tensor on data/0 .*repeats the 32 bytes .*expected at most"):
        graph_of(tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_a_tensor_that_repeats_its_storage_a_little_is_read(tmp_path):
    torch.save(placed(0, (2**18 + 16 * 8,), (0,)), tmp_path / "m.pt")
    with TorchArchive(tmp_path / "m.pt") as archive:
        assert load(archive).read().shape == (2**18 + 16 * 8,)


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_a_tensor_whose_checked_bounds_are_changed_afterwards_is_refused(tmp_path):
    attack = placed(0, (2,), (1,))
    attack.parts = (*attack.parts, {"shape": (9**9,)})
    torch.save(attack, tmp_path / "m.pt")
    with pytest.raises(InputRefusedError, match="sets the state of a PickledTensor"):
        graph_of(tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_a_tensor_with_a_lazy_negation_is_refused(tmp_path):
    flagged = placed(0, (2,), (1,))
    flagged.parts = (flagged.parts[0], (*flagged.parts[1], {"neg": True}))
    torch.save(flagged, tmp_path / "m.pt")
    with pytest.raises(InputRefusedError, match="carries flags"):
        graph_of(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"\x80\x02N.x", "has 1 bytes after its end"),
        (b"\x80\x02N.\x80\x02N.", "has 4 bytes after its end"),
        (b"\x80\x02N", "no sound pickle"),
        (b"", "no sound pickle"),
        (b"\x80\x02\xff.", "no sound pickle"),
        (b"\x80\x02R.", "no sound pickle"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"Pid\n.", "opcode PERSID"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "memo index 2147483647"),
        (b"\x80\x02X\xff\xff\xff\x7fab.", "no sound pickle"),
        (b"\x80\x02}()" + b"\x85" * 300_000 + b"K\x01u.", "nests objects more than 400 deep"),
        (b"\x80\x02]" + b"q\x00\x85" * 300_000 + b".", "nests objects more than 400 deep"),
        (b"\x80\x02N" + b"q\x00h\x00\x86" * 300_000 + b".", "nests objects more than 400 deep"),
        (b"\x80\x02h\x05.", "no sound pickle"),
        (b"\x80\x02e.", "no sound pickle"),
        (b"\x80\x02K\x01Q.", "a persistent id is no"),
        # A class of the reader itself must stay as it is: BUILD with a slot state sets attributes.
        (b"\x80\x02ctorch\nSize\n(N}X\x07\x00\x00\x00__new__K\x01stb.", "no sound pickle"),
        (b"\x80\x02ctransformers\nA\n(N}X\x06\x00\x00\x00originK\x01stb.", "no sound pickle"),
    ],
    ids=range(18),
)
def test_a_stream_that_torch_would_not_write_is_refused(tmp_path, stream, message):
    with pytest.raises(InputRefusedError, match=rf"m.pt: data.pkl .*{message}"):
        imported(archive_of(tmp_path / "m.pt", stream), tmp_path / "out")
    assert untouched(tmp_path / "out")


# --- the zip file around it


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    packed, _ = compressed(tiny_llama(), "svd")
    return save_research(tmp_path_factory.mktemp("good") / "good.pt", packed)


def test_bytes_after_the_pickle_are_refused(good, tmp_path):
    path = rewritten(good, tmp_path / "m.pt", lambda name, data: data + b"!!" if name == "data.pkl" else data)
    refused(path, tmp_path / "out", r"m.pt: data.pkl has 2 bytes after its end, expected none")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(good, tmp_path, kept):
    content = good.read_bytes()
    (tmp_path / "m.pt").write_bytes(content[: int(len(content) * kept)])
    refused(tmp_path / "m.pt", tmp_path / "out", "m.pt: starts as a zip file but is cut short")


@pytest.mark.parametrize("content", [b"", b"hello world", b"{}" * 50, b"\x00" * 100])
def test_a_file_that_is_no_zip_is_refused(tmp_path, content):
    (tmp_path / "m.pt").write_bytes(content)
    refused(tmp_path / "m.pt", tmp_path / "out", "m.pt: begins with .* expected a zip file written by torch.save")


def test_the_old_format_without_zip_is_refused_with_advice(tmp_path):
    torch.save({"model": torch.zeros(2)}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "m.pt", tmp_path / "out", "format of torch before 1.6.*save it again")


def test_a_storage_shorter_than_announced_is_refused(good, tmp_path):
    path = rewritten(good, tmp_path / "m.pt", lambda name, data: data[:-4] if name == "data/0" else data)
    refused(path, tmp_path / "out", r"m.pt: good/data/0 has 5116 bytes, expected 5120")


def test_a_missing_storage_is_refused(good, tmp_path):
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(tmp_path / "m.pt", "w") as new:
        for name in old.namelist():
            if not name.endswith("data/3"):
                new.writestr(name, old.read(name))
    refused(tmp_path / "m.pt", tmp_path / "out", "m.pt: storage '3' has no member 'good/data/3'")


def test_a_flipped_bit_is_refused(good, tmp_path):
    with zipfile.ZipFile(good) as file:
        info = next(info for info in file.infolist() if info.filename.endswith("/data/0"))
    content = bytearray(good.read_bytes())
    name_bytes, extra_bytes = struct.unpack_from("<HH", content, info.header_offset + 26)
    content[info.header_offset + 30 + name_bytes + extra_bytes + 8] ^= 1
    (tmp_path / "m.pt").write_bytes(content)
    refused(tmp_path / "m.pt", tmp_path / "out", r"m.pt: good/data/0 is damaged \(Bad CRC-32")


def test_compressed_members_are_refused(good, tmp_path):
    path = rewritten(good, tmp_path / "m.pt", lambda _, data: data, compression=zipfile.ZIP_DEFLATED)
    refused(path, tmp_path / "out", "m.pt: 'good/data.pkl' is compressed or encrypted")


def test_members_that_overlap_are_refused(good, tmp_path):
    content = bytearray(good.read_bytes())
    # Each entry of the central directory gets the sizes of a member as large as the file.
    at, entries = 0, 0
    while (at := content.find(b"PK\x01\x02", at)) >= 0:
        struct.pack_into("<II", content, at + 20, len(content) - 1, len(content) - 1)
        at, entries = at + 46, entries + 1
    assert entries > 3
    (tmp_path / "m.pt").write_bytes(content)
    refused(tmp_path / "m.pt", tmp_path / "out", r"m.pt: its members claim \d+ bytes, expected at most")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(good, tmp_path):
    (tmp_path / "m.pt").write_bytes(good.read_bytes())
    with zipfile.ZipFile(tmp_path / "m.pt", "a") as file:
        file.writestr("good/data.pkl", b"\x80\x02N.")
    refused(tmp_path / "m.pt", tmp_path / "out", "m.pt: two members have the same name")


def test_a_big_endian_file_is_refused(good, tmp_path):
    path = rewritten(good, tmp_path / "m.pt", lambda name, data: b"big" if name == "byteorder" else data)
    refused(path, tmp_path / "out", "m.pt: its byteorder is b'big', expected b'little'")


def test_a_zip_file_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as file:
        file.writestr("readme.txt", "hello")
    refused(tmp_path / "m.pt", tmp_path / "out", "m.pt: it holds 0 members <name>/data.pkl, expected exactly one")


def test_tensors_are_not_read_before_they_are_needed(good):
    with TorchArchive(good) as archive:
        graph = load(archive)
        weight = graph["model"].attributes["_modules"]["lm_head"].attributes["_parameters"]["weight"]
        assert isinstance(weight, PickledTensor)
        assert (weight.shape, weight.dtype, archive._cache) == ((40, 32), torch.float32, {})
