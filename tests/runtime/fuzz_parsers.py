"""Coverage-guided fuzzing of our own parsers, by hand: needs `pip install atheris`.

    python tests/runtime/fuzz_parsers.py tiff -max_total_time=600
    python tests/runtime/fuzz_parsers.py dicom -max_total_time=600 -artifact_prefix=found/

Anything that a parser raises but its own error ends the run and keeps the input. The decoding
process would turn it into an input error, but one that can't say what is wrong with the file.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
import fuzzing

with atheris.instrument_imports(include=["cdt_runtime"]):
    from cdt_runtime import codestream, ct_folder, onnx_scan, photo, tiff, tiff_ifd, tiff_meta
    from cdt_runtime.dicom_alike import Layouts
    from cdt_runtime.dicom_frame import frames_of
    from cdt_runtime.dicom_header import read_header
    from cdt_runtime.dicom_quiet import quiet
    from cdt_runtime.errors import CdtError
    from cdt_runtime.slides import pyramid
    from cdt_runtime.tiff_page import segment_spans

FILE = Path(tempfile.mkdtemp(dir=fuzzing.fast_folder())) / "one.dcm"


def tiff_file(data: bytes) -> None:
    """Directories, tags, OME-XML and segment lists of a tile and of a slide; nothing is decoded."""
    ifds = tiff_ifd.scan(io.BytesIO(data))
    for read in (_as_tile, _as_slide):
        with suppress(CdtError):
            read(ifds)


def _as_tile(ifds: list[tiff_ifd.Ifd]) -> None:
    pages = tiff._image_pages(ifds)
    planes = tiff_meta.layout(pages)
    for page in pages:
        tiff.check_photometric(page)
        segment_spans(page)
    tiff.channel_names(planes)
    tiff.stated_mpp(pages[0], planes)


def _as_slide(ifds: list[tiff_ifd.Ifd]) -> None:
    for level in pyramid._parse("slide", ifds, None).levels:
        for page in level.pages:
            segment_spans(page, slide=True)


def dicom_file(data: bytes) -> None:
    """The header of one file to its frames."""
    FILE.write_bytes(data)
    with quiet():
        header = read_header(str(FILE), "one.dcm", Layouts())
        if header is not None and not header.is_directory and ct_folder._kind(header):
            list(frames_of(header))


def streams(data: bytes) -> None:
    """Headers of JPEG, JPEG 2000 and WebP streams."""
    for parse in (codestream.jpeg_head, codestream.jpeg2000_head, codestream.webp_size):
        with suppress(codestream.CodestreamError):
            parse(data)  # type: ignore[operator]


PARSERS: dict[str, tuple[Callable[[bytes], object], Callable[[], list[bytes]]]] = {
    "tiff": (tiff_file, fuzzing.tiff_seeds),
    "dicom": (dicom_file, fuzzing.dicom_seeds),
    "streams": (streams, lambda: [one for one in fuzzing.tiff_seeds() if one[:2] != b"II"]),
    "png": (photo.read_png, lambda: [one for one in fuzzing.tiff_seeds() if one[:2] == b"\x89P"]),
    "onnx": (lambda data: onnx_scan.require_whole(data, "graph"), fuzzing.onnx_seeds),
}


def main() -> None:
    name = sys.argv.pop(1)
    parse, seeds = PARSERS[name]
    corpus = Path(tempfile.mkdtemp(prefix=f"cdt-{name}-"))
    for number, seed in enumerate(seeds()):
        (corpus / str(number)).write_bytes(seed)

    def one(data: bytes) -> None:
        with suppress(CdtError):
            parse(data)

    atheris.Setup([*sys.argv, str(corpus), "-max_len=65536", "-timeout=10"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
