"""CrashSamples: the rows that killed a worker, kept as Arrow IPC files, and how to see one kill again."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile

from headrace.core.errors import HeadraceError
from headrace.core.steps import Doing

REPRODUCE = "HEADRACE_REPRODUCE"  # read by connectors/environment.py: the action runs the operator on this file's row alone


class CrashSamples:
    """folder: where they go, made at the first one; None, or a place that is no local directory: a temporary one of our own."""

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._kept: dict[tuple[int, str], str] = {}

    def keep(self, doing: Doing) -> str:
        """The path of the row's file, named <operator's index>-<digest>.arrow; "" when there is no row or no room for it."""
        if not doing.sample:
            return ""
        key = (doing.op, doing.digest)
        if key not in self._kept:
            self._kept[key] = self._write(f"{doing.op}-{doing.digest or 'row'}.arrow", doing.sample)
        return self._kept[key]

    def _write(self, name: str, data: bytes) -> str:
        local = self._folder is not None and "://" not in self._folder
        for asked in (True, False) if local else (False,):
            try:
                # Others may write to the temporary directory, and have a link wait there under any name that they can guess.
                folder = self._folder if asked and self._folder else tempfile.mkdtemp(prefix="headrace-crash-")
                os.makedirs(folder, exist_ok=True)
                path = os.path.join(folder, name)
                with open(path, "wb") as file:
                    file.write(data)
            except OSError:
                continue
            return path
        return ""

    @staticmethod
    def command(path: str) -> str:
        """What to type to see the row kill again: this program, on that row alone."""
        python, *arguments = sys.orig_argv or ["python"]
        words = [f"{REPRODUCE}={shlex.quote(path)}", shlex.quote(python), "-X", "faulthandler"]
        return " ".join([*words, *(shlex.quote(word) for word in arguments)])

    def point_out(self, error: HeadraceError, path: str) -> HeadraceError:
        """The error with the file named and the command as what to do next, if a row's file is what it is about."""
        if path:
            error.at(("sample", path))
            error.hint = f"{error.hint}; see it again with: {self.command(path)}" if error.hint else self.command(path)
        return error
