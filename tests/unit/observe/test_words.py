from __future__ import annotations

import pytest

from headrace.observe import words


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0"), (18_432, "18,432"), (9_999_999, "9,999,999"), (12_345_678, "12.3 M"), (4.56e9, "4.56 G")]
)
def test_count(n: float, text: str) -> None:
    assert words.count(n) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (96_000_000, "96 MB"), (999_600_000, "1.0 GB"), (1.4e9, "1.4 GB")],
)
def test_size(n: float, text: str) -> None:
    assert words.size(n) == text


@pytest.mark.parametrize(
    ("s", "text"), [(0, "0:00"), (59.6, "1:00"), (12, "0:12"), (3723, "1:02:03"), (2 * 86400 + 4 * 3600 + 300, "2d 04:05")]
)
def test_clock(s: float, text: str) -> None:
    assert words.clock(s) == text


@pytest.mark.parametrize(
    ("s", "text"), [(0.42, "0.42 s"), (9.999, "10.0 s"), (119.94, "119.9 s"), (245, "4 min 05 s"), (11_520, "3 h 12 min")]
)
def test_duration(s: float, text: str) -> None:
    assert words.duration(s) == text


def test_rate_keeps_three_figures() -> None:
    assert [words.rate(v) for v in (0.456, 12.34, 1020.4)] == ["0.46", "12.3", "1,020"]


def test_share_is_full_only_when_it_is() -> None:
    assert [words.share(v) for v in (0.0, 0.976, 0.9999, 1.0, 1.2)] == ["0%", "98%", "99%", "100%", "100%"]


def test_cut_counts_terminal_columns() -> None:
    assert words.cut("abcdef", 6) == "abcdef"
    assert words.cut("abcdef", 4) == "abc…"
    assert words.cells("漢字é") == 5
    assert words.cut("漢字漢字", 5) == "漢字…"
    assert words.cut("abc", 0) == ""


def test_one_line_has_no_control_characters() -> None:
    assert words.one_line("a\nb\x1b[2Jc") == "a b [2Jc"
