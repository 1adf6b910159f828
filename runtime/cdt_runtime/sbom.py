"""A bill of materials of the runtime as it is installed here, for scanners of vulnerabilities.

Not only what pip lists: the codecs that `imagecodecs` was built with read the files that come from
outside, and are listed with their versions, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from cdt_runtime import __version__

DISTRIBUTION = "cdt-edge"
BESIDE = ("openvino", "tensorrt", "pycuda", "tifffile", "cryptography")
"""What the runtime uses where it is installed: its extras."""

CODECS = "imagecodecs"
_OWN = ("imagecodecs", "cython", "numpy", "numpy_abi")
"""Entries of its list of versions that are no library of codecs."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Part:
    """Something that the runtime is made of.

    Attributes:
        name: of the distribution or the library.
        version: of it.
        licence: as its metadata has it, on one line; empty where it does not say.
        inside: the distribution that brings it as compiled code; None for a distribution.
        needs: names of the distributions that it requires and that are installed.
    """

    name: str
    version: str
    licence: str
    inside: str | None = None
    needs: tuple[str, ...] = ()


def installed_parts() -> list[Part]:
    """List what the runtime is made of, by name, with all that it requires."""
    found: dict[str, Part] = {}
    waiting = [DISTRIBUTION, *BESIDE]
    while waiting:
        name = _normal(waiting.pop())
        if name in found:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        needs = tuple(_installed(_requirements(distribution)))
        found[name] = Part(name, distribution.version, _licence(distribution), needs=needs)
        waiting += needs
    return [*sorted(found.values(), key=lambda part: part.name), *_codecs()]


def _requirements(distribution: metadata.Distribution) -> Iterator[str]:
    for line in distribution.requires or ():
        text, _, marker = line.partition(";")
        if "extra" not in marker and (name := _NAME.match(text.strip())):
            yield _normal(name.group())


def _installed(names: Iterator[str]) -> Iterator[str]:
    for name in dict.fromkeys(names):
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:  # its marker is of another system
            continue
        yield name


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _licence(distribution: metadata.Distribution) -> str:
    about = distribution.metadata
    expressions = about.get_all("License-Expression")
    if expressions:
        return str(expressions[0])
    classifiers = about.get_all("Classifier") or []
    said = [one.rpartition(" :: ")[2] for one in classifiers if one.startswith("License :: ")]
    said = said or [one.strip().partition("\n")[0] for one in about.get_all("License") or []]
    return ", ".join(one for one in said if one)[:100]


def _codecs() -> list[Part]:
    try:
        import imagecodecs
    except ImportError:
        return []
    versions = imagecodecs.version(dict)
    return [
        Part(name, str(version), "", inside=CODECS)
        for name, version in sorted(versions.items())
        if name not in _OWN and version not in ("n/a", "unknown")
    ]


def as_cyclonedx(parts: list[Part]) -> str:
    """Return the parts as a CycloneDX document, JSON.

    Source: CycloneDX 1.6 (ECMA-424).

    Raises:
        ModuleNotFoundError: `cyclonedx-python-lib` is not installed.
    """
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion
    from packageurl import PackageURL

    licences = LicenseFactory()

    def component(part: Part) -> Component:
        kind = "pypi" if part.inside is None else "generic"
        url = PackageURL(kind, None, part.name, part.version)
        return Component(
            name=part.name,
            version=part.version,
            type=ComponentType.LIBRARY,
            purl=url,
            bom_ref=str(url),
            licenses=[licences.make_from_string(part.licence)] if part.licence else None,
        )

    made = {part.name: component(part) for part in parts if part.inside is None}
    for part in parts:
        if part.inside in made:
            made[part.inside].components.add(component(part))
    root = Component(
        name=DISTRIBUTION, version=__version__, type=ComponentType.APPLICATION, bom_ref="runtime"
    )
    made.pop(DISTRIBUTION, None)
    bom = Bom(components=made.values())
    bom.metadata.component = root
    by_name = {part.name: part for part in parts if part.inside is None}
    for name, one in made.items():
        bom.register_dependency(one, [made[need] for need in by_name[name].needs if need in made])
    own = by_name[DISTRIBUTION].needs if DISTRIBUTION in by_name else ()
    bom.register_dependency(root, [made[need] for need in own if need in made])
    outputter = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6)
    return str(outputter.output_as_string(indent=1))


def as_table(parts: list[Part]) -> str:
    """Return name, version and licence of each part, a line each."""
    names = [part.name if part.inside is None else f"  {part.name}" for part in parts]
    widths = max(map(len, names)), max(len(part.version) for part in parts)
    lines = [
        f"{name:{widths[0]}}  {part.version:{widths[1]}}  "
        f"{part.licence or ('in ' + part.inside if part.inside else 'not said')}"
        for name, part in zip(names, parts, strict=True)
    ]
    return "\n".join(line.rstrip() for line in lines)
