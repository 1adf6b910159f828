"""Transfer syntaxes: how the elements of a DICOM file are written and which codec its pixels use.

Source: DICOM PS3.5 10 and annex A.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Syntax:
    """A transfer syntax: how the elements are written and which codec the pixels use."""

    implicit: bool = False
    little_endian: bool = True
    deflated: bool = False
    codec: str = ""
    """Empty for uncompressed pixels, else the family of the codec."""
    lossy: bool = False


SYNTAXES: dict[str, Syntax] = {
    "1.2.840.10008.1.2": Syntax(implicit=True),
    "1.2.840.10008.1.2.1": Syntax(),
    "1.2.840.10008.1.2.2": Syntax(little_endian=False),
    "1.2.840.10008.1.2.1.99": Syntax(deflated=True),
    "1.2.840.10008.1.2.5": Syntax(codec="RLE"),
    "1.2.840.10008.1.2.4.50": Syntax(codec="JPEG", lossy=True),
    "1.2.840.10008.1.2.4.51": Syntax(codec="JPEG", lossy=True),
    "1.2.840.10008.1.2.4.57": Syntax(codec="JPEG lossless"),
    "1.2.840.10008.1.2.4.70": Syntax(codec="JPEG lossless"),
    "1.2.840.10008.1.2.4.80": Syntax(codec="JPEG-LS"),
    "1.2.840.10008.1.2.4.81": Syntax(codec="JPEG-LS", lossy=True),
    "1.2.840.10008.1.2.4.90": Syntax(codec="JPEG 2000"),
    "1.2.840.10008.1.2.4.91": Syntax(codec="JPEG 2000", lossy=True),
}
