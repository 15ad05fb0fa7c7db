"""Several processes compress one model as one process does; when one fails all end soon, with one line."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_fixtures import Outcome, content
from conftest import projections
from torch.distributed import HashStore

from pifa_deploy.cli.main import main, run
from pifa_deploy.compression import pipeline
from pifa_deploy.compression.distributed import PeerError, processes
from pifa_deploy.errors import FactorizationError
from pifa_deploy.model_folder import load_model

pytest_plugins = ("cli_plugin",)

USAGE, STAGE_FAILED, MISFIT = 2, 4, 5
RELATIVE = 1e-5
# Five windows make three batches: one process has two of them, the other one, which is the smaller.
BATCHES = ("--calibration-samples", "5", "--sequence-length", "32", "--batch-tokens", "64")
SOON = 60.0  # seconds; on a free machine it is less than ten


def arguments(source: Path, out: Path, text: Path, *more: str) -> list[str]:
    options = more or ("--density", "0.5", "--format", "pifa")
    return ["compress", str(source), str(out), "--calibration", str(text), *BATCHES, *options]


def free_port() -> int:
    """Returns a port that nobody uses, and that the kernel gives nobody who asks for any: it gives higher ones."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def linear_maps(folder: Path) -> dict[str, torch.Tensor]:
    """Returns what the linears of a checkpoint multiply with, as float64 matrices."""
    model = load_model(folder, dtype=torch.float32)
    maps = {}
    for name in projections(model):
        layer = model.get_submodule(name).double()
        with torch.no_grad():
            maps[name] = layer(torch.eye(layer.in_features, dtype=torch.float64)).T
    return maps


def assert_same_model(one: Path, other: Path) -> None:
    expected, found = linear_maps(one), linear_maps(other)
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        assert float((found[name] - matrix).norm() / matrix.norm()) < RELATIVE, name
    state, others = (load_model(folder, dtype=torch.float32).state_dict() for folder in (one, other))
    assert state.keys() == others.keys()
    # Where two rows are equally good pivots rounding chooses, so pivots may differ and products not.
    rows = [name for name in state if name.endswith(".pivot_rows")]
    agreeing = [name for name in rows if torch.equal(state[name], others[name])]
    assert 2 * len(agreeing) >= len(rows)
    for name in agreeing:
        for suffix in ("pivot_weight", "coefficients"):
            key = name.replace("pivot_rows", suffix)
            assert float((state[key] - others[key]).norm()) <= RELATIVE * float(state[key].norm()), key


@pytest.fixture(scope="module")
def alone(dense: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`alone(*options)` gives what one process writes."""
    made: dict[tuple[str, ...], Path] = {}

    def folder(*more: str) -> Path:
        if more not in made:
            made[more] = tmp_path_factory.mktemp("alone") / "out"
            assert run(arguments(dense, made[more], text, *more)) == 0
        return made[more]

    return folder


# Processes of our own: no torchrun, and forked from one that has imported everything


def member(rank: int, count: int, port: int, streams: Path, line: list[str], fault: str) -> None:
    """Is one of `count` processes that run the same command line."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(streams / f"{name}.{rank}", os.O_CREAT | os.O_WRONLY), descriptor)
    kind, _, place = fault.partition(" of ")
    if place == str(rank):
        plant(kind)
    main(line)


def plant(kind: str) -> None:
    real, calls = pipeline.solve_group, 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:  # in the second layer
            if kind == "death":
                os.kill(os.getpid(), signal.SIGKILL)
            raise FactorizationError("planted")
        return real(*args, **kwargs)

    pipeline.solve_group = faulty


class Group:
    """How the processes of a group ended."""

    def __init__(self, streams: Path, codes: list[int], seconds: float) -> None:
        self.codes, self.seconds = codes, seconds
        self.told = [
            Outcome(code, *((streams / f"{name}.{rank}").read_text() for name in ("out", "err")))
            for rank, code in enumerate(codes)
        ]

    def failed(self, code: int, pattern: str) -> None:
        """Asserts that the first process told one line, the others nothing, and that all ended soon."""
        self.told[0].failed(code, pattern)
        assert all(codes != 0 for codes in self.codes)
        # torch itself may warn that the store of the first process is gone, which torchrun's own never is.
        ours = re.compile("^(error|note|layer|compress|time|Traceback)", re.MULTILINE)
        assert not any(outcome.out or ours.search(outcome.err) for outcome in self.told[1:])
        assert self.seconds < SOON


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Group]:
    """`together(line, others=line, count=2, fault="")` runs a command line in a group of processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pytest", "pifa_deploy.compression", "transformers.models.llama.modeling_llama", "tokenizers"]
    )
    first = context.Process(target=int)  # after the imports, which take longer than a group may
    first.start()
    first.join()

    def group_of(line: list[str], *, others: list[str] | None = None, count: int = 2, fault: str = "") -> Group:
        streams, port = tmp_path_factory.mktemp("streams"), free_port()
        started = time.monotonic()
        lines = [line] + [others or line] * (count - 1)
        processes = [
            context.Process(target=member, args=(rank, count, port, streams, lines[rank], fault))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            if process.exitcode is None:
                process.kill()
                process.join()
        return Group(streams, [process.exitcode or 0 for process in processes], time.monotonic() - started)

    return group_of


def test_a_process_on_another_machine_needs_model_and_text_and_not_the_output(
    dense: Path, text: Path, tmp_path: Path, alone: Any, together: Any
) -> None:
    copied = [Path(shutil.copytree(dense, tmp_path / "b" / "model")), tmp_path / "b" / "text.txt"]
    shutil.copyfile(text, copied[1])
    (tmp_path / "a").mkdir()
    here = arguments(dense, tmp_path / "a" / "out", text)
    there = arguments(copied[0], Path("/proc/nowhere/out"), copied[1])
    group = together(here, others=there)
    assert group.codes == [0, 0], group.told[0].err
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"out"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"model", "text.txt"}
    assert_same_model(alone(), tmp_path / "a" / "out")


METHODS = {
    "mpifa": (),
    "mpifa in fp16 as lowrank": ("--density", "0.5", "--format", "lowrank", "--dtype", "fp16"),
    "whitened by effective rank": ("--density", "0.5", "--method", "whitened", "--layer-density", "effective-rank"),
    "svd": ("--density", "0.5", "--method", "svd"),
}


@pytest.mark.parametrize(("method", "count"), [*((name, 2) for name in METHODS), ("mpifa", 3)])
def test_a_group_makes_what_one_process_makes(
    method: str, count: int, dense: Path, text: Path, tmp_path: Path, alone: Any, together: Any
) -> None:
    group = together(arguments(dense, tmp_path / "out", text, *METHODS[method]), count=count)
    assert group.codes == [0] * count, group.told[0].err
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert_same_model(alone(*METHODS[method]), tmp_path / "out")


def test_a_group_prunes_what_one_process_prunes(
    dense: Path, text: Path, tmp_path: Path, alone: Any, together: Any
) -> None:
    more = ("--method", "sparsegpt")
    assert together(arguments(dense, tmp_path / "out", text, *more)).codes == [0, 0]
    assert_same_model(alone(*more), tmp_path / "out")


def test_more_processes_than_batches_are_refused(dense: Path, text: Path, tmp_path: Path, together: Any) -> None:
    group = together(arguments(dense, tmp_path / "out", text), count=4)
    group.failed(USAGE, "5 calibration windows make 3 batches for 4 processes; expected at least one each, give more")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_text_ends_all_with_one_line(dense: Path, tmp_path: Path, together: Any) -> None:
    together(arguments(dense, tmp_path / "out", tmp_path / "absent.txt")).failed(USAGE, "absent.txt: no such text file")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_ends_all_with_one_line(
    dense: Path, checkpoint: Path, text: Path, tmp_path: Path, together: Any
) -> None:
    shutil.copytree(checkpoint, tmp_path / "out")
    before = content(tmp_path)
    together(arguments(dense, tmp_path / "out", text)).failed(USAGE, "out exists; name another output or pass --force")
    assert content(tmp_path) == before


def test_wrong_usage_is_told_by_each_process(dense: Path, text: Path, tmp_path: Path, together: Any) -> None:
    group = together(arguments(dense, tmp_path / "out", text, "--method", "mpifa"))
    assert group.codes == [USAGE, USAGE]
    for outcome in group.told:  # nobody can speak for others before they have met
        outcome.failed(USAGE, "method mpifa needs --density")


@pytest.mark.parametrize("count", [2, 3])
def test_the_first_process_tells_what_failed_in_another(
    count: int, dense: Path, text: Path, tmp_path: Path, together: Any
) -> None:
    group = together(arguments(dense, tmp_path / "out", text), count=count, fault="failure of 1")
    group.failed(STAGE_FAILED, "process 1: planted")


def test_a_state_of_another_seed_ends_all_with_one_line(dense: Path, text: Path, tmp_path: Path, together: Any) -> None:
    together(arguments(dense, tmp_path / "out", text), fault="failure of 0").failed(STAGE_FAILED, "error: planted")
    before = content(tmp_path)
    line = [*arguments(dense, tmp_path / "out", text), "--seed", "1"]
    line[-2:-2] = ["--density", "0.5"]
    together(line).failed(MISFIT, r"windows\.seed 0, now it is 1")
    assert content(tmp_path) == before


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("again", [1, 2])
def test_the_death_of_one_ends_all_and_any_number_goes_on(
    rank: int, again: int, dense: Path, text: Path, tmp_path: Path, alone: Any, together: Any
) -> None:
    line = arguments(dense, tmp_path / "out", text)
    group = together(line, fault=f"death of {rank}")
    assert group.codes[rank] == -signal.SIGKILL
    assert group.codes[1 - rank] == STAGE_FAILED
    assert group.seconds < SOON
    if rank == 1:
        group.told[0].failed(STAGE_FAILED, "another process of this torchrun is gone .*; run the same command again")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.resume" / "layer-00000.safetensors").exists()
    resumed = together(line, count=again)
    assert resumed.codes == [0] * again
    assert re.search(r"^layer 1/2: .* 0\.0 s, ", resumed.told[0].err.replace("\r", ""), re.MULTILINE)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert_same_model(alone(), tmp_path / "out")


# GPUs


@pytest.mark.parametrize("fails", [False, True])
def test_on_gpus_each_process_takes_its_own_before_they_meet(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    store = HashStore()
    store.set("pifa-deploy failure told", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", events.append)
    monkeypatch.setattr(
        sys.modules["torch.distributed.rendezvous"], "rendezvous", lambda *_, **__: iter([(store, 5, 8)])
    )
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, rank, world_size, **_: events.append((backend, rank, world_size)),
    )
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: events.append("end"))
    for name, value in {"WORLD_SIZE": 8, "RANK": 5, "LOCAL_RANK": 1}.items():  # the second GPU of its machine
        monkeypatch.setenv(name, str(value))
    with pytest.raises(PeerError, match="planted") if fails else contextlib.nullcontext(), processes() as group:
        assert (group.rank, group.count, group.device) == (5, 8, torch.device("cuda", 1))
        if fails:
            raise ValueError("planted")
    # The end of an NCCL group waits for processes that a failure may have taken.
    assert events == [torch.device("cuda", 1), ("nccl", 5, 8), *([] if fails else ["end"])]


# torchrun


@pytest.fixture
def torchrun() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`torchrun("-m", "module", ...)` starts two processes by torchrun."""
    running: list[subprocess.Popen[str]] = []

    def start(*line: str) -> subprocess.Popen[str]:
        launcher = ["torch.distributed.run", "--nproc-per-node", "2"]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # a port that it binds itself
        process = subprocess.Popen(
            [sys.executable, "-m", *launcher, *line],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.terminate()  # torchrun ends its workers
        process.communicate()


def ended(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate()
    return Outcome(process.returncode, out, err)


def worker(launcher: subprocess.Popen[str], rank: int) -> int:
    """Returns the process id of a worker of torchrun."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no worker {rank} among {children}")


MODULE = ("-m", "pifa_deploy.cli.main")


def test_under_torchrun_one_process_prints_and_writes(
    dense: Path, text: Path, tmp_path: Path, alone: Any, torchrun: Any
) -> None:
    outcome = ended(torchrun(*MODULE, *arguments(dense, tmp_path / "out", text)))
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("linears at density") == 1
    lines = outcome.err.splitlines()
    assert [line.partition(":")[0] for line in lines if line.startswith("layer ")] == ["layer 1/2", "layer 2/2"]
    assert sum(line.startswith("compress ") for line in lines) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert_same_model(alone(), tmp_path / "out")


def test_under_torchrun_the_death_of_one_ends_all_and_the_rest_goes_on(
    dense: Path, text: Path, tmp_path: Path, torchrun: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    line = arguments(dense, tmp_path / "out", text)
    line[line.index("--calibration-samples") + 1] = "1200"  # seconds a layer
    process = torchrun(*MODULE, *line)
    first = tmp_path / ".out.resume" / "layer-00000.safetensors"
    while not first.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    started = time.monotonic()
    os.kill(worker(process, 1), signal.SIGKILL)
    outcome = ended(process)
    assert time.monotonic() - started < SOON
    assert outcome.code != 0
    assert outcome.errors == [line for line in outcome.errors if "is gone" in line or "terminated" in line]
    assert len(outcome.errors) == 1, outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {".out.resume"}
    assert run(line) == 0
    assert re.search(r"^layer 1/2: .* 0\.0 s, ", capsys.readouterr().err.replace("\r", ""), re.MULTILINE)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.slow
def test_under_torchrun_a_missing_text_is_one_line(dense: Path, tmp_path: Path, torchrun: Any) -> None:
    outcome = ended(torchrun(*MODULE, *arguments(dense, tmp_path / "out", tmp_path / "absent.txt")))
    assert outcome.code != 0
    assert len(outcome.errors) == 1, outcome.err
    assert re.search(r"^error: (process 1: )?.*absent\.txt: no such text file", outcome.errors[0])
    assert list(tmp_path.iterdir()) == []


BUSY = """
import os, sys, time
from pifa_deploy.cli.main import main, run
from pifa_deploy.compression import pipeline
from pifa_deploy.compression.distributed import PeerError, processes
from pifa_deploy.errors import FactorizationError

def solve(*args, **kwargs):
    if os.environ["RANK"] == "0":
        time.sleep(600)
    raise FactorizationError("planted")

pipeline.solve_group = solve
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_under_torchrun_a_busy_first_process_tells_what_failed_in_another(
    dense: Path, text: Path, tmp_path: Path, torchrun: Any
) -> None:
    (tmp_path / "busy.py").write_text(BUSY)
    started = time.monotonic()
    outcome = ended(torchrun(str(tmp_path / "busy.py"), *arguments(dense, tmp_path / "out", text)))
    assert time.monotonic() - started < 2 * SOON
    assert outcome.code != 0
    assert outcome.errors == ["error: process 1: planted (--debug shows the traceback)"], outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {"busy.py"}


@pytest.mark.slow
def test_under_torchrun_ctrl_c_leaves_the_finished_layers(
    dense: Path, text: Path, tmp_path: Path, torchrun: Any
) -> None:
    line = arguments(dense, tmp_path / "out", text)
    line[line.index("--calibration-samples") + 1] = "2400"
    process = torchrun(*MODULE, *line)
    first = tmp_path / ".out.resume" / "layer-00000.safetensors"
    while not first.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    outcome = ended(process)
    assert outcome.code != 0
    assert "note: the same command, without --restart, goes on after layer 1" in outcome.err.splitlines()
    assert {path.name for path in tmp_path.iterdir()} == {".out.resume"}
