"""What `cdt-infer` was asked for, and what does not go together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdt_runtime.errors import InputError

if TYPE_CHECKING:
    from cdt_runtime.backends import Precision
    from cdt_runtime.tiff_meta import Z


@dataclass(frozen=True)
class Asked:
    """The options of `cdt-infer`, as they were given; its help says what each means."""

    paths: tuple[str, ...]
    bundle: str | None
    backend: str
    precision: Precision
    tta: bool
    transductive: bool
    coverage: float | None
    card: str | None
    dicom_sr: str | None
    embeddings: str | None
    codes: str | None
    trust: str | None
    audit: str | None
    as_json: bool
    no_ct: bool
    series: str | None
    allow_resample: bool
    channels: str | None
    fill_missing: bool
    mpp: float | None
    z: Z
    as_slide: bool
    manifest: str | None
    ray: str | None
    parquet: bool
    out: str | None

    @property
    def names(self) -> list[str] | None:
        """Channel names, where they were given."""
        return [name.strip() for name in self.channels.split(",")] if self.channels else None

    @property
    def reading(self) -> dict[str, Any]:
        """How tiles and slides are read."""
        return {"channels": self.names, "fill_missing": self.fill_missing, "mpp": self.mpp}

    def check(self) -> None:
        """Refuse what does not go together.

        Raises:
            InputError: the options that don't are named.
        """
        self._refuse_empty()
        if self.manifest:
            self._refuse_beside_manifest()
        if self.ray and (self.audit or not self.manifest):
            raise InputError("--ray is for a --manifest, without --audit: a log is of one machine")
        others = {"--slide": self.as_slide, "--tta": self.tta, "--transductive": self.transductive}
        for name in _given(others) if self.coverage else ():
            raise InputError(
                f"--coverage is certified for single tiles as they are: not with {name}"
            )
        if self.parquet and not (self.manifest or self.as_slide):
            raise InputError("--parquet is for --manifest and --slide: others print their answers")
        if self.z is not None and self.as_slide:
            raise InputError("--z is for tiles: not with --slide")
        if self.transductive and (self.as_slide or self.card):
            raise InputError("--transductive is for tiles alone: leave --slide and --card out")
        if self.codes and not self.dicom_sr:
            raise InputError("--codes is for --dicom-sr: give both")

    def split_paths(self) -> tuple[str | None, tuple[str, ...]]:
        """Part CT_DIR and the TILEs.

        Raises:
            InputError: one is missing, or there are more of them than the options take.
        """
        ct_dir, tiles = self._split_paths()
        if self.out and not self.as_slide:
            raise InputError("--out is for whole slides: add --slide, or redirect standard output")
        if self.as_slide and len(tiles) != 1:
            raise InputError(f"--slide with {len(tiles)} files: give one slide at a time")
        if self.dicom_sr and ct_dir is None and not self.as_slide:
            raise InputError("--dicom-sr: a report refers to images in DICOM: give CT_DIR")
        return ct_dir, tiles

    def _split_paths(self) -> tuple[str | None, tuple[str, ...]]:
        paths = self.paths
        if not paths:
            raise InputError("no CT_DIR and TILE given: see cdt-infer --help")
        if "" in paths:
            raise InputError("an empty path was given: is a variable of your script unset?")
        if self.no_ct:
            from cdt_runtime.ct_folder import holds_dicom

            tiles = paths[1:] if len(paths) > 1 and holds_dicom(Path(paths[0])) else paths
            return None, tiles
        if os.path.isfile(paths[0]):  # unlike Path.is_file it never raises
            raise InputError(
                f"{Path(paths[0]).name}: CT_DIR comes first and is a folder of DICOM slices, this "
                f"is a file: cdt-infer CT_DIR TILE, or cdt-infer --no-ct TILE"
            )
        if len(paths) == 1:
            raise InputError("no TILE given: cdt-infer CT_DIR TILE [TILE ...]")
        return paths[0], paths[1:]

    def _refuse_empty(self) -> None:
        options = {
            "--bundle": self.bundle,
            "--series": self.series,
            "--channels": self.channels,
            "--out": self.out,
            "--card": self.card,
            "--dicom-sr": self.dicom_sr,
            "--codes": self.codes,
            "--embeddings": self.embeddings,
            "--audit": self.audit,
            "--trust": self.trust,
            "--manifest": self.manifest,
            "--ray": self.ray,
        }
        for name, value in options.items():
            if value is not None and not value.strip():
                raise InputError(f"{name} is empty: is a variable of your script unset?")

    def _refuse_beside_manifest(self) -> None:
        others = {
            "CT_DIR and TILE": self.paths,
            "--slide": self.as_slide,
            "--series": self.series,
            "--card": self.card,
            "--dicom-sr": self.dicom_sr,
            "--embeddings": self.embeddings,
            "--transductive": self.transductive,
            "--coverage": self.coverage,
        }
        for name in _given(others):
            raise InputError(f"--manifest names the inputs of each patient: not with {name}")


def _given(options: Mapping[str, Any]) -> list[str]:
    return [name for name, value in options.items() if value]
