"""What all commands share: how a run ends, and how it says so."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from cdt_runtime.errors import CdtError, MissingDependencyError

_OPTIONAL = frozenset(
    {
        "torch",
        "pydantic",
        "yaml",
        "scipy",
        "sklearn",
        "matplotlib",
        "tifffile",
        "tqdm",
        "accelerate",
        "tensorboard",
        "onnx",
        "onnxscript",
    }
)
"""Modules that the extra of a command brings."""

_EXTRAS = {
    "anndata": "anndata",
    "cyclonedx": "sbom",
    "dicomweb_client": "dicom",
    "fastapi": "serve",
    "highdicom": "dicom",
    "prometheus_client": "serve",
    "pyarrow": "parquet",
    "ray": "ray",
    "swagger_ui_bundle": "serve",
    "tritonclient": "triton",
    "uvicorn": "serve",
}
"""Modules that an extra of their own brings. All that are in neither belong to the base."""


class PlaneChoice(click.ParamType[int | str]):
    """A plane of a stack: a number from 1 on, or `max`."""

    name = "N|max"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        """Return the number, or "max"."""
        if value == "max" or (isinstance(value, int) and value > 0):
            return value  # type: ignore[no-any-return]
        if not (isinstance(value, str) and value.isdecimal() and int(value) > 0):
            self.fail(f"{value!r}: expected a number from 1 on, or max", param, ctx)
        return int(value)


def run(
    command: click.Command, arguments: Sequence[str] | None = None, *, extra: str = "all"
) -> NoReturn:
    """Run a command to its exit code.

    An error that the user can mend is one line on stderr and code 2; a bug keeps its traceback.

    Args:
        command: the click command.
        arguments: in place of the process's own.
        extra: of the distribution, which brings the modules that the command needs.
    """
    if sys.stdout is None:
        fail(CdtError("standard output is closed: the results would be lost"))
    try:
        code = command.main(args=arguments, standalone_mode=False)
        sys.stdout.flush()
    except CdtError as error:
        fail(error)
    except click.ClickException as error:
        say(error.format_message())
        sys.exit(2)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in _OPTIONAL | _EXTRAS.keys():
            raise
        fail(missing(name, _EXTRAS.get(name, extra)))
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader has gone: what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(CdtError("results can't be written: no space left on the device"))
    sys.exit(code if isinstance(code, int) else 0)


def missing(module: str, extra: str) -> MissingDependencyError:
    """Say which pip command adds a missing module."""
    return MissingDependencyError(
        f"this command needs {module}, which is not installed: pip install 'cdt-edge[{extra}]'"
    )


def one_line(message: object) -> str:
    """Return a message without line breaks."""
    return " ".join(str(message).split())


def say(message: object) -> None:
    """Print an error as one line on stderr."""
    click.echo(f"error: {one_line(message)}", err=True)


def fail(error: CdtError) -> NoReturn:
    """Print an error as one line on stderr and leave with its exit code."""
    say(error)
    sys.exit(error.exit_code)
