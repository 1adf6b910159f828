"""What all commands share: how an error a user can mend ends a run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

import click

from cdt_runtime.errors import CdtError, MissingDependencyError

P = ParamSpec("P")

_EXTRAS = {
    "torch": "train",
    "pydantic": "train",
    "yaml": "train",
    "sklearn": "train",
    "matplotlib": "train",
    "tqdm": "train",
    "onnx": "export",
    "onnxscript": "export",
}
"""The extra that brings a module; all others belong to the base."""


def one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn a `CdtError`, and the absence of an optional part, into one line and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except CdtError as error:
            fail(error)
        except ModuleNotFoundError as error:
            name = (error.name or "").partition(".")[0]
            if name not in _EXTRAS:
                raise
            fail(missing(name))
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)

    return wrapped


def missing(module: str) -> MissingDependencyError:
    """Say which pip command adds a missing module."""
    extra = _EXTRAS[module]
    return MissingDependencyError(
        f"this command needs {module}, which is not installed: pip install 'cdt-edge[{extra}]'"
    )


def one_line(error: CdtError) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())


def say(error: CdtError) -> None:
    """Print an error as one line on stderr."""
    click.echo(f"error: {one_line(error)}", err=True)


def fail(error: CdtError) -> NoReturn:
    """Print an error as one line on stderr and leave with its exit code."""
    say(error)
    sys.exit(error.exit_code)
