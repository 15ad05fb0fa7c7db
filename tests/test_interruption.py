"""Ctrl-C and a full disk in every stage: one line, the right exit code, and no trace but what was there before."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_fixtures import Outcome, content, passage
from cli_plugin import SMALL
from research_fixtures import compressed, save_research, tiny_llama

from pifa_deploy.calibration import CALIBRATION_TEXT
from pifa_deploy.cli.interruption import Terminated, interruptions_noticed
from pifa_deploy.output_folder import new_folder

pytest_plugins = ("cli_plugin",)

INTERRUPTED, USAGE, STAGE_FAILED = 130, 2, 4
RTX = importlib.util.find_spec("tensorrt_rtx") is not None and importlib.util.find_spec("polygraphy") is not None
needs_rtx = pytest.mark.skipif(not RTX, reason="TensorRT-RTX is not installed: pip install 'pifa-deploy[rtx]'")
CONSOLE = [sys.executable, "-c", "from pifa_deploy.cli.main import main; main()"]

# More work than the test waits for, so that the signal comes while the command is at it.
WRITERS = {
    "compress": (
        *("{dense}", "{out}", "--density", "0.5", "--calibration", "{text}", "--sequence-length", "64"),
        *("--calibration-samples", "100000"),
    ),
    "import": ("{research}", "{out}"),
    "export": ("{checkpoint}", "{out}"),
    "build": ("{onnx}", "{out}"),
}
READERS = {
    "verify": ("{onnx}", "--reference", "{checkpoint}", "--text", "{text}", "--decode-steps", "900"),
    "evaluate": (
        *[f"m{i}={{dense}}" for i in range(50)],
        "--text",
        "{text}",
        "--context",
        "1000",
        "--max-windows",
        "1000",
    ),
}


@pytest.fixture(scope="module")
def places(
    dense: Path, checkpoint: Path, onnx_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "long.txt").write_text(passage(CALIBRATION_TEXT, 400_000), encoding="utf-8")
    research = save_research(folder / "research.pt", compressed(tiny_llama(), "svd")[0])
    return {
        "dense": dense,
        "checkpoint": checkpoint,
        "onnx": onnx_folder,
        "research": research,
        "text": folder / "long.txt",
    }


def command_line(name: str, places: dict[str, Path], out: Path) -> list[str]:
    return [name, *(part.format(**places, out=out) for part in (WRITERS | READERS)[name])]


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`started(arguments)` starts the command line as a process of its own."""
    running: list[subprocess.Popen[str]] = []

    def start(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*CONSOLE, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            **options,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Returns when a process is that far; what goes on too long ends by pytest's own timeout."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def has_loaded(process: subprocess.Popen[str], library: str) -> bool:
    try:
        return library in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return False


def ended(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate()
    return Outcome(process.returncode, out, err)


def processes_that_name(path: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes()
        except OSError:
            continue
        if os.fsencode(str(path)) in line:
            found.append(entry.parent.name)
    return found


def artefact(command: str, places: dict[str, Path], out: Path) -> None:
    """Puts a whole artefact where the command will write."""
    if command in ("compress", "import"):
        shutil.copytree(places["checkpoint"], out)
    elif command == "export":
        shutil.copytree(places["onnx"], out)
    else:
        out.mkdir()
        (out / "engine.json").write_text('{"schema": 1}')


# A command writes from the moment its .partial folder stands. The steps themselves are hit below; here a builder is at
# work, which is a process of its own, and a compression, which keeps what it has finished.
@pytest.mark.parametrize(
    ("command", "delay", "force"),
    [
        ("compress", 0.0, True),
        pytest.param("build", 0.0, False, marks=needs_rtx),
        pytest.param("build", 0.8, True, marks=needs_rtx),
    ],
)
def test_ctrl_c_while_writing_leaves_what_was_there(
    command: str, delay: float, force: bool, places: dict[str, Path], tmp_path: Path, started: Any
) -> None:
    if force:
        artefact(command, places, tmp_path / "out")
    before = content(tmp_path)
    process = started([*command_line(command, places, tmp_path / "out"), *(["--force"] if force else [])])
    wait_for((tmp_path / ".out.partial").is_dir, process)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    ended(process).failed(INTERRUPTED, "^error: interrupted; what existed before is untouched$")
    assert content(tmp_path) == before
    assert processes_that_name(tmp_path) == []


@pytest.mark.parametrize(
    ("command", "library", "delay"),
    [
        ("evaluate", "libtorch_cpu", 0.0),  # in the middle of the imports
        ("evaluate", "libtorch_cpu", 6.0),
        ("verify", "onnxruntime_pybind11_state", 1.0),
    ],
)
def test_ctrl_c_while_measuring_is_one_line(
    command: str, library: str, delay: float, places: dict[str, Path], tmp_path: Path, started: Any
) -> None:
    result = tmp_path / "result.json"
    process = started([*command_line(command, places, tmp_path / "out"), "--json", str(result)])
    wait_for(lambda: has_loaded(process, library), process)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    outcome = ended(process)
    outcome.failed(INTERRUPTED, "^error: interrupted")
    assert outcome.out == ""
    assert list(tmp_path.iterdir()) == []


@needs_rtx
def test_ctrl_c_in_a_terminal_reaches_builder_and_command_at_once(
    places: dict[str, Path], tmp_path: Path, started: Any
) -> None:
    process = started(command_line("build", places, tmp_path / "out"), start_new_session=True)
    wait_for((tmp_path / ".out.partial" / "spec.json").is_file, process)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    ended(process).failed(INTERRUPTED, "^error: interrupted")
    assert list(tmp_path.iterdir()) == []
    assert processes_that_name(tmp_path) == []


# Every step of a stage, hit exactly: the signal is sent from inside it.

STEPS = {
    "compress": [
        "pifa_deploy.compression.load_model",
        "pifa_deploy.compression.calibration_set",
        "pifa_deploy.compression.open_flows",
        "pifa_deploy.compression.pipeline.linear_groups",
        "pifa_deploy.compression.pipeline.solve_group",
        "pifa_deploy.compression.resume.save_file",
        "pifa_deploy.compression.write_result",
        "transformers.PreTrainedModel.save_pretrained",
        "pifa_deploy.compression.result.validate",
        "pifa_deploy.output_folder._swap_in",
    ],
    "import": [
        "pifa_deploy.importers.research.read_research",
        "pifa_deploy.transformers_quantizer.attach",
        "transformers.PreTrainedModel.save_pretrained",
        "pifa_deploy.checkpoint.validate",
        "pifa_deploy.output_folder._swap_in",
    ],
    "export": [
        "pifa_deploy.onnx_export.load_model",
        "pifa_deploy.onnx_export.graph_from_model",
        "pifa_deploy.onnx_export.save_graph",
        "pifa_deploy.onnx_export.save_tokenizer",
        "pifa_deploy.onnx_export.write_json",
        "pifa_deploy.onnx_passes.check",
    ],
    "build": ["pifa_deploy.engine._run_child", "pifa_deploy.engine._record", "pifa_deploy.output_folder._swap_in"],
}
# From here on a compression has finished layers, which are kept for the next run.
LAYERS_DONE = STEPS["compress"][6:]


def without_state(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in content(folder).items() if not name.startswith(".out.resume")}


@pytest.mark.parametrize(("command", "step"), [(command, step) for command in STEPS for step in STEPS[command]])
@pytest.mark.parametrize("force", [False, True], ids=["new", "replacing"])
def test_ctrl_c_in_a_step_leaves_what_was_there(
    command: str,
    step: str,
    force: bool,
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pifa_deploy: Callable[..., Outcome],
) -> None:
    if command == "build":
        fields = {"version": "1", "network": {}, "modules": {}, "seconds": 1.0, "peak_rss_bytes": 1}
        code = f"open('model.engine', 'wb').write(b'e'); open('result.json', 'w').write({json.dumps(fields)!r})"
        monkeypatch.setattr("pifa_deploy.engine._require_builder", lambda backend: None)
        monkeypatch.setattr("pifa_deploy.engine._child_command", lambda spec: [sys.executable, "-c", code])
    if step in STEPS["export"][2:] and command == "export":  # what stands before these steps takes seconds
        monkeypatch.setattr("pifa_deploy.onnx_export.graph_from_model", graph_of(places["onnx"]))
    called = []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        called.append(step)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(step, interrupted)
    if force:
        artefact(command, places, tmp_path / "out")
    before = content(tmp_path)
    arguments = [part.replace("100000", "2") for part in command_line(command, places, tmp_path / "out")]
    outcome = pifa_deploy(*arguments, *(["--force"] if force else []))
    assert called == [step]
    outcome.failed(INTERRUPTED, "^error: interrupted; what existed before is untouched$")
    assert without_state(tmp_path) == before
    assert (tmp_path / ".out.resume").exists() == (command == "compress" and step in LAYERS_DONE)


def graph_of(folder: Path) -> Callable[[Any], Any]:
    import onnx_ir as ir

    from pifa_deploy import onnx_passes

    onnx_passes.register_op_schemas()
    return lambda model: ir.load(folder / "model.onnx")


def test_an_error_that_follows_from_ctrl_c_is_ctrl_c(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, pifa_deploy: Callable[..., Outcome]
) -> None:
    def half_imported(path: Path) -> None:
        with contextlib.suppress(KeyboardInterrupt):  # as some imports do
            signal.raise_signal(signal.SIGINT)
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr("pifa_deploy.inspection.inspect_path", half_imported)
    handler = signal.getsignal(signal.SIGINT)
    pifa_deploy("inspect", checkpoint).failed(INTERRUPTED, "^error: interrupted")
    assert signal.getsignal(signal.SIGINT) is handler


class Finaliser:
    """Does something when it is collected."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def __del__(self) -> None:
        self.action()


def in_a_finaliser(action: Callable[[], object]) -> None:
    Finaliser(action)


def in_a_weak_reference(action: Callable[[], object]) -> None:
    kept = {0}
    reference = weakref.ref(kept, lambda reference: action())
    del kept
    assert reference() is None


def in_an_extension(action: Callable[[], object]) -> None:
    """Calls it as extensions call Python where they print what was raised, and go on."""
    code = f"import ctypes; ctypes.cast({id(action)}, ctypes.py_object).value()"
    assert ctypes.pythonapi.PyRun_SimpleString(code.encode()) == -1


def in_a_library(action: Callable[[], object]) -> None:
    """Calls it as libraries import what they can do without."""
    try:
        try:
            action()
        except KeyboardInterrupt as error:
            raise ImportError("half imported") from error
    except ImportError:
        pass


def in_a_careless_library(action: Callable[[], object]) -> None:
    with contextlib.suppress(BaseException):
        action()


PLACES = [in_a_finaliser, in_a_weak_reference, in_an_extension, in_a_library, in_a_careless_library]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(
    ("number", "code", "line"), [(signal.SIGINT, INTERRUPTED, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_whose_exception_python_drops_is_not_lost(
    where: Callable[[Callable[[], object]], None],
    number: signal.Signals,
    code: int,
    line: str,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    pifa_deploy: Callable[..., Outcome],
) -> None:
    reached = []

    def long_work(path: Path) -> None:
        where(lambda: signal.raise_signal(number))
        reached.append("after")
        time.sleep(30)  # in one system call
        reached.append("end")

    monkeypatch.setattr("pifa_deploy.inspection.inspect_path", long_work)
    hook = sys.unraisablehook
    outcome = pifa_deploy("inspect", checkpoint)
    outcome.failed(code, f"^error: {line}; what existed before is untouched$")
    assert "end" not in reached
    assert sys.unraisablehook is hook


@pytest.mark.parametrize("where", [in_a_finaliser, in_an_extension])
def test_any_other_dropped_error_goes_to_the_hook_that_was_there(
    where: Callable[[Callable[[], object]], None],
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    pifa_deploy: Callable[..., Outcome],
) -> None:
    heard: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: heard.append(what.exc_type))
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: heard.append(kind))
    monkeypatch.setattr("pifa_deploy.inspection.inspect_path", lambda path: where(lambda: {}["absent"]))
    pifa_deploy("inspect", checkpoint)
    assert heard == [KeyError]


# While a failure is told, and while what is half written is removed.

TOLD = """
import signal, sys
from pifa_deploy.cli import main
failed = main._failed
def struck(*told):
    signal.raise_signal(signal.{name})
    line = failed(*told)
    signal.raise_signal(signal.{name})
    return line
main._failed = struck
sys.exit(main.run(["no-such-command"]))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_a_failure_is_told_changes_nothing(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", TOLD.format(name=name)], capture_output=True, text=True, check=False)
    Outcome(done.returncode, done.stdout, done.stderr).failed(USAGE, "^error: No such command 'no-such-command'")


def interrupted_once(number: signal.Signals) -> None:
    signal.raise_signal(number)


def another_failed(number: signal.Signals) -> None:
    raise RuntimeError("another process of this torchrun is gone")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("end", [interrupted_once, another_failed])
@pytest.mark.parametrize(("owner", "name"), [(shutil, "rmtree"), (Path, "unlink"), (os, "close")])
def test_a_signal_that_meets_the_clean_up_takes_effect_after_it(
    owner: Any,
    name: str,
    end: Callable[[signal.Signals], None],
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, struck = getattr(owner, name), []

    def hit(*arguments: Any, **options: Any) -> None:
        if not struck:
            struck.append(name)
            signal.raise_signal(number)
        real(*arguments, **options)

    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt) as caught,
        interruptions_noticed() as interruptions,
        interruptions.raised(),
        new_folder(tmp_path / "out") as folder,
    ):
        (folder / "half").touch()
        monkeypatch.setattr(owner, name, hit)
        end(number)
    monkeypatch.undo()
    assert struck == [name]
    assert isinstance(caught.value, Terminated) == (number == signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []


# No space


def fill(disk: Path) -> None:
    descriptor = os.open(disk / "ballast", os.O_CREAT | os.O_WRONLY)
    try:
        with contextlib.suppress(OSError):  # no space left, in the end
            while os.write(descriptor, bytes(4096)):
                pass
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=needs_rtx if name == "build" else ()) for name in WRITERS]
)
def test_no_space_is_told_and_leaves_nothing(
    command: str,
    places: dict[str, Path],
    full_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    pifa_deploy: Callable[..., Outcome],
) -> None:
    arguments = [part.replace("100000", "2") for part in command_line(command, places, full_disk / "out")]
    if command == "compress":  # the layers would fit, and the test below has that case
        fill(full_disk)
    if command == "export":
        monkeypatch.setattr("pifa_deploy.onnx_export.graph_from_model", graph_of(places["onnx"]))
    if command in ("import", "build"):  # the tiny research model fits, and a builder needs more than its output
        fill(full_disk)
    before = content(full_disk)
    pifa_deploy(*arguments).failed(STAGE_FAILED, "disk/out could not be written: .*; free some space and run")
    assert content(full_disk) == before


def test_after_a_full_disk_a_compression_goes_on_where_it_was(
    places: dict[str, Path], full_disk: Path, pifa_deploy: Callable[..., Outcome]
) -> None:
    arguments = [part.replace("100000", "2") for part in command_line("compress", places, full_disk / "out")]
    outcome = pifa_deploy(*arguments)
    outcome.failed(STAGE_FAILED, "disk/out could not be written: .*; free some space and run the command again")
    assert "note: the same command, without --restart, goes on after layer 2" in outcome.err.splitlines()
    assert [path.name for path in full_disk.iterdir()] == [".out.resume"]
    subprocess.run(["mount", "-o", f"remount,size={10 * SMALL}", str(full_disk)], check=True)
    outcome = pifa_deploy(*arguments)
    assert outcome.code == 0
    assert outcome.err.count(", 0.0 s, 0 s left") == 2
    assert [path.name for path in full_disk.iterdir()] == ["out"]


def test_no_space_leaves_the_forced_output_whole(
    places: dict[str, Path], full_disk: Path, monkeypatch: pytest.MonkeyPatch, pifa_deploy: Callable[..., Outcome]
) -> None:
    monkeypatch.setattr("pifa_deploy.onnx_export.graph_from_model", graph_of(places["onnx"]))
    (full_disk / "out").mkdir()
    (full_disk / "out" / "pifa.json").write_text('{"schema": 1, "artefact": "onnx"}')
    before = content(full_disk)
    outcome = pifa_deploy(*command_line("export", places, full_disk / "out"), "--force")
    outcome.failed(STAGE_FAILED, "free some space")
    assert content(full_disk) == before


def test_no_space_for_the_result_is_told(
    places: dict[str, Path], full_disk: Path, pifa_deploy: Callable[..., Outcome]
) -> None:
    fill(full_disk)
    result = full_disk / "result.json"
    outcome = pifa_deploy("inspect", places["checkpoint"], "--json", result)
    outcome.failed(STAGE_FAILED, r"disk/result\.json could not be written: .*; free some space")
    assert [path.name for path in full_disk.iterdir()] == ["ballast"]


@pytest.mark.parametrize("command", ["compress", "export"])
def test_a_file_larger_than_the_file_system_allows_is_told(
    command: str,
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pifa_deploy: Callable[..., Outcome],
) -> None:
    monkeypatch.setattr("pifa_deploy.onnx_export.graph_from_model", graph_of(places["onnx"]))
    arguments = [part.replace("100000", "2") for part in command_line(command, places, tmp_path / "out")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, hard))
    try:
        outcome = pifa_deploy(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    outcome.failed(STAGE_FAILED, "out could not be written: .*File too large.*; choose a file system")
    assert without_state(tmp_path) == {}
