"""Windows of a text: where they lie, the sources that texts come from, and those that give none."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_fixtures import passage, small_tokenizer

from pifa_deploy.calibration import (
    CALIBRATION_TEXT,
    HELD_OUT_TEXT,
    MIXTURE,
    MIXTURE_TEXTS,
    CalibrationOptions,
    CalibrationSet,
    calibration_set,
    check_vocabulary,
    even_windows,
    packaged_text,
    read_texts,
    source_texts,
    token_ids,
)
from pifa_deploy.errors import InputMissingError, InputRefusedError, MissingCapabilityError

HAS_DATASETS = importlib.util.find_spec("datasets") is not None


@dataclass
class Encoding:
    input_ids: torch.Tensor


def numerals(text: str, **_: Any) -> Encoding:
    """Reads "3 4 5" as the tokens 3, 4, 5."""
    return Encoding(torch.tensor([[int(word) for word in text.split()]]))


def letters(text: str, **_: Any) -> Encoding:
    return Encoding(torch.tensor([list(text.encode())]))


def counting(path: Path, first: int, count: int) -> str:
    """Writes a text whose tokens are first, first + 1, ...; returns its name."""
    path.write_text(" ".join(map(str, range(first, first + count))))
    return str(path)


def starts(windows: torch.Tensor) -> list[int]:
    """Returns where windows of `torch.arange` begin, having checked that they are consecutive."""
    assert torch.equal(windows, windows[:, :1] + torch.arange(windows.shape[1]))
    return windows[:, 0].tolist()


def drawn(source: str, **options: int) -> CalibrationSet:
    return calibration_set([source], numerals, CalibrationOptions(**options))


def test_windows_lie_inside_the_text_and_reach_both_ends(tmp_path: Path) -> None:
    found = drawn(counting(tmp_path / "a", 0, 20), samples=400, sequence_length=7)
    assert set(starts(found.windows)) == set(range(14))  # one is missed with a chance below 14 * (13/14)^400 = 2e-12
    assert found.windows.dtype == torch.int64
    assert found.windows.shape == (400, 7)


def test_windows_depend_on_the_seed_alone(tmp_path: Path) -> None:
    text = counting(tmp_path / "a", 0, 5000)
    draw = [drawn(text, samples=16, sequence_length=32, seed=seed).windows for seed in (3, 3, 4)]
    with torch.random.fork_rng():
        torch.manual_seed(99)  # the global generator plays no part
        again = drawn(text, samples=16, sequence_length=32, seed=3).windows
    assert torch.equal(draw[0], draw[1])
    assert torch.equal(draw[0], again)
    assert not torch.equal(draw[0], draw[2])


def test_a_text_of_exactly_one_window_is_that_window(tmp_path: Path) -> None:
    text = counting(tmp_path / "a", 0, 32)
    assert starts(drawn(text, samples=3, sequence_length=32).windows) == [0, 0, 0]
    assert starts(even_windows(torch.arange(32), 32, 10)) == [0]


@pytest.mark.parametrize(("samples", "shares"), [(9, [3, 3, 3]), (11, [4, 4, 3]), (10, [4, 3, 3]), (3, [1, 1, 1])])
def test_windows_are_shared_evenly_by_the_sources(samples: int, shares: list[int], tmp_path: Path) -> None:
    sources = [counting(tmp_path / name, 1000 * number, 200 + number) for number, name in enumerate("abc")]
    found = calibration_set(sources, numerals, CalibrationOptions(samples=samples, sequence_length=8))
    assert [int(window[0]) // 1000 for window in found.windows] == [
        number for number, share in enumerate(shares) for _ in range(share)
    ]
    assert [len(entry["windows"]) for entry in found.record] == shares


def test_the_record_says_which_tokens_of_which_text_were_used(tmp_path: Path) -> None:
    sources = [counting(tmp_path / name, 0, count) for name, count in (("a.txt", 90), ("b.md", 70))]
    found = calibration_set(sources, numerals, CalibrationOptions(samples=7, sequence_length=8, seed=1))
    assert [list(entry) for entry in found.record] == [["name", "sha256", "tokens", "windows"]] * 2
    assert [(entry["name"], entry["tokens"]) for entry in found.record] == [("a.txt", 90), ("b.md", 70)]
    assert [start for entry in found.record for start in entry["windows"]] == starts(found.windows)
    for source, entry in zip(sources, found.record, strict=True):
        assert entry["sha256"] == hashlib.sha256(Path(source).read_bytes()).hexdigest()


def test_more_sources_than_windows_are_refused(tmp_path: Path) -> None:
    sources = [counting(tmp_path / name, 0, 50) for name in "abc"]
    with pytest.raises(ValueError, match="samples is 2 for 3 calibration sources; expected at least one window each"):
        calibration_set(sources, numerals, CalibrationOptions(samples=2, sequence_length=8))


def test_a_source_shorter_than_one_window_is_named(tmp_path: Path) -> None:
    sources = [counting(tmp_path / "long.txt", 0, 50), counting(tmp_path / "short.txt", 0, 9)]
    message = r"^short\.txt: the text has 9 tokens, one window needs 10; give more text or shorter windows"
    with pytest.raises(InputRefusedError, match=message):
        calibration_set(sources, numerals, CalibrationOptions(samples=2, sequence_length=10))


# Sources


def test_a_folder_is_its_text_files_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    for name, text in (("b.txt", "second"), ("a.md", "first"), ("inner/c.txt", "third"), ("z.py", "no text")):
        (folder / name).write_text(text)
    assert source_texts(str(folder)) == [("texts", "first\n\nsecond\n\nthird")]
    monkeypatch.chdir(folder)
    assert source_texts(".") == [("texts", "first\n\nsecond\n\nthird")]


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("x = 1")
    with pytest.raises(InputRefusedError, match=r"has no \.txt or \.md files; give a folder of UTF-8 text"):
        source_texts(tmp_path)


def test_the_mixture_has_a_text_of_each_kind_and_nothing_that_is_evaluated_on() -> None:
    found = dict(source_texts(MIXTURE))
    assert list(found) == [f"{MIXTURE}/{kind}" for kind in MIXTURE_TEXTS]
    assert len(set(found.values())) == len(found) > 1
    held_out = set(read_texts([packaged_text(HELD_OUT_TEXT)]).split("\n\n"))
    for text in found.values():
        # Enough for windows of the default length: no tokenizer makes fewer tokens than there are words.
        assert len(text.split()) > 2 * CalibrationOptions().sequence_length
        assert not held_out & {part for part in text.split("\n\n") if len(part) > 40}


def test_sources_of_different_kinds_go_together(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(passage(CALIBRATION_TEXT, 2000))
    (tmp_path / "b.txt").write_text(passage(CALIBRATION_TEXT, 2000))
    options = CalibrationOptions(samples=2 + len(MIXTURE_TEXTS), sequence_length=16)
    found = calibration_set([str(folder), MIXTURE, str(tmp_path / "b.txt")], letters, options)
    names = [entry["name"] for entry in found.record]
    assert names == ["texts", *(f"{MIXTURE}/{kind}" for kind in MIXTURE_TEXTS), "b.txt"]


@pytest.mark.skipif(HAS_DATASETS, reason="the package datasets is installed")
def test_a_data_set_without_the_package_is_answered_with_what_to_install() -> None:
    with pytest.raises(
        MissingCapabilityError, match="datasets:wikitext needs the package datasets; pip install datasets"
    ):
        source_texts("datasets:wikitext")


@pytest.mark.skipif(not HAS_DATASETS, reason="needs the package datasets")
class TestDataSets:
    @pytest.fixture(autouse=True)
    def _offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def test_the_rows_of_its_column_text_are_lines(self, tmp_path: Path) -> None:
        folder = tmp_path / "set"
        folder.mkdir()
        (folder / "train.txt").write_text("one\ntwo\n")
        (folder / "test.txt").write_text("three\n")
        assert source_texts(f"datasets:{folder}") == [(f"datasets:{folder}", "one\ntwo")]
        assert source_texts(f"datasets:{folder}::test") == [(f"datasets:{folder}::test", "three")]

    def test_one_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputMissingError, match=r"datasets:.*/none: could not be loaded \(.*check name and split"):
            source_texts(f"datasets:{tmp_path / 'none'}")

    def test_one_without_text_is_refused(self, tmp_path: Path) -> None:
        folder = tmp_path / "set"
        folder.mkdir()
        (folder / "train.csv").write_text("label,size\n1,2\n")
        with pytest.raises(InputRefusedError, match=r"has the columns \['label', 'size'\], expected one named text"):
            source_texts(f"datasets:{folder}")
        (folder / "train.csv").unlink()
        (folder / "train.jsonl").write_text('{"text": " "}\n')
        with pytest.raises(InputRefusedError, match="is empty; give a split with text"):
            source_texts(f"datasets:{folder}")


# Windows at even distances, and the texts themselves


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
    message = "the text has 9 tokens, one window needs 10; give more text or shorter windows"
    with pytest.raises(InputRefusedError, match=message):
        even_windows(torch.arange(9), 10, 1)


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
