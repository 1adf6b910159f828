"""pydicom says nothing while any thread reads, and speaks as before when the last is done."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from dicom_maker import PATIENT, write_series
from pydicom import config
from pydicom.misc import warn_and_log
from pydicom.uid import ImplicitVRLittleEndian

from cdt_runtime.dicom_quiet import quiet

LOGGER = logging.getLogger("pydicom")


def state() -> tuple[object, ...]:
    return LOGGER.disabled, config.settings.reading_validation_mode, list(warnings.filters)


@pytest.fixture
def other_inside() -> Iterator[tuple[threading.Event, threading.Thread]]:
    """A second thread that is inside `quiet`, and the event that lets it leave."""
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with quiet():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(10)
    yield leave, thread
    leave.set()
    thread.join()


def test_a_thread_that_leaves_first_does_not_unmute_the_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = state()
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    raised: list[BaseException] = []

    def first() -> None:
        with quiet():
            first_in.set()
            second_in.wait(10)
        first_out.set()

    def second() -> None:
        first_in.wait(10)
        with quiet():
            second_in.set()
            first_out.wait(10)
            try:
                warn_and_log("SECRET^NAME")  # a warning would be an error here
            except UserWarning as error:
                raised.append(error)

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not raised
    assert not caplog.records
    assert state() == before


def test_the_last_to_leave_restores(
    other_inside: tuple[threading.Event, threading.Thread],
) -> None:
    leave, thread = other_inside
    with quiet():
        leave.set()
        thread.join()
        assert LOGGER.disabled
        assert config.settings.reading_validation_mode == config.IGNORE
    assert not LOGGER.disabled
    assert config.settings.reading_validation_mode == config.WARN
    with pytest.warns(UserWarning, match="heard again"):
        warn_and_log("heard again")


def test_an_error_inside_restores_too() -> None:
    before = state()
    with pytest.raises(ValueError, match="x"), quiet():
        raise ValueError("x")
    assert state() == before


SCAN = """
import sys
from cdt_runtime.ct import scan_series
try:
    print(len(scan_series(sys.argv[1]).frames), "pydicom" in sys.modules)
except Exception as error:
    print(error)
from pydicom import config
print(config.settings.reading_validation_mode == config.WARN)
"""


def scanned(folder: Path) -> list[str]:
    """What a process of its own says of a series, and that pydicom's settings are its own after."""
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", SCAN, str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    return done.stdout.splitlines()


def test_a_series_that_was_only_walked_over_does_not_load_pydicom(tmp_path: Path) -> None:
    write_series(tmp_path)
    assert scanned(tmp_path) == ["8 False", "True"]


def test_pydicom_that_is_loaded_in_the_midst_is_silent(tmp_path: Path) -> None:
    """Half of the files need it, and it would warn of the value of one, on access."""
    write_series(tmp_path / "case", 4)
    write_series(tmp_path / "case" / "more", 4, syntax=ImplicitVRLittleEndian)
    path = tmp_path / "case" / "more" / "002.dcm"
    content = path.read_bytes()
    assert content.count(b"-10") == 1  # in ImagePositionPatient
    path.write_bytes(content.replace(b"-10", b"x10"))
    says = scanned(tmp_path / "case")
    assert says[0].startswith("file 6 of 8 (002.dcm): ImagePositionPatient ")
    assert PATIENT not in says[0]
    assert says[1] == "True"
