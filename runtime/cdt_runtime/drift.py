"""Whether a site's tiles look like the training tiles, and what would bring them closer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdt_runtime.adaptation import Adaptation, densities, fit_adaptation
from cdt_runtime.bundle import Bundle
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.errors import BundleError, InputError
from cdt_runtime.prediction import TileInput
from cdt_runtime.tile import RGB
from cdt_runtime.tile_folder import tiles_under
from cdt_runtime.tile_statistics import tile_statistics

LEAST_TILES = 20
"""Tiles with tissue that a site must show before anything is said of it."""

TOLERATED = 3
"""Times the share of training tiles that is refused, up to which a site is like training."""


@dataclass(frozen=True)
class Shares:
    """What becomes of a site's tiles.

    Attributes:
        unlike: share that is unlike the training tiles.
        blurred: share that is blurred.
        accuracy: of the likeliest class; None without labels.
    """

    unlike: float
    blurred: float
    accuracy: float | None


@dataclass(frozen=True)
class Drift:
    """A site beside training.

    Attributes:
        tiles: with tissue.
        blank: left out, without tissue.
        labelled: whether the tiles lie in folders of the bundle's classes.
        expected: share of training tiles that is refused.
        before: as the bundle is now.
        after: with `adaptation`; None where that can't be.
        adaptation: what would bring the site's stain to that of training.
    """

    tiles: int
    blank: int
    labelled: bool
    expected: float
    before: Shares
    after: Shares | None
    adaptation: Adaptation | None

    @property
    def drifted(self) -> bool:
        """Whether more tiles than expected are unlike the training tiles."""
        return self.before.unlike > TOLERATED * self.expected

    @property
    def advised(self) -> bool:
        """Whether the adaptation would mend that."""
        return (
            self.drifted
            and self.after is not None
            and self.after.unlike <= TOLERATED * self.expected
            and (self.after.accuracy or 0.0) >= (self.before.accuracy or 0.0)
        )

    @property
    def verdict(self) -> str:
        """What follows, in one line."""
        if not self.drifted:
            return "as in training: nothing is to be done"
        if self.advised:
            return "drifted; recentring is advised: cdt-enroll --adapt TILES_DIR (--undo goes back)"
        if self.after is None:
            return "drifted; recentring is for RGB tiles alone: enrol tiles of this site"
        return (
            "drifted by more than stain or light, or by another mix of classes: recentring is not "
            "advised; show tiles of every class, or enrol tiles of this site"
        )


def site_tiles(
    classifier: FewShotClassifier, folder: str, **reading: Any
) -> tuple[list[TileInput], list[str] | None]:
    """Read a site's tiles.

    Args:
        classifier: of the bundle.
        folder: with tiles, or with folders of tiles named as the bundle's classes.
        **reading: as `FewShotClassifier.read` takes them.

    Returns:
        The tiles, and the class of each where folders name them all.

    Raises:
        InputError: it is no folder.
        TileError: a tile can't be used.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{folder}: expected a folder of tiles")
    paths = tiles_under(folder, classifier.preprocess.channels, reading.get("channels"))
    if paths == [folder]:
        raise InputError(f"{folder}: holds no tiles")
    named = [Path(path).relative_to(root).parts[0] for path in paths]
    labels = named if set(named) <= set(classifier.classes) else None
    return [classifier.read(path, **reading) for path in paths], labels


def measure_drift(
    classifier: FewShotClassifier, tiles: Sequence[TileInput], labels: Sequence[str] | None
) -> Drift:
    """Hold a site's tiles against the training tiles, as they are and recentred.

    Args:
        classifier: of the bundle; it is not adapted yet.
        tiles: of the site.
        labels: class of each, where they are known.

    Raises:
        InputError: too few show tissue.
    """
    kept = [place for place, tile in enumerate(tiles) if not tile.blank]
    if len(kept) < LEAST_TILES:
        raise InputError(
            f"{len(kept)} of {len(tiles)} tiles show tissue, at least {LEAST_TILES} are needed to "
            f"tell how a site differs: give more"
        )
    shown = [tiles[place] for place in kept]
    known = None if labels is None else [labels[place] for place in kept]
    adaptation, after = None, None
    if classifier.preprocess.channels == RGB:
        reference = classifier.reference
        adaptation = fit_adaptation(
            np.stack([densities(tile.array) for tile in shown]),
            reference.density_mean,
            reference.density_spread,
        )
        after = _shares(classifier, shown, known, adaptation)
    return Drift(
        tiles=len(shown),
        blank=len(tiles) - len(shown),
        labelled=known is not None,
        expected=1 - _accepted(classifier.bundle),
        before=_shares(classifier, shown, known, None),
        after=after,
        adaptation=adaptation,
    )


def _accepted(bundle: Bundle) -> float:
    """The share of tiles of training's kind that the reference knows as such.

    Raises:
        BundleError: the manifest does not say it.
    """
    try:
        return float(bundle.manifest["reference"]["accepted"])
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{bundle.path.name}: no reference.accepted: export it again") from error


def _shares(
    classifier: FewShotClassifier,
    tiles: Sequence[TileInput],
    labels: Sequence[str] | None,
    adaptation: Adaptation | None,
) -> Shares:
    arrays = [tile.array if adaptation is None else adaptation(tile.array) for tile in tiles]
    looks = classifier.looks([tile_statistics(array) for array in arrays])
    accuracy = None
    if labels is not None:
        right, context = 0, classifier.context(None)
        for start in range(0, len(tiles), classifier.batch_size):
            batch = slice(start, start + classifier.batch_size)
            images = [tile.images for tile in tiles[batch]]
            seen = {key: np.stack([one[key] for one in images]) for key in images[0]}
            said = classifier.hear(seen, len(images))
            chances, _ = classifier.classify(np.stack(arrays[batch]), context, said)
            found = [classifier.classes[best] for best in chances.argmax(axis=1)]
            right += sum(a == b for a, b in zip(found, labels[batch], strict=True))
        accuracy = right / len(tiles)
    return Shares(
        unlike=float(np.mean([look.unlike for look in looks])),
        blurred=float(np.mean([look.blurred for look in looks])),
        accuracy=accuracy,
    )


def as_text(drift: Drift) -> str:
    """Lay it out as lines."""
    blank = f", {drift.blank} without tissue left out" if drift.blank else ""
    before, after = drift.before, drift.after
    rows = [
        ("", "as it is", "recentred"),
        ("unlike training", _percent(before.unlike), _percent(after.unlike if after else None)),
        ("blurred", _percent(before.blurred), _percent(after.blurred if after else None)),
    ]
    if drift.labelled:
        rows.append(
            ("accuracy", _percent(before.accuracy), _percent(after.accuracy if after else None))
        )
    lines = [
        f"tiles     {drift.tiles}{blank}; {drift.expected:.0%} of tiles like those of training are "
        "unlike"
    ]
    lines += [f"{name:<16}  {first:>9}  {second:>9}" for name, first, second in rows]
    return "\n".join([*lines, f"verdict   {drift.verdict}"])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
