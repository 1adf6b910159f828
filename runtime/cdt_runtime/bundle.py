"""The bundle: the folder that is deployed.

A bundle is a manifest, `bundle.json`, and the files it lists with their size and SHA-256. Opening
one checks every name, size and hash before any byte reaches an inference engine. What the manifest
does not list is refused, except its signature, `bundle.sig`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from cdt_runtime.errors import BundleError
from cdt_runtime.files import locked, sync_folder, write_synced
from cdt_runtime.parallel import side_by_side
from cdt_runtime.preprocess import Preprocess
from cdt_runtime.printable import printable
from cdt_runtime.signing import MAX_BYTES, SIGNATURE, Sign, require_signature

SCHEMA = 2
"""2: prototypes say how they are fitted and whether the answer rests on a CT."""
MANIFEST = "bundle.json"
GRAPHS = ("ct_encoder", "path_encoder", "bridge", "head", "tile_classifier")
REQUIRED = {"files": dict, "graphs": dict, "preprocess": dict, "training": dict, "precision": str}
"""Entries of the manifest that the runtime looks up."""

OPTIONAL = ("encoders", "prototype_versions")
"""Lists that it looks up where they are."""

MAX_THREADS = 4
"""To check files with."""

_SELF_HASH = "manifest_sha256"


@dataclass(frozen=True, eq=False)
class Bundle:
    """An opened, verified bundle.

    Attributes:
        path: the folder.
        manifest: what `bundle.json` says.
    """

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str], trust: Path | None = None) -> Bundle:
        """Open a bundle and check every file it lists.

        Args:
            path: the folder.
            trust: PEM file of the Ed25519 public key whose owner must have signed it.

        Raises:
            BundleError: the folder is no bundle, is of another schema, or any file is missing,
                altered, a link, or not listed; or it is not signed by the trusted key.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        if trust is not None:
            require_signature(folder.name, _dump(manifest), _signature(folder), trust)
        _check_listing(folder, manifest["files"])
        bundle = cls(folder, manifest)
        side_by_side(lambda: bundle.check, manifest["files"], MAX_THREADS)
        return bundle

    def read(self, name: str) -> bytes:
        """Return a file's bytes after checking them against the manifest.

        Raises:
            BundleError: the file is not listed, missing or altered.
        """
        with self._opened(name) as file:
            data = file.read()
        self._compare(name, len(data), sha256(data))
        return data

    def check(self, name: str) -> None:
        """Check a file against the manifest, as `read` does, without holding it.

        Raises:
            BundleError: as `read`.
        """
        with self._opened(name) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            self._compare(name, file.tell(), found)

    @contextmanager
    def _opened(self, name: str) -> Iterator[BufferedReader]:
        if name not in self.manifest["files"]:
            raise BundleError(
                f"{self.path.name}: no {name} in the manifest: export the bundle again"
            )
        try:
            with (self.path / name).open("rb") as file:
                yield file
        except OSError as error:
            raise BundleError(
                f"{self.path.name}/{name}: can't be read ({error.strerror})"
            ) from error

    def _compare(self, name: str, size: int, found: str) -> None:
        entry = self.manifest["files"][name]
        if size != entry["bytes"] or found != entry["sha256"]:
            raise BundleError(
                f"{self.path.name}/{name}: altered since export (SHA-256 differs from the "
                f"manifest): copy or export the bundle again"
            )

    @property
    def signed(self) -> bool:
        """Whether a signature lies beside the manifest; whose, only `open` with a key tells."""
        return (self.path / SIGNATURE).is_file()

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing that the graphs were trained with."""
        return Preprocess.from_dict(self.manifest["preprocess"])

    def output_shape(self, graph: str, output: str) -> tuple[int, ...]:
        """Return the shape of what a graph gives, without its first axis.

        Raises:
            BundleError: the manifest does not say it.
        """
        facts = self.manifest["graphs"][graph]
        try:
            shape = tuple(facts["outputs"][output]["shape"][1:])
        except (KeyError, TypeError):
            shape = ()
        if not shape or any(type(one) is not int or not 0 < one < 2**31 for one in shape):
            raise BundleError(
                f"{self.path.name}/{MANIFEST}: no shape of {graph}'s {output}: export again"
            )
        return shape

    @property
    def identity(self) -> str:
        """First 12 digits of the manifest's SHA-256: what results name."""
        return self.manifest_sha256[:12]

    @property
    def manifest_sha256(self) -> str:
        """The manifest's SHA-256: it holds that of every file, prototypes too."""
        return str(self.manifest[_SELF_HASH])

    @property
    def encoder_sha256(self) -> str:
        """Identity of all that turns a tile into an embedding; prototypes are bound to it."""
        hashes = {name: entry["sha256"] for name, entry in self.manifest["files"].items()}
        return _encoder_identity(hashes, self.preprocess)

    @property
    def ct_encoder_sha256(self) -> str:
        """Identity of all that turns a series into CT tokens; cached tokens are bound to it."""
        parts = [self.manifest["files"]["ct_encoder.onnx"]["sha256"], self.preprocess.sha256]
        return sha256("".join(parts).encode())


def newest_bundle(folder: Path) -> Path:
    """Find the bundle in a folder that was exported last.

    Raises:
        BundleError: there is none.
    """
    found = [
        (path.stat().st_mtime_ns, path.parent.name, path.parent)
        for path in folder.glob(f"*/{MANIFEST}")
        if not path.parent.name.startswith(".")  # an export under way, or killed
    ]
    if not found:
        raise BundleError(
            f"no bundle in {folder}: make one with cdt-train and cdt-export, or give --bundle DIR"
        )
    return max(found)[2]


def write_bundle(
    path: Path, files: Mapping[str, bytes], facts: Mapping[str, Any], sign: Sign | None = None
) -> Bundle:
    """Write a bundle, replacing an older one of the same name in one step.

    Killed at any moment, it leaves the old bundle or the new one.

    Args:
        path: the bundle's folder.
        files: content of each file by name.
        facts: the manifest's other entries.
        sign: what signs the manifest; without it the bundle is not signed.

    Raises:
        BundleError: `path` exists and is not a bundle.
    """
    if path.exists() and not (path / MANIFEST).is_file():
        raise BundleError(f"{path}: exists and is not a bundle: give another --output")
    listing = {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in files.items()}
    kept = {key: value for key, value in facts.items() if key != _SELF_HASH}
    manifest = {**kept, "schema": SCHEMA, "name": path.name, "files": listing}
    manifest[_SELF_HASH] = sha256(_dump(manifest))
    write_folder(path, {**files, **_closing(manifest, sign)})
    return Bundle.open(path)


def change_bundle(
    bundle: Bundle,
    files: Mapping[str, bytes],
    kept: Mapping[str, str],
    facts: Mapping[str, Any],
    sign: Sign | None = None,
) -> Bundle:
    """Change some files of a bundle in one step; graphs are linked, not copied.

    Killed at any moment, it leaves the bundle as it was or as it is to be. Who has the old one open
    goes on with it.

    Args:
        bundle: as it was opened.
        files: content of those that are new or change.
        kept: name in the changed bundle of each file that stays, to its name now.
        facts: entries of the manifest that change; None takes one out.
        sign: what signs the manifest; without it a signature that there was is gone.

    Raises:
        BundleError: the folder can't be written, or was changed since it was opened.
    """
    path, listed = bundle.path, bundle.manifest["files"]
    listing = {name: listed[old] for name, old in kept.items()}
    listing |= {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in files.items()}
    rest = {key: value for key, value in bundle.manifest.items() if key != _SELF_HASH}
    changed = {**rest, **facts, "files": listing}
    manifest = {key: value for key, value in changed.items() if value is not None}
    manifest[_SELF_HASH] = sha256(_dump(manifest))
    links = {name: path / old for name, old in kept.items()}
    try:
        with locked(path.parent):
            if Bundle(path, _read_manifest(path)).identity != bundle.identity:
                raise BundleError(f"{path}: was changed by another command: give yours again")
            write_folder(path, {**files, **_closing(manifest, sign)}, links)
    except OSError as error:
        raise BundleError(
            f"{path}: can't be changed ({error.strerror}): check who may write there"
        ) from error
    return Bundle.open(path)


def write_folder(
    path: Path, files: Mapping[str, bytes], links: Mapping[str, Path] | None = None
) -> None:
    """Write a folder of files, replacing an older one in one step.

    Killed at any moment, it leaves the old folder or the new one.

    Args:
        path: the folder.
        files: content of each file by name.
        links: files that are taken as they are, by name; copied where the disk has no links.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        for name, data in files.items():
            write_synced(staging / name, data)
        for name, source in (links or {}).items():
            _link(source, staging / name)
        staging.chmod(0o755)
        _put_in_place(staging, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def encoder_identity(files: Mapping[str, bytes], preprocess: Preprocess) -> str:
    """Identity of the encoder in files that are to become a bundle; see `encoder_sha256`."""
    return _encoder_identity({name: sha256(data) for name, data in files.items()}, preprocess)


def sha256(data: bytes) -> str:
    """Return the SHA-256 of some bytes, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _encoder_identity(hashes: Mapping[str, str], preprocess: Preprocess) -> str:
    parts = [hashes["path_encoder.onnx"], hashes["bridge.onnx"], preprocess.sha256]
    return sha256("".join(parts).encode())


def _put_in_place(staging: Path, path: Path) -> None:
    """Give the staged folder its name; an older one of that name goes where it was staged."""
    if not path.exists():
        staging.rename(path)
        return
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here = -100  # AT_FDCWD: relative paths are meant from the working folder
    if exchange and not exchange(here, bytes(staging), here, bytes(path), 2):  # RENAME_EXCHANGE
        return
    # No exchange on this system: between the two steps a kill leaves the old bundle aside.
    aside = staging.with_suffix(".old")
    path.rename(aside)
    try:
        staging.rename(path)
    except OSError:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _dump(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _closing(manifest: Mapping[str, Any], sign: Sign | None) -> dict[str, bytes]:
    """The files that speak for all others: the manifest, and its signature."""
    content = _dump(manifest)
    return {MANIFEST: content, **({SIGNATURE: sign(content)} if sign else {})}


def _signature(folder: Path) -> bytes | None:
    try:
        with (folder / SIGNATURE).open("rb") as file:
            return file.read(MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BundleError(f"{folder.name}/{SIGNATURE}: can't be read ({error.strerror})") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        what = f"holds no {MANIFEST}" if folder.exists() else "no such folder"
        raise BundleError(f"{folder}: {what}: give the folder that cdt-export wrote") from None
    except OSError as error:
        raise BundleError(f"{folder}: can't be read ({error.strerror})") from error
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{folder.name}/{MANIFEST}: not valid JSON: export again") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = str(manifest.get("schema") if isinstance(manifest, dict) else None)[:20]
        raise BundleError(
            f"{folder.name}/{MANIFEST}: schema {found}, this version reads {SCHEMA}: export again"
        )
    rest = {key: value for key, value in manifest.items() if key != _SELF_HASH}
    try:
        same = manifest.get(_SELF_HASH) == sha256(_dump(rest)) and _dump(manifest) == raw
    except (ValueError, RecursionError):  # half of a surrogate pair is no text
        same = False
    if not same:
        raise BundleError(f"{folder.name}/{MANIFEST}: altered since export: export again")
    _check_manifest(folder, manifest)
    return manifest


def _check_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Make sure that what the rest of the runtime looks up is there, and of its type."""
    absent = [key for key in REQUIRED if not isinstance(manifest.get(key), REQUIRED[key])]
    if not absent:
        graphs, files = manifest["graphs"], manifest["files"]
        absent = [f"graphs.{name}" for name in GRAPHS if not isinstance(graphs.get(name), dict)]
        absent += [f"graphs.{name}: no such graph" for name in set(graphs) - set(GRAPHS)]
        absent += [f"files.{name}" for name in files if not _is_listed_well(name, files[name])]
        absent += [f"files.{name}.onnx" for name in GRAPHS if f"{name}.onnx" not in files]
        absent += [] if isinstance(manifest["training"].get("data"), str) else ["training.data"]
        absent += [name for name in OPTIONAL if not isinstance(manifest.get(name, []), list)]
        absent += [] if isinstance(manifest.get("path_encoder", {}), dict) else ["path_encoder"]
    if absent:
        shown = ", ".join(map(printable, sorted(absent)[:5]))
        raise BundleError(
            f"{folder.name}/{MANIFEST}: lacks {shown}: export again with this version"
        )


def _is_listed_well(name: str, entry: Any) -> bool:
    """Whether a file's entry has its size and its hash."""
    return (
        name == printable(name)
        and isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
    )


def _check_listing(folder: Path, listed: Mapping[str, Any]) -> None:
    try:
        found = {entry.name for entry in folder.iterdir()} - {MANIFEST, SIGNATURE}
    except OSError as error:
        raise BundleError(f"{folder}: can't be listed ({error.strerror})") from error
    for name in sorted(found | set(listed)):
        path = folder / name
        if name not in listed:
            raise BundleError(f"{folder.name}/{name}: not in the manifest: remove it")
        if name != Path(name).name or path.is_symlink():
            raise BundleError(f"{folder.name}/{name}: a link or a path, not a file of the bundle")
        if not path.is_file():
            raise BundleError(f"{folder.name}/{name}: missing: copy or export the bundle again")
