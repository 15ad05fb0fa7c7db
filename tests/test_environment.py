"""What a measurement ran on, and whether somebody else used the processors meanwhile."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
import time

import pytest

from pifa_deploy.environment import LoadMeter, busy_seconds, cpu_name, memory_bytes, this_environment, usable_cores

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


def test_another_process_is_noticed_and_the_own_work_is_not() -> None:
    if LoadMeter().read().other_cpus is None:
        pytest.skip("this system does not tell how busy it is")
    spin = [sys.executable, "-c", "import time\nwhile time.perf_counter(): pass"]
    quiet = LoadMeter()
    until = time.perf_counter() + 0.5
    while time.perf_counter() < until:
        pass
    own = quiet.read().other_cpus
    process = subprocess.Popen(spin)
    try:
        time.sleep(0.3)
        meter = LoadMeter()
        time.sleep(0.7)
        disturbed = meter.read().other_cpus
    finally:
        process.kill()
        process.wait()
    assert own is not None
    assert disturbed is not None
    # On one processor that others use too, the spinning process gets a part of it.
    assert disturbed > 0.3
    if usable_cores() > 1:
        assert own < disturbed + 0.5
