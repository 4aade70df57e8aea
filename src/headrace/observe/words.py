"""How numbers read: counts, bytes, durations, shares, and text cut to a width. Pure; shared by progress and report."""

from __future__ import annotations

import unicodedata

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def count(n: float) -> str:
    """18,432; from ten million on 12.3 M, 4.56 G."""
    if n < 10_000_000:
        return f"{n:,.0f}"
    return f"{n / 1e9:,.2f} G" if n >= 1e9 else f"{n / 1e6:,.1f} M"


def plural(n: int, one: str, many: str = "") -> str:
    """1 split, 18,432 splits."""
    return f"{count(n)} {one if n == 1 else many or one + 's'}"


def rate(per_s: float) -> str:
    """Rows a second: three significant figures below one hundred."""
    if per_s >= 100:
        return count(per_s)
    return f"{per_s:.1f}" if per_s >= 10 else f"{per_s:.2f}"


def size(n_bytes: float) -> str:
    """96 MB, 1.4 GB (decimal units)."""
    value = float(n_bytes)
    unit = 0
    while value >= 999.5 and unit < len(_BYTE_UNITS) - 1:
        value /= 1000
        unit += 1
    digits = 1 if unit >= 1 and value < 10 else 0
    return f"{value:.{digits}f} {_BYTE_UNITS[unit]}"


def clock(seconds: float) -> str:
    """0:12, 1:02:03, 2d 04:05: for times that people wait through."""
    whole = max(0, round(seconds))
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    if hours >= 24:
        days, h = divmod(hours, 24)
        return f"{days}d {h:02d}:{m:02d}"
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def duration(seconds: float) -> str:
    """0.42 s, 18.1 s, 4 min 05 s, 3 h 12 min: for times that people compare."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 119.95:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {s:02d} s"
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min"


def share(fraction: float) -> str:
    """97%. Never "100%" for what is not complete, and never more."""
    percent = min(fraction, 1.0) * 100
    return "99%" if 99 <= percent < 100 else f"{percent:.0f}%"


def cells(text: str) -> int:
    """Columns that the text takes in a terminal."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cut(text: str, width: int) -> str:
    """The text in at most `width` columns, its end replaced by an ellipsis when something is missing."""
    if cells(text) <= width:
        return text
    kept = ""
    room = width - 1
    for c in text:
        room -= cells(c)
        if room < 0:
            break
        kept += c
    return kept + "…" if width > 0 else ""


def one_line(text: str) -> str:
    """The text without anything that moves a cursor."""
    return "".join(c if c.isprintable() else " " for c in text)
