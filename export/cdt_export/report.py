"""What an export tells the reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def parity_text(record: Mapping[str, Any]) -> str:
    """Return the parity table for the reader."""
    head = f"{'graph':<16} {'in':>4}"
    lines = [f"{head} {'max difference':>15} {'of its range':>13} {'min cosine':>11}"]
    lines += [
        f"{row['graph']:<16} {row['precision']:>4} {row['max_difference']:>15.2e} "
        f"{row['relative']:>13.2e} {row['cosine']:>11.7f}"
        for row in record["graphs"]
    ]
    lines += [
        "",
        f"{'held-out tiles':<16} {'flips':>9} {'ties':>5} {'probability':>12} {'accuracy':>9}",
    ]
    lines += [
        f"{row['context']:<16} {row['label_flips']:>3} of {row['tiles']:<3} {row['ties']:>4} "
        f"{row['max_probability_change']:>12.2e} {row['accuracy']:>9.3f}"
        for row in record["decisions"]
    ]
    lines += ["", "ties: tiles that the model itself leaves undecided, whichever way they round"]
    if any(2 * row["ties"] > row["tiles"] for row in record["decisions"]):
        lines.append("warning: most are ties: these decisions prove little; train the model longer")
    return "\n".join(lines)


def encoders_text(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of exported foundation encoders for the reader."""
    head = ("encoder", "weights", "kept as", "MB before", "MB", "covered", "min cosine", "few-shot")
    rows = [head]
    for one in reports:
        change = one.get("few_shot")
        rows.append(
            (
                one["encoder"],
                one["origin"],
                one["quantize"],
                f"{one['bytes_before'] / 1e6:.1f}",
                f"{one['bytes'] / 1e6:.1f}",
                f"{one['bytes_covered']:.0%}",
                f"{one['embedding']['min_cosine']:.5f}",
                f"{100 * change['change']:+.1f} points" if change else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
    lines += ["", *(f"written   {one['folder']}" for one in reports)]
    return "\n".join(line.rstrip() for line in lines)
