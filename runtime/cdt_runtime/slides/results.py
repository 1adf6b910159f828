"""The files of a slide's results, and what is said of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.prediction import Context
from cdt_runtime.report import CANT_TELL, NOTICE, bundle_name
from cdt_runtime.slides.geojson import write_geojson
from cdt_runtime.slides.grid import LEAST_TISSUE
from cdt_runtime.slides.heatmap import write_heatmap
from cdt_runtime.slides.job import TABLE, SlideAnswers
from cdt_runtime.slides.overview import write_overview
from cdt_runtime.slides.table import as_labels, as_map, as_reasons

AREAS, HEATMAP, OVERVIEW = "areas.geojson", "heatmap.ome.tif", "overview.png"


def write_results(
    found: SlideAnswers, classifier: FewShotClassifier, context: Context, out: Path
) -> dict[str, Any]:
    """Write areas, heat map and overview beside the table of tiles.

    Returns:
        A summary, as JSON holds it.
    """
    plan, classes, used = found.plan, classifier.classes, context.used
    labels = as_labels(found.answers, plan.grid, classes)
    chances = as_map(found.answers, plan.grid, len(classes))
    side = plan.grid.full_side
    count = write_geojson(
        out / AREAS,
        labels,
        chances,
        classes,
        as_reasons(found.answers, plan.grid),
        side=side,
        microns=plan.microns,
    )
    write_heatmap(out / HEATMAP, chances, classes, plan.microns)
    counts = found.counts(classes)
    total = max(1, len(found.answers))
    open_ = len(found.answers) - sum(counts.values())
    write_overview(
        out / OVERVIEW,
        plan.small,
        plan.slide.channels,
        labels,
        plan.shares >= LEAST_TISSUE,
        classes,
        [*(each / total for each in counts.values()), open_ / total],
        side,
    )
    return {
        "slide": plan.slide.source,
        "out": str(out),
        "files": [TABLE, AREAS, HEATMAP, OVERVIEW],
        "tile_microns": round(plan.microns, 3),
        "level_downsample": round(plan.grid.level.downsample, 4),
        "grid": [plan.grid.rows, plan.grid.columns],
        "tiles": len(found.answers),
        "resumed": found.resumed,
        "labels": counts,
        "abstained": open_ - len(found.unreadable),
        "reasons": Counter(one.reason for one in found.answers if one.reason and one.chances),
        "unreadable": len(found.unreadable),
        "areas": count,
        "mean_probabilities": _means(chances, classes),
        "ct": asdict(replace(used, off=classifier.prototypes.ct_off)) if used else None,
        "warnings": list(plan.warnings),
        "backend": classifier.engine,
        "bundle": bundle_name(classifier.bundle),
        "training_data": classifier.bundle.manifest["training"]["data"],
    }


def as_text(summary: dict[str, Any]) -> str:
    """Return what a person reads of a slide."""
    total = max(1, summary["tiles"])
    rows, columns = summary["grid"]
    lines = [
        f"{summary['slide']}: {summary['tiles']} of {rows * columns} tiles show tissue, "
        f"{summary['tile_microns']:.0f} microns each"
    ]
    counted = {**summary["labels"], CANT_TELL: summary["abstained"]}
    if summary["unreadable"]:
        counted["unreadable"] = summary["unreadable"]
    width = max(map(len, counted))
    lines += [f"    {name:<{width}}  {n:>7}  {n / total:6.1%}" for name, n in counted.items()]
    reasons = [f"{count} {reason}" for reason, count in summary["reasons"].most_common()]
    if reasons:
        lines.append(f"    {CANT_TELL}: {', '.join(reasons)}")
    lines += [f"    warning: {warning}" for warning in summary["warnings"]]
    lines += [
        "",
        f"written   {summary['out']}: {', '.join(summary['files'])}",
        f"CT        {_ct_text(summary['ct'])}",
        f"bundle    {summary['bundle']}",
        f"engine    {summary['backend']}",
        f"trained   on {summary['training_data']}",
        NOTICE,
    ]
    return "\n".join(lines)


def _ct_text(ct: dict[str, Any] | None) -> str:
    if ct is None:
        return "none: the tiles alone decide"
    text = "; ".join([ct["series"], *(f"warning: {warning}" for warning in ct["warnings"])])
    return f"{text}\n          {ct['off']}" if ct["off"] else text


def _means(chances: Any, classes: tuple[str, ...]) -> dict[str, float] | None:
    """Mean probability of each class over the tiles with an answer; None without any."""
    known = chances[:, np.isfinite(chances[0])]
    if known.shape[1] == 0:
        return None
    means = known.mean(axis=1, dtype=np.float64)
    return {name: round(float(mean), 4) for name, mean in zip(classes, means, strict=True)}
