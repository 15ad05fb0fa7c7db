"""What a measurement ran on, and whether somebody else used the processors meanwhile."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pifa_deploy import environment
from pifa_deploy.environment import LoadMeter, busy_seconds, cpu_name, memory_bytes, this_environment

STAT = "cpu  100 10 50 4000 300 7 3 20 0 0\ncpu0 100 10 50 4000 300 7 3 20 0 0\nintr 12\n"


def test_the_environment_says_what_the_machine_is() -> None:
    found = this_environment()
    assert found.cores == os.cpu_count()
    assert 1 <= found.usable_cores <= found.cores
    assert found.packages["python"] == platform.python_version()
    assert "torch" in found.packages
    json.dumps(found.to_json())


def test_the_environment_names_neither_the_machine_nor_its_user() -> None:
    text = json.dumps(this_environment().to_json())
    names = {platform.node(), *((getpass.getuser(),) if len(getpass.getuser()) > 4 else ())}
    assert not [name for name in names if name and name in text]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC 7763 64-Core Processor\n", "AMD EPYC 7763 64-Core Processor"),
        ("processor\t: 0\nBogoMIPS\t: 62.50\n\nModel\t\t: Raspberry Pi 4\n", "Raspberry Pi 4"),
        ("processor\t: 0\nCPU part\t: 0xd42\n", None),
        ("", None),
    ],
)
def test_the_processor_is_named(text: str, name: str | None) -> None:
    assert cpu_name(text) == name


def test_memory_is_read_in_bytes() -> None:
    assert memory_bytes("MemTotal:       32601244 kB\nMemFree: 1 kB\n") == 32601244 * 1024
    assert memory_bytes("") is None


def test_waiting_is_not_busy_and_stolen_time_is_counted_apart() -> None:
    assert busy_seconds(STAT, ticks=10) == (17.0, 2.0)
    assert busy_seconds("cpu 1 2 3\n") is None
    assert busy_seconds("") is None


@pytest.mark.parametrize(
    ("busy_s", "stolen_s", "own_s", "others"),
    [
        (3.0, 0.5, 2.0, 0.25),  # a second in four that was another's
        (2.0, 0.0, 2.0, 0.0),
        (1.99, 0.0, 2.0, 0.0),  # ticks are coarser than own times
    ],
)
def test_what_others_used_is_what_was_busy_and_not_own(
    busy_s: float, stolen_s: float, own_s: float, others: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    moments = iter([100.0, 104.0])

    def passes(seconds: float, stolen: float, own: float) -> None:
        (tmp_path / "stat").write_text(f"cpu  {round(seconds * ticks)} 0 0 9 9 0 0 {round(stolen * ticks)} 0 0\n")
        parts = SimpleNamespace(user=own / 2, system=own / 4, children_user=own / 8, children_system=own / 8)
        monkeypatch.setattr(environment.os, "times", lambda: parts)

    monkeypatch.setattr(environment, "_STAT", tmp_path / "stat")
    monkeypatch.setattr(environment, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    passes(50, 5, 20)
    meter = LoadMeter()
    passes(50 + busy_s, 5 + stolen_s, 20 + own_s)
    load = meter.read()
    assert load.other_cpus == pytest.approx(others)
    assert load.stolen_cpus == pytest.approx(stolen_s / 4)


def test_another_process_is_noticed() -> None:
    if LoadMeter().read().other_cpus is None:
        pytest.skip("this system does not tell how busy it is")
    works = "import time\nwhile time.process_time() < 1: pass\nprint(flush=True)\ninput()"
    started = time.monotonic()
    meter = LoadMeter()
    with subprocess.Popen([sys.executable, "-c", works], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it has used a second; once it has ended, that is this process' own
        found = meter.read().other_cpus
        seconds = time.monotonic() - started
        process.kill()
    assert found is not None
    # Less than its second: ticks are sampled, and a hypervisor may have taken the processor away meanwhile.
    assert found * seconds > 0.3
