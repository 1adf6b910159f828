"""CT tokens on disk: a series is encoded once, whoever asks.

One `.npy` file an entry, named by the series and by the encoder with its preprocessing, so that a
changed slice or a new bundle is a miss, never a wrong hit. Writing is atomic; a damaged entry is
computed again.
"""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]


def cache_dir() -> Path:
    """Where tokens are kept: `$CDT_CACHE`, else the user's cache folder."""
    if chosen := os.environ.get("CDT_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cdt-edge"


class TokenCache:
    """CT tokens by series and encoder.

    Args:
        folder: made when the first entry is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str, shape: tuple[int, ...]) -> Float | None:
        """Return the tokens of a key, or None where there are none of that shape."""
        try:
            tokens = np.load(io.BytesIO(self._path(key).read_bytes()), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        usable = tokens.shape == shape and tokens.dtype == np.float32 and np.isfinite(tokens).all()
        return tokens if usable else None

    def put(self, key: str, tokens: Float) -> None:
        """Keep the tokens of a key; a folder that can't be written only costs time later."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".tokens-", dir=self.folder)
        except OSError:
            return
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, tokens, allow_pickle=False)
            temporary.replace(self._path(key))
        except OSError:
            temporary.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npy"
