"""What `latency.py` found, as text and as a chart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = Mapping[str, Any]
NOISY = 0.03
"""A floor above this marks a run as noisy."""


def machine_text(facts: Figures) -> str:
    """The processor and the versions that shape every figure below."""
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    return f"{facts['processor']}, {facts['cores']} cores; Python {facts['python']}, {packages}"


def engines_text(found: Figures) -> str:
    """Each engine's time of one call, how many times ours it is, and its rate beside the peak."""
    peaks = found["peak_gflops"]
    lines = []
    for graph in ("tile_classifier", "ct_encoder"):
        one = found[graph]
        noise = f"noise of this run {one['noise']:.1%}"
        if one["noise"] > NOISY:
            noise += ", NOISY"
        lines += [
            f"{graph}, batch 1: {one['gflop']:.2f} GFLOP; auto takes {one['ours']}; {noise}",
            _row("", ("p50 ms", "p90 ms", "times ours", "GFLOP/s", "open ms", "off by")),
        ]
        for name, peer in one["peers"].items():
            cells = (
                f"{peer['p50']:.2f}",
                f"{peer['p90']:.2f}" if "p90" in peer else "-",
                f"{peer['times_ours']:.2f}",
                f"{peer['gflops']:.0f}",
                f"{peer['opened_ms']:.0f}",
                f"{peer['gap']:.1e}",
            )
            lines.append(_row(name, cells))
        lines += [f"  not run: {name}: {why}" for name, why in one["not_run"].items()]
    shown = ", ".join(f"{name} {value:.0f}" for name, value in peaks.items())
    lines.append(f"peak of a large product on this CPU, GFLOP/s: {shown}")
    if "peak_gflops_gpu" in found:
        shown = ", ".join(f"{name} {value:.0f}" for name, value in found["peak_gflops_gpu"].items())
        lines.append(f"peak of a large product on this GPU, GFLOP/s: {shown}")
    return "\n".join(lines)


def single_stream_text(found: Figures) -> str:
    """One tile at a time: percentiles, and the parts."""
    lines = [f"single stream, CT in the cache, {found['on']}"]
    lines.append(_row("", ("p50 ms", "p90 ms", "p99 ms", "CPU ms")))
    for name in ("end to end", "read", "engine"):
        one = found[name]
        cells = [f"{one[key]:.2f}" if key in one else "-" for key in ("p50", "p90", "p99")]
        lines.append(_row(name, (*cells, f"{one['cpu_p50']:.2f}")))
    lines.append(
        f"end to end, with {found['engine_calls']} engine calls a tile, is "
        f"{found['end_to_end_times_parts']:.3f} times the sum of its parts"
    )
    return "\n".join(lines)


def offline_text(found: Figures) -> str:
    """Many tiles at once."""
    rates, ranges = found["tiles_a_second"], found["tiles_a_second_range"]
    head = f"offline, {found['tiles']} tiles in batches of {found['batch']}, {found['on']}"
    lines = [head]
    for name, rate in rates.items():
        low, high = ranges[name]
        lines.append(f"  {name:<28}{rate:9.0f} tiles/s ({low:.0f} to {high:.0f})")
    lines.append(f"end to end reaches {found['share_of_engine']:.1%} of the engine alone")
    return "\n".join(lines)


def ct_text(found: Figures) -> str:
    """A series to the input and to tokens."""
    size = found["bytes"] / 1e6
    lines = [f"CT, {found['slices']} raw slices, {size:.0f} MB", _row("", ("p50 ms", "CPU ms"))]
    parts = ("raw read", "scan", "read and reduce", "to input", "encode", "pydicom loop")
    for name in parts:
        lines.append(_row(name, (f"{found[name]['p50']:.1f}", f"{found[name]['cpu_p50']:.1f}")))
    lines.append(
        f"to input takes {found['to_input_times_raw_read']:.2f} times the raw read; the pydicom "
        f"loop, without any resampling, {found['pydicom_times_to_input']:.2f} times that"
    )
    return "\n".join(lines)


def cold_start_text(found: Figures) -> str:
    """From process start to the first answer."""
    lines = [f"cold start, no CT in the cache, {found['on']}"]
    for name, one in found["wall_ms"].items():
        peak = found["peak_mib"][name]
        lines.append(f"  {name:<28}{one['p50']:9.0f} ms wall, peak {peak:.0f} MiB")
    lines.append(
        f"ours takes {found['times_bare']:.2f} times the bare engine, and "
        f"{found['peak_times_bare']:.2f} times its memory"
    )
    return "\n".join(lines)


def slide_text(found: Figures) -> str:
    """A whole slide."""
    side, tile = found["side"], found["tile_pixels"]
    lines = [
        f"slide, {side} x {side} JPEG pyramid, {found['tiles']} tiles of {tile} pixels, "
        f"{found['on']}",
        _row("reading all tiles", ("p50 ms", "CPU ms")),
    ]
    for name, one in found["reading"].items():
        lines.append(_row(name, (f"{one['p50']:.0f}", f"{one['cpu_p50']:.0f}")))
    lines.append(f"reading reaches {found['reading_share_of_libjpeg']:.0%} of libjpeg-turbo a core")
    for name, rate in found["tiles_a_second"].items():
        low, high = found["tiles_a_second_range"][name]
        lines.append(f"  {name:<28}{rate:9.0f} tiles/s ({low:.0f} to {high:.0f})")
    lines.append(f"end to end reaches {found['share_of_engine']:.1%} of the engine alone")
    for one in found["memory"]:
        size = f"{one['side']} x {one['side']}, {one['tiles']} tiles"
        lines.append(f"  {size:<28}{one['peak_mib']:9.0f} MiB at most")
    return "\n".join(lines)


TEXTS: Mapping[str, Callable[[Figures], str]] = {
    "engines": engines_text,
    "single_stream": single_stream_text,
    "offline": offline_text,
    "ct": ct_text,
    "cold_start": cold_start_text,
    "slide": slide_text,
}


def draw(found: Figures, path: Path) -> None:
    """Draw each engine's time of one tile, and where the time of a tile and of a CT goes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    peers = found["engines"]["tile_classifier"]["peers"]
    ours = found["engines"]["tile_classifier"]["ours"]
    names = sorted(peers, key=lambda name: -peers[name]["p50"])
    shades = ["#1f5fa8" if name == ours else "#b8c4d0" for name in names]
    bars = axes[0].barh(names, [peers[name]["p50"] for name in names], color=shades)
    axes[0].bar_label(bars, [f"{peers[name]['p50']:.2f}" for name in names], padding=3)
    axes[0].set(xlabel="ms, median", title="one tile, engine alone (blue: what auto takes)")
    ct = found["ct"]
    parts = ("pydicom loop", "to input", "read and reduce", "scan", "raw read")
    bars = axes[1].barh(parts, [ct[name]["p50"] for name in parts], color="#b8c4d0")
    bars[1].set_color("#1f5fa8")
    axes[1].bar_label(bars, [f"{ct[name]['p50']:.0f}" for name in parts], padding=3)
    axes[1].set(xlabel="ms, median", title=f"a CT of {ct['slices']} raw slices")
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.margins(x=0.12)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _row(name: str, cells: Sequence[str]) -> str:
    return f"  {name:<28}" + "".join(f"{cell:>12}" for cell in cells)
