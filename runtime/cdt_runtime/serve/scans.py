"""CTs that a request may name: the folders of one root, and the tokens of those used last."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

from cdt_runtime.ct_walk import entries, open_folder
from cdt_runtime.errors import InputError, SeriesError
from cdt_runtime.prediction import Context

KEPT = 32
"""Contexts in memory: a few hundred kilobytes each."""

Stamp = tuple[int, int, int]


class Scans:
    """The CTs below one folder; a request gives the name of one, never a path.

    Args:
        root: folder of folders, each of one patient's CT; None for no CT.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._known: OrderedDict[str, tuple[Stamp, Context]] = OrderedDict()

    def names(self) -> list[str]:
        """The names, in order.

        Raises:
            InputError: the root can't be read.
        """
        if self._root is None:
            return []
        try:
            with os.scandir(self._root) as found:
                return sorted(one.name for one in found if one.is_dir(follow_symlinks=False))
        except OSError as error:
            raise InputError(f"the folder of CTs can't be read ({error.strerror})") from error

    def folder(self, name: str) -> Path:
        """Find the folder of a CT.

        Raises:
            InputError: there is none of that name.
        """
        if self._root is None or name not in self.names():
            raise InputError("ct: there is no CT of that name: /v1/scans lists them")
        return self._root / name

    def get(self, name: str) -> Context | None:
        """The context of a CT whose files are as they were."""
        known = self._known.get(name)
        if known is None or known[0] != self._stamp(name):
            return None
        self._known.move_to_end(name)
        return known[1]

    def put(self, name: str, context: Context) -> None:
        """Keep a context, and let the one go that was used longest ago."""
        self._known[name] = self._stamp(name), context
        while len(self._known) > KEPT:
            self._known.popitem(last=False)

    def forget(self) -> None:
        """Let go of all: the model is another."""
        self._known.clear()

    def _stamp(self, name: str) -> Stamp:
        """Number, bytes and newest change of a CT's files."""
        try:
            found = [
                one.stat(follow_symlinks=False) for one in entries(open_folder(self.folder(name)))
            ]
        except OSError as error:
            raise SeriesError("ct: its files can't be read: check them") from error
        newest = max((one.st_mtime_ns for one in found), default=0)
        return len(found), sum(one.st_size for one in found), newest
