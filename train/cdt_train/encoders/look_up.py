"""Where the weights of a foundation encoder are, and why they are not.

They are looked for in this order: the path that was given, `$CDT_WEIGHTS/KEY`, the cache of the
Hugging Face hub, and the network only where that was allowed. Nothing here imports a heavy library
or asks the network to find out what is on this machine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from cdt_runtime.encoder_card import EncoderCard
from cdt_runtime.errors import CheckpointError, MissingDependencyError
from cdt_train.encoders.entry import Entry

Status = Literal["READY", "GATED", "OFFLINE", "MISSING_DEPENDENCY", "NOT_CACHED"]

WEIGHTS_VARIABLE = "CDT_WEIGHTS"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".pb", ".index")
BRANCH = "main"


@dataclass(frozen=True)
class Availability:
    """Whether an encoder can be used here.

    Attributes:
        status: READY, or what stands in the way.
        reason: in words; empty where it is ready.
        cure: what to do; empty where it is ready.
        path: of the weights, where they were found.
    """

    status: Status
    reason: str = ""
    cure: str = ""
    path: Path | None = None


def availability(entry: Entry, given: Path | None = None) -> Availability:
    """Tell whether an encoder can be used here, without network and heavy imports.

    Args:
        entry: of the encoder.
        given: path of its weights, if there is one.
    """
    card = entry.card
    absent = [name for name in card.packages if find_spec(name) is None]
    if absent:
        needs = " and ".join(absent)
        return Availability("MISSING_DEPENDENCY", f"{needs} not installed", _install(card, absent))
    found = local_weights(entry, given)
    if found is not None:
        return Availability("READY", path=found)
    if card.gated:
        return Availability("GATED", "weights not on this machine", _accept(entry))
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return Availability(
            "OFFLINE", "weights not on this machine, HF_HUB_OFFLINE is set", _place(entry)
        )
    return Availability("NOT_CACHED", "weights not on this machine", _place(entry))


def local_weights(entry: Entry, given: Path | None = None) -> Path | None:
    """Find weights on this machine, a folder or the file that was given; None for none."""
    if given is not None:
        return given if given.is_file() or _holds(given, entry.files) else None
    root = os.environ.get(WEIGHTS_VARIABLE)
    own = Path(root) / entry.folder if root else None
    if own is not None and _holds(own, entry.files):
        return own
    cached = cached_snapshot(entry.card)
    return cached if cached is not None and _holds(cached, entry.files) else None


def require_weights(
    entry: Entry, given: Path | None = None, *, allow_network: bool = False
) -> Path:
    """Find weights, or fetch them from the hub where that is allowed.

    Raises:
        MissingDependencyError: a package that loading needs is not installed.
        CheckpointError: there are none; the message names the reason, the licence and the cure.
    """
    card = entry.card
    found = availability(entry, given)
    if found.path is not None:
        return found.path
    if found.status == "MISSING_DEPENDENCY":
        raise MissingDependencyError(f"encoder {card.key}: {found.reason}: {found.cure}")
    if given is not None:
        raise CheckpointError(
            f"encoder {card.key}: no weights at {given}: expected a file, or a folder with "
            f"{' or '.join(entry.files)}{_prepared(card)}"
        )
    if allow_network and found.status != "OFFLINE":
        return _fetched(entry)
    raise CheckpointError(f"encoder {card.key}: {found.reason}: {found.cure}")


def cached_snapshot(card: EncoderCard) -> Path | None:
    """Find a repository in the hub's cache by its documented layout."""
    folder = hub_cache() / f"models--{card.source.replace('/', '--')}"
    revision = card.revision or BRANCH
    pointer = folder / "refs" / revision
    if pointer.is_file():
        revision = pointer.read_text("utf-8").strip()
    snapshot = folder / "snapshots" / revision
    return snapshot if snapshot.is_dir() else None


def hub_cache() -> Path:
    """Where the hub's library keeps what it fetched."""
    home = os.environ.get("HF_HOME")
    root = Path(home) if home else Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or root / "hub")


def weights_identity(path: Path) -> str:
    """Hash the weight files of a folder, or one file: SHA-256, hexadecimal."""
    total = hashlib.sha256()
    for file in _weight_files(path):
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        with file.open("rb") as stream:
            total.update(f"{name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _weight_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    found = sorted(file for file in path.rglob("*") if file.is_file())
    yield from (file for file in found if _is_weight(file))


def _is_weight(file: Path) -> bool:
    return file.suffix in WEIGHT_SUFFIXES or ".data-" in file.name


def _holds(folder: Path, patterns: Sequence[str]) -> bool:
    return folder.is_dir() and any(next(folder.glob(one), None) for one in patterns)


def _fetched(entry: Entry) -> Path:
    """Fetch a repository from the hub.

    Raises:
        CheckpointError: access is refused, there is no such repository, or no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    card = entry.card
    try:
        return Path(snapshot_download(card.source, revision=card.revision))
    except GatedRepoError as error:  # a kind of RepositoryNotFoundError: it comes first
        raise CheckpointError(f"encoder {card.key}: access refused: {_accept(entry)}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"encoder {card.key}: the hub has no {card.source} for this account: {_accept(entry)}"
        ) from error
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(
            f"encoder {card.key}: can't be fetched ({first}): {_place(entry)}"
        ) from error


def _install(card: EncoderCard, absent: list[str]) -> str:
    return (
        f"pip install 'cdt-edge[{card.extra}]'" if card.extra else f"pip install {' '.join(absent)}"
    )


def _accept(entry: Entry) -> str:
    card = entry.card
    return (
        f"accept the licence at {card.licence_url}, then put the files in "
        f"${WEIGHTS_VARIABLE}/{entry.folder}, or fetch them with model.allow_download=true"
        f"{_prepared(card)}"
    )


def _place(entry: Entry) -> str:
    card = entry.card
    return (
        f"put the files of {card.source} in ${WEIGHTS_VARIABLE}/{entry.folder} (licence: "
        f"{card.licence_url}), or fetch them with model.allow_download=true{_prepared(card)}"
    )


def _prepared(card: EncoderCard) -> str:
    return f"; then {card.preparation}" if card.preparation else ""
