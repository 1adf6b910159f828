"""Planted names, flipped bytes, races on the cache, and the same answer a hundred times."""

from __future__ import annotations

import io
import json
import multiprocessing
import random
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from dicom_maker import data_set, save, set_pixels
from PIL import Image
from pydicom.datadict import DicomDictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from cdt_runtime.bundle import MANIFEST, Bundle
from cdt_runtime.cache import TokenCache
from cdt_runtime.cli import infer_command
from cdt_runtime.enroll_cli import enroll_command
from cdt_runtime.errors import BundleError
from cdt_runtime.tile import read_tile

Shell = Callable[..., tuple[int, str, str]]

CANARY = "Zyxwvut"
"""Stands in every header field that can hold text."""

TEXT_VRS = {
    **dict.fromkeys(("LO", "SH", "PN", "UC", "LT", "ST", "UT"), f"{CANARY}^Quirin"),
    **dict.fromkeys(("CS", "AE"), CANARY.upper()),
    "DA": "19470229",
    "DT": "19470229101112",
    "TM": "234759.123456",
    "AS": "947Y",
    "UR": f"http://{CANARY}.example",
    "IS": "1947022947",
    "DS": "19470229.47",
}
PLANTED = (CANARY.lower(), "19470229", "234759", "947y", "1947022947")


def plant(ds: Dataset) -> int:
    """Fill every attribute of text, date or number that is not there yet."""
    count = 0
    for tag, (vr, _, _, retired, keyword) in DicomDictionary.items():
        group = tag >> 16
        if (
            vr not in TEXT_VRS
            or retired
            or group in (0x0000, 0x0002, 0x0004, 0x0006)
            or not keyword
        ):
            continue
        if tag in ds or group == 0x0028 or keyword in NEEDED:
            continue
        ds.add(DataElement(tag, vr, TEXT_VRS[vr]))
        count += 1
    private = ds.private_block(0x0099, f"{CANARY} Inc", create=True)
    private.add_new(0x01, "LO", CANARY)
    inner = Dataset()
    inner.PatientName = CANARY
    ds.OtherPatientIDsSequence = Sequence([inner])
    ds.PatientName, ds.PatientID = f"{CANARY}^Quirin", CANARY
    return count


NEEDED = frozenset(
    {"NumberOfFrames", "RescaleType", "SpecificCharacterSet", "GantryDetectorTilt"}
    | {"ImageType", "Modality", "SliceThickness", "RescaleIntercept", "RescaleSlope"}
)


def planted_series(folder: Path, count: int = 10) -> Path:
    for index in range(count):
        ds = data_set(index)
        cells = np.full((64, 64), -1000 + 20 * index, np.int16)
        ds.Rows = ds.Columns = 64
        set_pixels(ds, cells)
        assert plant(ds) > 1500
        save(ds, folder / f"s{index}.dcm")
    return folder


def planted_tiff(tile: Path, folder: Path) -> Path:
    """The tile with names in every tag of text and in its OME-XML."""
    found = read_tile(tile)
    channels = "".join(
        f'<Channel ID="Channel:0:{at}" Name="{name}" Fluor="{CANARY}"/>'
        for at, name in enumerate(found.channels)
    )
    height, width, count = found.pixels.shape
    blocks = "".join(f'<TiffData IFD="{at}" FirstC="{at}" PlaneCount="1"/>' for at in range(count))
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        f'Creator="{CANARY}"><Experimenter ID="E:0" UserName="{CANARY}"/>'
        f'<Image ID="Image:0" Name="{CANARY}">'
        "<AcquisitionDate>1947-02-29T23:47:59</AcquisitionDate>"
        f'<Description>{CANARY}</Description><Pixels ID="Pixels:0" DimensionOrder="XYCZT" '
        f'Type="{found.pixels.dtype}" SizeX="{width}" SizeY="{height}" SizeC="{count}" SizeZ="1" '
        f'SizeT="1" PhysicalSizeX="{found.mpp}" PhysicalSizeY="{found.mpp}">{channels}{blocks}'
        f"</Pixels></Image><StructuredAnnotations><CommentAnnotation><Value>{CANARY}</Value>"
        "</CommentAnnotation></StructuredAnnotations></OME>"
    )
    texts = [(tag, "s", 0, CANARY, True) for tag in (269, 271, 272, 285, 315, 316, 33432, 65000)]
    texts.append((306, "s", 0, "1947:02:29 23:47:59", True))
    path = folder / "tile.ome.tif"
    tifffile.imwrite(
        path,
        found.pixels.transpose(2, 0, 1),
        photometric="minisblack",
        description=xml.encode(),
        metadata=None,
        extratags=texts,
        software=CANARY,
    )
    return path


def planted_png(folder: Path) -> Path:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(buffer, "PNG")
    data = buffer.getvalue()
    body = f"Author\0{CANARY}".encode()
    chunk = struct.pack(">I", len(body)) + b"tEXt" + body
    chunk += struct.pack(">I", zlib.crc32(b"tEXt" + body))
    path = folder / "photo.png"
    path.write_bytes(data[:33] + chunk + data[33:])
    return path


def planted_jpeg(folder: Path) -> Path:
    path = folder / "photo.jpg"
    exif = Image.Exif()
    for tag in (270, 271, 272, 315, 33432):
        exif[tag] = CANARY
    image = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    image.save(path, "JPEG", exif=exif, comment=CANARY)
    return path


def hits(text: str) -> list[str]:
    return [word for word in PLANTED if word in text.lower()]


def files_below(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes().decode("latin-1")


def test_a_planted_name_would_be_found(tmp_path: Path, phantom_dir: Path) -> None:
    tile = phantom_dir / "new_patient" / "tumor_stroma_1.tif"
    for path in (
        planted_series(tmp_path / "ct", 1) / "s0.dcm",
        planted_tiff(tile, tmp_path),
        planted_png(tmp_path),
        planted_jpeg(tmp_path),
    ):
        assert CANARY.lower() in hits(path.read_bytes().decode("latin-1"))


def test_no_name_of_a_header_gets_out(
    shell: Shell, bundle_dir: Path, phantom_dir: Path, tmp_path: Path, cache_dir: Path
) -> None:
    """In whatever the commands print or write, with good input and with bad."""
    copy = Path(shutil.copytree(bundle_dir, tmp_path / "engines" / "copy"))
    source = tmp_path / "in"
    source.mkdir()
    ct = planted_series(source / "ct")
    tile = planted_tiff(phantom_dir / "new_patient" / "tumor_stroma_1.tif", source)
    out = tmp_path / "out"
    out.mkdir()
    use = ("--bundle", copy, "--backend", "onnxruntime")
    log = ("--audit", out / "audit.jsonl")
    said = []
    good = [
        (infer_command, ct, tile, *use, *log),
        (infer_command, ct, tile, "--json", "--card", out / "card.html", *use, *log),
        (infer_command, ct, tile, "--slide", "--out", out / "slide", *use, *log),
        (enroll_command, "--class", "new", tile, "--ct", ct, *use, *log),
        (enroll_command, "--list", "--bundle", copy),
    ]
    for command, *words in good:
        code, printed, errors = shell(command, *words)
        assert code == 0, errors
        said += [printed, errors]
    for number, (break_ct, break_tile) in enumerate(BREAKS):
        bad = tmp_path / f"bad{number}"
        shutil.copytree(source, bad)
        break_ct(bad / "ct")
        break_tile(bad / "tile.ome.tif")
        code, printed, errors = shell(
            infer_command, bad / "ct", bad / "tile.ome.tif", *use, *log, "--json"
        )
        assert code == 2, (number, printed, errors)
        said += [printed, errors]
    for odd in (planted_png(source), planted_jpeg(source)):
        code, printed, errors = shell(infer_command, "--no-ct", odd, *use, *log)
        assert code == 2  # colour, where the model takes markers
        said += [printed, errors]
    assert [hits(text) for text in said if hits(text)] == []
    for folder in (out, cache_dir, copy):
        assert [(path, hits(text)) for path, text in files_below(folder) if hits(text)] == []
    assert len(list(files_below(out))) > 4
    assert any(True for _ in files_below(cache_dir))


def one_slice(change: Callable[[Any], object]) -> Callable[[Path], None]:
    import pydicom

    def act(folder: Path) -> None:
        path = folder / "s4.dcm"
        ds = pydicom.dcmread(path)
        change(ds)
        ds.save_as(path)

    return act


def cut(share: float) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        path = path / "s4.dcm" if path.is_dir() else path
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])

    return act


def nothing(_: Path) -> None:
    """Leave it as it is."""


def scrambled(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"SizeC=", b"Size\xff="))


BREAKS: list[tuple[Callable[[Path], None], Callable[[Path], None]]] = [
    (cut(0.3), nothing),
    (cut(0.99), nothing),
    (one_slice(lambda ds: delattr(ds, "ImagePositionPatient")), nothing),
    (one_slice(lambda ds: setattr(ds, "PatientName", CANARY + "2")), nothing),
    (one_slice(lambda ds: setattr(ds, "SeriesInstanceUID", "1.2.3")), nothing),
    (one_slice(lambda ds: setattr(ds, "PixelSpacing", [0, 1])), nothing),
    (one_slice(lambda ds: setattr(ds, "PhotometricInterpretation", CANARY.upper())), nothing),
    (one_slice(lambda ds: setattr(ds, "RescaleType", "OD")), nothing),
    (one_slice(lambda ds: setattr(ds, "BitsAllocated", 12)), nothing),
    (nothing, cut(0.5)),
    (nothing, cut(0.05)),
    (nothing, scrambled),
]


@pytest.mark.slow
def test_a_thousand_flips_of_a_bundle_are_refused_before_an_engine_sees_it(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cdt_runtime.backends.ort.load", lambda *_, **__: pytest.fail("an engine was asked")
    )
    copy = Path(shutil.copytree(bundle_dir, tmp_path / "copy"))
    files = sorted(path for path in copy.iterdir() if path.is_file())
    sizes = [path.stat().st_size for path in files]
    rng = random.Random(11)
    refused = 0
    for number in range(1000):
        # A third anywhere, a third in a file of its own weight, a third in the manifest.
        path = copy / MANIFEST if number % 3 == 0 else rng.choice(files)
        path = rng.choices(files, sizes)[0] if number % 3 == 1 else path
        place, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
        with path.open("r+b") as file:
            file.seek(place)
            kept = file.read(1)
            file.seek(place)
            file.write(bytes([kept[0] ^ bit]))
            file.flush()
            with pytest.raises(BundleError) as caught:
                Bundle.open(copy)
            assert "\n" not in str(caught.value)
            refused += 1
            file.seek(place)
            file.write(kept)
    assert refused == 1000
    Bundle.open(copy)


def _use(folder: Path, key: str, barrier: Any, wrong: Any) -> None:
    """What each process does with one cold entry."""
    cache, value = TokenCache(folder), np.full((1, 64, 32), int(key, 16) % 97, np.float32)
    barrier.wait()
    for _ in range(20):
        found = cache.get(key, value.shape)
        if found is None:
            cache.put(key, value)
        elif not np.array_equal(found, value):
            wrong.value += 1
    if cache.get(key, value.shape) is None:
        wrong.value += 1


@pytest.mark.slow
def test_eight_processes_on_one_cold_cache(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["numpy", "cdt_runtime.cache"])
    wrong = fork.Value("i", 0)
    for turn in range(50):
        barrier = fork.Barrier(8)
        folder = tmp_path / f"{turn}"
        jobs = [
            fork.Process(target=_use, args=(folder, f"{turn:064x}", barrier, wrong))
            for _ in range(8)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        assert [job.exitcode for job in jobs] == [0] * 8
        assert len(list(folder.iterdir())) == 1  # no temporary is left
    assert wrong.value == 0


@pytest.mark.slow
def test_the_same_bytes_a_hundred_times(
    bundle_dir: Path, phantom_dir: Path, tmp_path: Path, shell: Shell, cache_dir: Path
) -> None:
    """In one process, in processes of their own, and with the CT from the cache or not.

    What is measured, `timings_ms`, and whether the cache held the CT can't be the same.
    """
    patient = phantom_dir / "new_patient"
    tiles = sorted(patient.glob("*.tif"))[:2]
    words = (patient / "ct", *tiles, "--json", "--bundle", bundle_dir, "--backend", "onnxruntime")

    def said(out: str) -> str:
        lines = [json.loads(line) for line in out.splitlines()]
        for line in lines:
            line.pop("timings_ms")
            line["ct"].pop("cache_hit")
        return json.dumps(lines)

    first = None
    for turn in range(97):
        if turn % 10 == 0:
            shutil.rmtree(cache_dir, ignore_errors=True)
        code, out, _ = shell(infer_command, *words)
        assert code == 0
        first = first or said(out)
        assert said(out) == first
    for _ in range(3):
        script = "from cdt_runtime.cli import infer; infer()"
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True
        )
        assert said(done.stdout) == first
