"""The tables of the standard for dicom-validator, from those that highdicom carries.

The validator reads them from the standard's own text, which it fetches; these hold no conditions,
so what is required under a condition counts as optional. The content tree of a structured report is
conditions throughout: its tags may be there, and `dciodvfy` and PixelMed's validator judge it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dicom_validator.validator.dicom_info import DicomInfo
from dicom_validator.validator.iod_validator import IODValidator
from highdicom import _standard_utils as tables
from pydicom import dcmread
from pydicom.datadict import tag_for_keyword


def errors_in(path: Path) -> list[str]:
    """What the validator says of a file, a line an error."""
    data = dcmread(path)
    uid = str(data.SOPClassUID)
    key = tables.get_sop_class_iod_map()[uid]
    parts = tables.get_iod_module_map()[key]
    modules = {one["key"]: {"ref": one["key"], "use": one["usage"][0]} for one in parts}
    iods = {uid: {"title": key, "modules": modules, "group_macros": {}}}
    info = DicomInfo({}, iods, {one["key"]: _module(one["key"]) for one in parts})
    found = IODValidator(data, info, log_level=100).validate()
    return [
        f"{module}: {tag} {error}"
        for module, errors in found.module_errors.items()
        for tag, error in errors.items()
    ]


CONTENT_TREE = "sr-document-content"


def _module(key: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    attributes = tables.get_module_attribute_map()[key]
    if key == CONTENT_TREE:
        return {_tag(one["keyword"]): {"type": "3"} for one in attributes if not one["path"]}
    for one in attributes:
        level = made
        for keyword in one["path"]:
            level = level[_tag(keyword)].setdefault("items", {})
        level.setdefault(_tag(one["keyword"]), {"name": one["keyword"], "type": one["type"]})
    return made


def _tag(keyword: str) -> str:
    tag = tag_for_keyword(keyword)
    assert tag is not None
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"
