"""Rows of a cohort on a Ray cluster: actors hold the model, each row is retried where one dies.

Ray Data hands rows out as actors come free, so that none piles up; what an actor gives comes back
to the process that asked, which keeps it. Paths and the bundle must be the same on every machine.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cdt_runtime.cohort import Options, Row, classify_row
from cdt_runtime.cores import available_cores
from cdt_runtime.errors import InputError

LOCAL = "local"
"""An address that starts a cluster on this machine."""

CORES = 1
"""Cores that an actor counts for; its engine takes no more threads."""


class RowActor:
    """Holds the model and answers one row after another.

    Args:
        bundle: folder.
        asked: how it is opened.
        rows: all of the cohort's.
        options: how they are read.
        out: folder of the results.
        cache: folder of CT tokens that the actors share.
    """

    def __init__(
        self,
        bundle: str,
        asked: Mapping[str, Any],
        rows: Sequence[Row],
        options: Options,
        out: str,
        cache: str | None,
    ) -> None:
        from cdt_runtime.classifier import FewShotClassifier

        folder = Path(cache) if cache else None
        self._classifier = FewShotClassifier.open(bundle, cache=folder, **asked)
        self._rows, self._options, self._out = rows, options, Path(out)

    def __call__(self, item: dict[str, Any]) -> dict[str, str]:
        """Answer the row at a place; JSON, for a table's columns are of one type."""
        row = self._rows[int(item["place"])]
        return {"found": json.dumps(classify_row(self._classifier, row, self._options, self._out))}


def ray_rows(
    address: str, bundle: Path, asked: Mapping[str, Any], options: Options, out: Path
) -> Callable[[Sequence[Row]], Iterator[dict[str, Any]]]:
    """Connect to a cluster.

    Args:
        address: of the cluster; `LOCAL` starts one on this machine.
        bundle: folder, the same on all machines.
        asked: how the bundle is opened: the engine is that of the machine that asks.
        options: how rows are read.
        out: folder of the results, the same on all machines.

    Returns:
        What answers rows, in the order in which they are done.

    Raises:
        InputError: there is no such cluster.
        ModuleNotFoundError: Ray is not installed.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # read when it is imported
    import ray
    import ray.data

    for handler in logging.getLogger("ray.data").handlers:
        handler.setLevel(logging.ERROR)
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address == LOCAL:
            ray.init(**quiet)
        else:
            ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--ray {address}: no cluster there ({type(error).__name__}): start one with ray start "
            f"--head, or give {LOCAL}"
        ) from error
    return lambda rows: _answered(rows, bundle, asked, options, out)


def _threads() -> str:
    return os.environ.get("OMP_NUM_THREADS", str(available_cores()))


def _answered(
    rows: Sequence[Row], bundle: Path, asked: Mapping[str, Any], options: Options, out: Path
) -> Iterator[dict[str, Any]]:
    import ray

    from cdt_runtime.cache import cache_dir

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    context.actor_task_retry_on_errors = True
    actors = max(1, int(ray.cluster_resources().get("CPU", 1)) // CORES)
    cache = cache_dir()
    told = (str(bundle.absolute()), dict(asked), list(rows), options, str(out.absolute()))
    places = [{"place": place} for place in range(len(rows))]
    answered = ray.data.from_items(places, override_num_blocks=len(rows)).map(
        RowActor,
        fn_constructor_args=(*told, str(cache) if cache else None),
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(rows))),
        num_cpus=CORES,
        # Ray takes all threads but one away, and with them the last digits of sums.
        runtime_env={"env_vars": {"OMP_NUM_THREADS": _threads()}},
    )
    for line in answered.iter_rows():
        yield json.loads(line["found"])
