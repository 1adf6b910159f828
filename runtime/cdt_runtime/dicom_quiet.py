"""pydicom kept from quoting header values in logs and warnings: they can hold a patient's name.

Most series are read without it, and loading it takes longer than reading them: `load_pydicom` loads
it where a file needs it, and from then on it is silent.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


class _Silence:
    """The one switch behind `quiet`: on while at least one thread is inside.

    Loggers, settings and warning filters belong to the process. If each thread kept what it found
    and put it back, the first to leave would unmute the others, and the last would leave what it
    found for good: the settings of a neighbour.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._muted = 0, False
        self._undo = ExitStack()

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._undo.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self._inside += 1
        if "pydicom" in sys.modules:
            self.mute()

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._muted = False
                self._undo.close()

    def mute(self) -> None:
        """Load pydicom and keep it silent until the last thread leaves."""
        from pydicom import config

        with self._lock:
            if self._muted or self._inside == 0:
                return
            self._muted = True
            logger, settings = logging.getLogger("pydicom"), config.settings
            self._undo.callback(setattr, logger, "disabled", logger.disabled)
            logger.disabled = True
            mode = settings.reading_validation_mode
            self._undo.callback(setattr, settings, "reading_validation_mode", mode)
            settings.reading_validation_mode = config.IGNORE


_SILENCE = _Silence()


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps pydicom from printing or warning, in any number of threads: it quotes header values."""
    _SILENCE.enter()
    try:
        yield
    finally:
        _SILENCE.leave()


def load_pydicom() -> None:
    """Loads pydicom; call it inside `quiet` before any of its modules is imported."""
    _SILENCE.mute()
