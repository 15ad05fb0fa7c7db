"""Windows of a text: where they lie, and texts that give none."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cli_fixtures import passage, small_tokenizer

from pifa_deploy.calibration import (
    CALIBRATION_TEXT,
    HELD_OUT_TEXT,
    CalibrationOptions,
    check_vocabulary,
    even_windows,
    packaged_text,
    random_windows,
    read_texts,
    token_ids,
)
from pifa_deploy.errors import InputMissingError, InputRefusedError


def starts(windows: torch.Tensor) -> list[int]:
    """Returns where windows of `torch.arange` begin, having checked that they are consecutive."""
    assert torch.equal(windows, windows[:, :1] + torch.arange(windows.shape[1]))
    return windows[:, 0].tolist()


def test_random_windows_lie_inside_the_text_and_reach_both_ends() -> None:
    options = CalibrationOptions(samples=400, sequence_length=7)
    found = starts(random_windows(torch.arange(20), options))
    assert set(found) == set(range(14))  # 400 draws of 14 miss one with a chance below 14 * (13/14)^400 = 2e-12


def test_random_windows_depend_on_the_seed_alone() -> None:
    ids = torch.arange(5000)
    draw = [random_windows(ids, CalibrationOptions(samples=16, sequence_length=32, seed=seed)) for seed in (3, 3, 4)]
    with torch.random.fork_rng():
        torch.manual_seed(99)  # the global generator plays no part
        again = random_windows(ids, CalibrationOptions(samples=16, sequence_length=32, seed=3))
    assert torch.equal(draw[0], draw[1])
    assert torch.equal(draw[0], again)
    assert not torch.equal(draw[0], draw[2])


def test_a_text_of_exactly_one_window_is_that_window() -> None:
    ids = torch.arange(32)
    assert starts(random_windows(ids, CalibrationOptions(samples=3, sequence_length=32))) == [0, 0, 0]
    assert starts(even_windows(ids, 32, 10)) == [0]


@pytest.mark.parametrize(
    ("tokens", "length", "count"),
    [
        (100, 10, 3),
        (100, 10, 10),
        (100, 10, 1000),
        (101, 10, 10),
        (99, 10, 10),
        (64, 3, 21),
        (50_000_003, 1000, 49_999),
    ],
)
def test_even_windows_do_not_overlap_and_span_the_text(tokens: int, length: int, count: int) -> None:
    ids = torch.arange(tokens, dtype=torch.int32)
    found = even_windows(ids, length, count)[:, 0].tolist()
    assert len(found) == min(count, tokens // length)
    assert found[0] == 0
    assert found[-1] == tokens - length
    gaps = {later - earlier for earlier, later in pairwise(found)}
    assert min(gaps) >= length
    assert max(gaps) - min(gaps) <= 1  # as even as integers can be


@pytest.mark.parametrize(("length", "count"), [(1, 5), (0, 5), (10, 0), (10, -1)])
def test_windows_that_hold_nothing_are_refused(length: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} windows of {length} tokens, expected at least 1 of at least 2"):
        even_windows(torch.arange(100), length, count)


@pytest.mark.parametrize("options", [{"samples": 0}, {"sequence_length": 1}, {"samples": -3}])
def test_calibration_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected at least 1 and 2"):
        CalibrationOptions(**options)


def test_a_text_shorter_than_one_window_is_refused() -> None:
    ids = torch.arange(9)
    message = "the text has 9 tokens, one window needs 10; give more text or shorter windows"
    with pytest.raises(InputRefusedError, match=message):
        even_windows(ids, 10, 1)
    with pytest.raises(InputRefusedError, match=message):
        random_windows(ids, CalibrationOptions(samples=1, sequence_length=10))


def test_texts_are_joined_by_an_empty_line(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("één", encoding="utf-8")
    (tmp_path / "b").write_text("two\n", encoding="utf-8")
    assert read_texts([tmp_path / "a", str(tmp_path / "b")]) == "één\n\ntwo\n"


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, InputMissingError, "no such text file"),
        (b"ab\xff", InputRefusedError, "not UTF-8 at byte 2; convert"),
        (b"\n \t", InputRefusedError, "is empty"),
    ],
    ids=["missing", "not UTF-8", "blank"],
)
def test_a_bad_text_among_good_ones_is_named(
    data: bytes | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "good").write_text("good")
    if data is not None:
        (tmp_path / "bad").write_bytes(data)
    with pytest.raises(error, match=f"bad: {message}"):
        read_texts([tmp_path / "good", tmp_path / "bad"])


def test_tokens_spell_the_text_without_special_ones() -> None:
    text, tokenizer = passage(HELD_OUT_TEXT, 3000), small_tokenizer()
    ids = token_ids(text, tokenizer)
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)


def test_a_token_beyond_the_vocabulary_is_refused() -> None:
    check_vocabulary(torch.tensor([[0, 9]]), 10)
    with pytest.raises(InputRefusedError, match=r"made token 9 of the text, the model knows 0 \.\. 8; give the model"):
        check_vocabulary(torch.tensor([[0, 9]]), 9)


def test_the_packaged_texts_are_two_different_books() -> None:
    calibration, held_out = (read_texts([packaged_text(name)]) for name in (CALIBRATION_TEXT, HELD_OUT_TEXT))
    assert min(len(calibration), len(held_out)) > 50_000
    assert not set(calibration.split("\n\n")[5:]) & set(held_out.split("\n\n"))
