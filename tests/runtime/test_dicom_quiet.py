"""pydicom says nothing while any thread reads, and speaks as before when the last is done."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator

import pytest
from pydicom import config
from pydicom.misc import warn_and_log

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
