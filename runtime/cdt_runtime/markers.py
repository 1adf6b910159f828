"""Marker names: one spelling for the many that staining panels use."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from cdt_runtime.errors import TileError

MARKERS = ("DAPI", "PanCK", "CD3", "CD8", "FOXP3", "PDL1")
"""The default panel: what training expects of multiplex tiles, and what the phantom shows."""

_SYNONYMS = {
    "DAPI": ("HOECHST", "HOECHST 33342", "DNA"),
    "PanCK": (
        "PANCYTOKERATIN",
        "CYTOKERATIN",
        "PAN KERATIN",
        "KERATIN",
        "CK",
        "CK-EPCAM",
        "AE1/AE3",
        "CK AE1/AE3",
    ),
    "CD3": ("CD3E", "CD3 EPSILON"),
    "CD8": ("CD8A", "CD8 ALPHA"),
    "FOXP3": ("FOX P3",),
    "PDL1": ("PD-L1", "CD274", "B7-H1"),
    # markers of other panels, so that they are known for markers
    **dict.fromkeys(("CD4", "CD11c", "CD20", "CD31", "CD45", "CD45RO", "CD56", "CD68"), ()),
    **dict.fromkeys(("CD138", "CD163", "ECadherin", "HLADR", "Ki67", "SMA", "SOX10"), ()),
    "GZMB": ("GRANZYME B",),
    "PD1": ("PDCD1", "CD279"),
    "Vimentin": ("VIM",),
}

_PLACEHOLDER = re.compile(
    r"(channel|chan|ch|c|page|layer|image|sample|slice)?[\s:_#-]*[\d:_-]*", re.I
)
_NOTE = re.compile(r"\s*\([^()]*\)\s*$")  # "CD3 (Opal 570)"


def spelling(name: str) -> str:
    """The name without case, spaces, dashes and other marks: `PD-L1` and `pd l1` are `pdl1`."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


_CANON = {
    spelling(name): spelling(marker)
    for marker, synonyms in _SYNONYMS.items()
    for name in (marker, *synonyms)
}


def canonical(name: str) -> str:
    """One key for all names of a marker; a note in brackets behind the name is left out."""
    exact = spelling(name)
    if exact in _CANON:
        return _CANON[exact]
    bare = spelling(_NOTE.sub("", name)) or exact
    return _CANON.get(bare, bare)


def is_marker(name: str) -> bool:
    """Whether a name is a known marker; dyes (`FITC`, `Opal 570`) are not."""
    return canonical(name) in _CANON


def is_placeholder(name: str) -> bool:
    """Whether a name only counts (`Channel 3`, `ch_01`, `0`), which says nothing of the marker."""
    return _PLACEHOLDER.fullmatch(name.strip()) is not None


def find_channel(name: str, channels: Sequence[str]) -> int | None:
    """The place of the one channel that is `name`; a name as it is spelled beats a synonym.

    Raises:
        TileError: Two channels are that marker.
    """
    for key in (spelling, canonical):
        found = [at for at, channel in enumerate(channels) if key(channel) == key(name)]
        if len(found) > 1:
            both = " and ".join(repr(channels[at]) for at in found)
            raise TileError(f"has two channels for {name!r}: {both}; keep one")
        if found:
            return found[0]
    return None


def names_of_stems(stems: Sequence[str]) -> list[str]:
    """The marker name in each file stem of one folder.

    A stem is a marker (`CD3`), ends or begins with one (`region_001_CD3`, `PD-L1_region`), or holds
    one. For other markers the tokens that all stems share are dropped (`P1_GZMB`, `P1_CD3`).
    """
    tokens = [[part for part in re.split(r"[\s_.\-]+", stem) if part] for stem in stems]
    shared = set.intersection(*map(set, tokens)) if len(tokens) > 1 else set()
    names = []
    for stem, parts in zip(stems, tokens, strict=True):
        rest = "_".join(part for part in parts if part not in shared)
        names.append(_known_run(parts) or rest or stem)
    repeated = [name for name, count in Counter(map(canonical, names)).items() if count > 1]
    if repeated:
        both = ", ".join(
            repr(stem)
            for stem, name in zip(stems, names, strict=True)
            if canonical(name) in repeated
        )
        raise TileError(f"has two images for one marker: {both}; keep one an image")
    return names


def _known_run(parts: Sequence[str]) -> str | None:
    """The run of tokens that spells a known marker: at the end, else the start, else inside."""
    size = len(parts)
    runs = [
        (start, stop)
        for start in range(size)
        for stop in range(start + 1, min(size, start + 3) + 1)
    ]
    runs.sort(key=lambda run: (run[1] != size, run[0] != 0, run[0] - run[1]))
    for start, stop in runs:
        if spelling("".join(parts[start:stop])) in _CANON:
            return "-".join(parts[start:stop])
    return None
