"""A page of evidence: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cdt_runtime import __version__
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.evidence.found import GRID, Evidence, SupportTile
from cdt_runtime.evidence.style import STYLE
from cdt_runtime.prediction import Prediction
from cdt_runtime.printable import counted
from cdt_runtime.report import CANT_TELL, NOTICE, bundle_name
from cdt_runtime.tile import RGB

Row = Sequence[str]

SHOWN = 10
"""Support tiles that are listed."""

FOR, AGAINST = (0, 114, 178), (213, 94, 0)
"""Colours of what speaks for the answer, and against it: told apart with any colour vision."""

COLOURS = ("red", "green", "blue")
"""Of the first markers of a tile that is not RGB."""

ABREAST = 8
"""Slices of the CT in a row."""

STRONG = 0.05
"""Change of a probability from which on a colour covers a part fully, at the least."""


def tile_page(evidence: Evidence, classifier: FewShotClassifier) -> str:
    """Make the page of one tile."""
    prediction = evidence.prediction
    parts = [
        _heading(prediction.tile, *_answer(prediction)),
        f'<div class="top">{_picture(evidence, classifier.preprocess.channels)}'
        f"<div>{_bars(prediction.probabilities)}{_doubt(prediction)}</div></div>",
        _support(evidence),
        _ct(evidence),
        _identity(prediction, classifier),
    ]
    return _page(prediction.tile, parts)


def slide_page(summary: Mapping[str, Any], overview: bytes) -> str:
    """Make the page of a slide.

    Args:
        summary: as `slides.results.write_results` gives it.
        overview: the PNG that lies beside it.
    """
    total = max(1, summary["tiles"])
    counts = {**summary["labels"], CANT_TELL: summary["abstained"]}
    if summary["unreadable"]:
        counts["unreadable"] = summary["unreadable"]
    shares = {name: count / total for name, count in counts.items()}
    most = max(summary["labels"], key=lambda name: summary["labels"][name])
    found = f"{shares[most]:.0%} {most}" if summary["labels"][most] else "no answer on any"
    answer = f"{counted(summary['tiles'], 'tile')} with tissue, {found}"
    reasons = [(reason, str(count)) for reason, count in summary["reasons"].items()]
    picture = (
        f'<figure><div class="seen"><img alt="The slide with a colour a class over its tiles" '
        f'src="{_data_uri(overview)}"></div><figcaption>A colour a class; the legend is in the '
        f"picture.</figcaption></figure>"
    )
    ct = summary["ct"]
    facts = {
        "CT": f"{ct['series']}. {ct['off'] or ''}" if ct else "none: the tiles alone decide",
        "Tiles": f"{summary['tile_microns']:.0f} microns a side",
        "Bundle": summary["bundle"],
        "Engine": summary["backend"],
        "Trained on": summary["training_data"],
        "Files": ", ".join(summary["files"]),
    }
    parts = [
        _heading(summary["slide"], answer, None),
        f'<div class="top">{picture}<div>{_bars(shares)}</div></div>',
        _section("Why tiles got no answer", _table(("reason", "tiles"), reasons))
        if reasons
        else "",
        _section("What this rests on", _facts(facts)),
    ]
    return _page(summary["slide"], parts)


def _page(title: str, parts: Iterable[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: evidence</title><style>{STYLE}</style></head><body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _heading(name: str, answer: str, reason: str | None) -> str:
    why = f'<p class="reason">{escape(reason)}</p>' if reason else ""
    return (
        f"<header><h1>{escape(name)}</h1>"
        f'<p class="answer">{escape(answer)}</p>{why}'
        f'<p class="notice">{escape(NOTICE)}</p></header>'
    )


def _answer(prediction: Prediction) -> tuple[str, str | None]:
    if prediction.label is None:
        return CANT_TELL.capitalize(), prediction.reason
    chance = prediction.probabilities[prediction.label]
    return f"{prediction.label}, {_percent(chance)}", None


def _percent(chance: float) -> str:
    return f"{100 * chance:.1f} %"


def _picture(evidence: Evidence, channels: tuple[str, ...]) -> str:
    seen, what = _shown(evidence.tile, channels)
    over = _data_uri(_png(_overlay(evidence.relevance, seen.shape[0])))
    speaks = f"Parts that speak for {evidence.likeliest} in blue, against it in orange"
    return (
        '<figure><input type="checkbox" id="plain"> <label for="plain">the tile alone</label>'
        f'<div class="seen"><img alt="{escape(what)}" src="{_data_uri(_png(seen))}">'
        f'<img class="over" alt="{escape(speaks)}" src="{over}"></div>'
        f"<figcaption>{escape(what)}. Blue: covering that part lowers the probability of "
        f"{escape(evidence.likeliest)}; orange: raises it. The strongest changes it by "
        f"{100 * float(np.abs(evidence.relevance).max()):.1f} points.</figcaption></figure>"
    )


def _shown(tile: NDArray[Any], channels: tuple[str, ...]) -> tuple[NDArray[np.uint8], str]:
    """The tile as people see it, `(S, S, 3)`, and what the picture is."""
    values = tile if tile.dtype == np.uint8 else np.round(255 * tile)
    if tuple(channels) == RGB:
        return values.astype(np.uint8).transpose(1, 2, 0), "The tile as the model sees it"
    some = values[:3].astype(np.float32)
    top = np.maximum(np.quantile(some, 0.995, axis=(1, 2)), 1)[:, None, None]
    lit = np.zeros((3, *values.shape[1:]), np.float32)
    lit[: len(some)] = np.clip(255 * some / top, 0, 255)
    names = ", ".join(
        f"{name} in {colour}" for name, colour in zip(channels[:3], COLOURS, strict=False)
    )
    return lit.astype(np.uint8).transpose(1, 2, 0), f"The tile as the model sees it: {names}"


def _overlay(relevance: NDArray[np.float32], side: int) -> NDArray[np.uint8]:
    """Colours with transparency over the tile, `(S, S, 4)`."""
    smooth = Image.fromarray(relevance).resize((side, side), Image.Resampling.BICUBIC)
    values = np.asarray(smooth) / max(STRONG, float(np.abs(relevance).max()))
    colours = np.where(values[..., None] >= 0, np.array(FOR), np.array(AGAINST))
    opaque = np.clip(150 * np.abs(values), 0, 150)
    return np.concatenate([colours, opaque[..., None]], axis=2).astype(np.uint8)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _bars(chances: Mapping[str, float]) -> str:
    ordered = sorted(chances.items(), key=lambda item: -item[1])
    rows = "".join(
        f'<li{" class=first" if place == 0 else ""}><div class="line"><span>{escape(name)}</span>'
        f'<span>{_percent(chance)}</span></div><div class="track"><div class="fill" '
        f'style="width:{100 * chance:.1f}%"></div></div></li>'
        for place, (name, chance) in enumerate(ordered)
    )
    return f'<ul class="bars">{rows}</ul>'


def _doubt(prediction: Prediction) -> str:
    chances = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
    runner, chance = chances[1]
    facts = {
        "Runner-up": f"{runner}, {_percent(chance)}",
        "Unlikeness": f"{prediction.unlikeness:.2f} of the distance from the training tiles, in "
        "colour and texture, beyond which there is no answer",
    }
    if prediction.prediction_set is not None:
        facts["Set"] = ", ".join(prediction.prediction_set) or "no class"
    for number, warning in enumerate(prediction.warnings, start=1):
        facts[f"Warning {number}" if len(prediction.warnings) > 1 else "Warning"] = warning
    return _facts(facts)


def _support(evidence: Evidence) -> str:
    count, flips = len(evidence.support), evidence.changed_by_one
    if flips:
        hangs = f"Without one of {flips} of them another class would be the likeliest."
    else:
        hangs = "None of them alone decides: without any one the likeliest class stays."
    table = _table(
        ("support tile", "class", "similarity", "share", "without it"),
        [_support_row(one, evidence.likeliest) for one in evidence.support[:SHOWN]],
        f"The {min(SHOWN, count)} most similar of {counted(count, 'support tile')}, by the start "
        "of their hash; shares of all add up to 100 %.",
    )
    return _section("What speaks for it", f"<p>{escape(hangs)}</p>{table}")


def _support_row(one: SupportTile, likeliest: str) -> Row:
    if one.without is None:
        without = "its class would have none"
    else:
        name, chance = one.without
        without = f"{_percent(chance)} {name}" + ("" if name == likeliest else ", another class")
    origin = " (enrolled)" if one.enrolled else ""
    return (
        f"{one.sha256[:12]}{origin}",
        one.label,
        f"{one.similarity:.3f}",
        _percent(one.share),
        without,
    )


def _ct(evidence: Evidence) -> str:
    prediction = evidence.prediction
    ct, change = prediction.ct, prediction.ct_change
    if ct is None:
        return _section("What the CT changed", "<p>There was none: the tile alone decides.</p>")
    facts = {"CT": ct.series}
    if change is None:
        shown = f"<p>The answer rests on it.</p>{_facts(facts)}{_strip(evidence)}"
        return _section("What the CT changed", shown)
    chances = prediction.probabilities
    rows = [
        (name, _percent(chances[name]), _percent(chances[name] + change.shift[name]))
        for name in chances
    ]
    table = _table(("class", "without (the answer)", "with the CT"), rows)
    return _section("What the CT would change", f"<p>{escape(ct.off or '')}</p>{table}")


def _strip(evidence: Evidence) -> str:
    """The slices of the CT input, coloured by what covering each changes."""
    if evidence.slices is None or evidence.ct is None:
        return ""
    gray = np.clip(127.5 * (evidence.ct + 1), 0, 255)[..., None].repeat(3, axis=-1)
    strength = evidence.slices / max(STRONG, float(np.abs(evidence.slices).max()))
    colours = np.where(strength[:, None] >= 0, np.array(FOR), np.array(AGAINST))
    opaque = 0.6 * np.abs(strength)[:, None, None, None]
    tinted = gray * (1 - opaque) + colours[:, None, None] * opaque
    rows = [
        np.concatenate(list(part), axis=1)
        for part in np.array_split(tinted, -(-len(tinted) // ABREAST))
        if len(part)
    ]
    widest = max(row.shape[1] for row in rows)
    full = [np.pad(row, ((0, 0), (0, widest - row.shape[1]), (0, 0))) for row in rows]
    picture = _data_uri(_png(np.concatenate(full).astype(np.uint8)))
    most = int(np.abs(evidence.slices).argmax())
    return (
        f'<figure class="strip"><img alt="Slices of the CT as the model sees it" src="{picture}">'
        f"<figcaption>The {len(tinted)} slices that the model sees, in reading order. Blue: "
        f"covering it lowers the probability of {escape(evidence.likeliest)}; orange: raises it. "
        f"Covering slice {most + 1} changes it most, by "
        f"{-100 * float(evidence.slices[most]):+.1f} points.</figcaption></figure>"
    )


def _identity(prediction: Prediction, classifier: FewShotClassifier) -> str:
    counts = classifier.prototypes.counts()
    return _section(
        "What this rests on",
        _facts(
            {
                "Tile": f"SHA-256 {prediction.sha256}",
                "Bundle": bundle_name(classifier.bundle),
                "Support": ", ".join(f"{count} {name}" for name, count in counts.items()),
                "Prototypes": f"fitted by {classifier.prototypes.fit}",
                "Engine": classifier.engine,
                "Trained on": classifier.bundle.manifest["training"]["data"],
                "Covering": f"{GRID} x {GRID} overlapping parts, one after another",
                "Made by": f"cdt-infer {__version__}",
            }
        ),
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items()
    )
    return f"<dl>{rows}</dl>"


def _table(head: Row, rows: Sequence[Row], caption: str | None = None) -> str:
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    names = "".join(f'<th scope="col"{_kind(name)}>{escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{_kind(name)}>{escape(cell)}</td>" for name, cell in zip(head, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="table"><table>{said}'
        f"<thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _kind(column: str) -> str:
    words = ("similarity", "share", "without (the answer)", "with the CT", "tiles")
    return ' class="number"' if column in words else ""
