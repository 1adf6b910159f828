"""What is known of a foundation encoder: where it comes from, what it takes in, what it gives.

A card is plain data. Training looks encoders up by it, an export puts it into the bundle beside the
graph, and the runtime prepares inputs by nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cdt_runtime.plain import from_plain

Modality = Literal["tile", "ct", "text"]
Resize = Literal["bicubic", "bilinear", "bilinear_plain"]
Verified = Literal["weights", "random", "none"]


@dataclass(frozen=True)
class VolumeSpec:
    """How a CT becomes the input of an encoder.

    Attributes:
        windows: one `(low, high)` in HU a channel, mapped to 0 to 1.
        max_slices: slices that are taken at the most, evenly spaced, where the encoder looks at
            slices one by one; None where it takes the whole volume.
        shape: `(D, H, W)` that a whole volume is brought to; None for slices.
        spacing_mm: `(z, y, x)` that the encoder was trained at; None where it does not matter.
        orientation: where the array's axes grow to: "SPL" as a `Volume` has them, or "RAS".
    """

    windows: tuple[tuple[float, float], ...]
    max_slices: int | None = None
    shape: tuple[int, int, int] | None = None
    spacing_mm: tuple[float, float, float] | None = None
    orientation: Literal["SPL", "RAS"] = "SPL"


@dataclass(frozen=True)
class InputSpec:
    """How an image becomes the input of an encoder.

    Attributes:
        size: height and width, pixels.
        layout: order of the axes, behind the batch.
        resize: filter; `bilinear_plain` weighs the four neighbours whatever the scale, the others
            widen with it, as Pillow's do.
        resize_to: shorter side before the centre of `size` is cut out; None: straight to `size`.
        pad: fill to a square with zeros before resizing; else an oblong image is squeezed.
        mean: subtracted from each channel of an image in 0 to 1.
        std: divides what is left.
        mpp: microns a pixel that the encoder was trained at, each of them; empty if not known.
        volume: for CT, how slices or the volume are made; None for tiles.
    """

    size: int
    layout: Literal["NCHW", "NHWC", "NCDHW"] = "NCHW"
    resize: Resize = "bicubic"
    resize_to: int | None = None
    pad: bool = False
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    mpp: tuple[float, ...] = ()
    volume: VolumeSpec | None = None


@dataclass(frozen=True)
class EncoderCard:
    """A foundation encoder.

    Attributes:
        key: name in the registry.
        title: as its makers call it.
        modality: what it looks at.
        source: hub id, or a library and its name for the network.
        revision: of the hub's repository; None for its newest.
        licence: its short name.
        licence_url: where it is read and accepted.
        gated: whether the weights are handed out only after accepting the licence.
        commercial: whether the licence allows commercial use.
        embedding_dim: D, width of the embedding.
        token_dim: Dt, width of the tokens; None where it gives none.
        pooling: how the embedding is made, in words.
        input: what it takes in.
        packages: importable modules that loading needs, beyond those of `train`.
        extra: the extra of this package that brings them; None where pip takes them by name.
        preparation: what has to be done with the files of `source` before they can be loaded, a
            command; empty for nothing.
        options: names of input specs that were published beside `input`.
        verified: with what it has been run: real weights, random ones, or not at all.
        origin: "weights" or "random-weights" of a loaded or exported encoder; None for the card.
        weights_sha256: identity of the weights that were loaded; None for the card.
    """

    key: str
    title: str
    modality: Modality
    source: str
    licence: str
    licence_url: str
    embedding_dim: int
    input: InputSpec
    token_dim: int | None = None
    pooling: str = ""
    revision: str | None = None
    gated: bool = False
    commercial: bool = False
    packages: tuple[str, ...] = ()
    extra: str | None = None
    preparation: str = ""
    options: Mapping[str, InputSpec] = field(default_factory=dict)
    verified: Verified = "none"
    origin: Literal["weights", "random-weights"] | None = None
    weights_sha256: str | None = None

    @property
    def graph(self) -> str:
        """Name of its graph in a bundle, and of the file without its ending."""
        return f"encoder_{re.sub('[^A-Za-z0-9]', '_', self.key)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values, as JSON holds them."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderCard:
        """Read back what `to_dict` gave.

        Raises:
            BundleError: a key is missing or unknown, or a value of another type.
        """
        return from_plain(cls, values, "encoder card")
