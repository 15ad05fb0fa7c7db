"""The plugin driven as TensorRT drives it, by a program that has TensorRT's headers only; no GPU is used."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ("plugin_fixtures",)


@pytest.fixture(scope="module")
def host(plugin_programs: Callable[..., Path]) -> Path:
    """plugins/tests/host.cpp, and the plugin before made-up kernels, both with address and undefined sanitizers."""
    return plugin_programs("host", "fake_plugin", "twin_plugin", "host_on_twins") / "host"


def run(host: Path, library: Path) -> str:
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run(
        [host, library], env=environment, capture_output=True, text=True, timeout=300, errors="replace", check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr == ""
    return done.stdout


def counts(said: str) -> tuple[int, int]:
    found = re.match(r"(\d+) checks over (\d+) shapes", said)
    assert found, said
    return int(found[1]), int(found[2])


def test_all_calls_of_building_and_running_hold_over_hundreds_of_shapes_and_bad_fields(host: Path) -> None:
    said = run(host, host.parent / "libfake_plugin.so")
    checks, shapes = counts(said)
    assert checks > 400_000
    assert shapes > 1000
    assert "run phase included" in said


def test_the_library_with_its_own_kernels_answers_the_same_while_building(host: Path, plugin_library: Path) -> None:
    said = run(host, plugin_library)
    checks, shapes = counts(said)
    assert checks > 400_000
    assert shapes > 1000
    assert "run phase" not in said


def test_the_mode_for_a_gpu_holds_with_host_twins_behind_the_plugin(host: Path) -> None:
    # The same program on a GPU adds graphs, which have no stand-in here.
    command = [host.parent / "host_on_twins", host.parent / "libtwin_plugin.so", "--cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.match(r"(\d+) checks of enqueue over 49 layers, 0 graph replays", done.stdout)
    assert found, done.stdout
    assert int(found[1]) > 4000


def test_without_that_mode_the_program_says_so(host: Path) -> None:
    library = host.parent / "libfake_plugin.so"
    done = subprocess.run([host, library, "--cuda"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "compiled without PIFA_HOST_CUDA" in done.stderr
