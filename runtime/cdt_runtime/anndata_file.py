"""Embeddings as AnnData, on HDF5 or zarr: what scanpy, squidpy and other scverse tools open."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdt_runtime.errors import InputError

SUFFIXES = (".h5ad", ".zarr")
Float = NDArray[np.float32]


def check_target(path: Path) -> None:
    """Refuse a file that could not be written after the work.

    Raises:
        InputError: another suffix, or its folder is missing.
        ModuleNotFoundError: anndata is not installed.
    """
    import anndata  # noqa: F401

    if path.suffix not in SUFFIXES:
        raise InputError(f"--embeddings {path.name}: expected a name in {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--embeddings {path}: there is no such folder: make it first")


def write_anndata(
    path: Path,
    embeddings: Float,
    names: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    facts: Mapping[str, str],
    places: NDArray[np.float64] | None = None,
) -> None:
    """Write embeddings, one observation a tile; an older file of that name is replaced.

    Args:
        path: `.h5ad` or `.zarr`.
        embeddings: `(n, E)`; they become `X`.
        names: n, of the observations.
        columns: of `obs`, n values each; None becomes an empty word, or a NaN among numbers.
        facts: of `uns["cdt_edge"]`: bundle, engine.
        places: `(n, 2)`, x and y of the middle of each tile in full-size pixels; they become
            `obsm["spatial"]`, where squidpy looks for them.

    Raises:
        InputError: it can't be written.
    """
    import anndata
    import pandas

    frame = pandas.DataFrame(
        {name: _column(values) for name, values in columns.items()}, index=list(names)
    )
    table = anndata.AnnData(X=embeddings, obs=frame, uns={"cdt_edge": dict(facts)})
    table.var_names = [f"e{number}" for number in range(embeddings.shape[1])]
    if places is not None:
        table.obsm["spatial"] = places
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")
    try:
        if path.suffix == ".zarr":
            with anndata.settings.override(zarr_write_format=3), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of what later versions will do
                table.write_zarr(temporary)
            _remove(path)
        else:
            table.write_h5ad(temporary)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"--embeddings {path}: can't be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            _remove(temporary)


def _column(values: Sequence[Any]) -> Any:
    """Words as categories; numbers as they are."""
    import pandas

    if any(isinstance(one, str) for one in values) or all(one is None for one in values):
        words = ["" if one is None else one for one in values]
        return pandas.Categorical(words)
    return np.array([np.nan if one is None else one for one in values])


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
