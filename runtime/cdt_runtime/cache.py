"""CT tokens on disk: a series is encoded once, whoever asks.

One file an entry, named by the series and by the encoder with its preprocessing, so that a changed
slice or a new bundle is a miss, never a wrong hit. An entry is the SHA-256 of its payload and the
payload, raw float32: anything else in that place is a miss, too. Writing is atomic.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]

STALE_S = 24 * 3600.0
"""A temporary file of this age was left by a process that was killed."""


def cache_dir() -> Path | None:
    """Where tokens are kept: `$CDT_CACHE`, else the user's cache folder, else nowhere."""
    try:
        if chosen := os.environ.get("CDT_CACHE"):
            return Path(chosen).expanduser()
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(base) / "cdt-edge"
    except RuntimeError:  # no home folder, as in many a container
        return None


class TokenCache:
    """CT tokens by series and encoder.

    Args:
        folder: made when the first entry is written; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, key: str, shape: tuple[int, ...]) -> Float | None:
        """Return the tokens of a key, or None where there are none of that shape."""
        if self.folder is None:
            return None
        size = 32 + 4 * math.prod(shape)
        try:
            with self._path(self.folder, key).open("rb") as file:
                data = file.read(size + 1)
        except OSError:
            return None
        if len(data) != size or hashlib.sha256(data[32:]).digest() != data[:32]:
            return None
        tokens = np.frombuffer(data, dtype="<f4", offset=32).reshape(shape).astype(np.float32)
        return tokens if np.isfinite(tokens).all() else None

    def put(self, key: str, tokens: Float) -> None:
        """Keep the tokens of a key; a folder that can't be written only costs time later."""
        if self.folder is None:
            return
        payload = np.ascontiguousarray(tokens, dtype="<f4").tobytes()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep(self.folder)
            handle, name = tempfile.mkstemp(prefix=".tokens-", dir=self.folder)
        except OSError:
            return
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(payload).digest() + payload)
            temporary.replace(self._path(self.folder, key))
        except OSError:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / f"{key}.tokens"

    @staticmethod
    def _sweep(folder: Path) -> None:
        for path in folder.glob(".tokens-*"):
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink(missing_ok=True)
