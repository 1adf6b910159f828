"""Pictures of what the model sees: maps of embeddings, attention over tile and CT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cdt_train.canvas import MARKERS, PALETTE, new_figure, plain, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.floating[Any]]
MOST_POINTS = 600
"""Of one t-SNE: beyond it a picture takes long and shows no more."""

HEAT = "inferno"
"""Colours of attention: light is much; they stay in order for the colour-blind and in print."""


def map_points(embeddings: Floats, seed: int = 0) -> Floats:
    """Lay embeddings out in two dimensions: PCA to 50 dimensions, then t-SNE.

    Neighbours in the map are neighbours in truth; distances between clusters and their sizes say
    nothing. Fewer than 10 points are laid out by PCA alone.

    Args:
        embeddings: `(n, E)`.
        seed: the same points and seed give the same map.

    Returns:
        `(n, 2)`.

    Source: van der Maaten and Hinton 2008.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if np.ptp(embeddings, axis=0).max() == 0:  # one point, or all the same
        return np.zeros((len(embeddings), 2))
    few = len(embeddings) < 10
    width = min(2 if few else 50, *embeddings.shape)
    reduced = PCA(width, random_state=seed).fit_transform(embeddings.astype(np.float64))
    if few:
        return np.pad(reduced, ((0, 0), (0, 2 - reduced.shape[1])))
    near = min(30.0, (len(embeddings) - 1) / 3)
    start = reduced[:, :2] / max(float(reduced[:, 0].std()), 1e-12) * 1e-4
    start = np.pad(start, ((0, 0), (0, 2 - start.shape[1])))
    laid: Floats = TSNE(2, perplexity=near, init=start, random_state=seed).fit_transform(reduced)
    return laid


def plot_embeddings(
    path: Path,
    title: str,
    panels: Mapping[str, Floats],
    labels: NDArray[np.int64],
    names: Sequence[str],
    *,
    joint: bool,
    seed: int = 0,
) -> None:
    """Draw a two-dimensional map of embeddings, a panel for each set, coloured by label.

    Args:
        path: the PNG file.
        title: of the picture.
        panels: by name the `(n, E)` embeddings of the same n things: tiles with CT and without, or
            pooled CT and tile features before alignment and after.
        labels: `(n,)`, class (or domain) of each.
        names: of the labels.
        joint: lay all panels out in one map, so that they can be compared point by point; for sets
            that live in one space.
        seed: of the choice of points and of the map.
    """
    kept = _thinned(len(labels), MOST_POINTS // (len(panels) if joint else 1), seed)
    sets = [np.asarray(embeddings)[kept] for embeddings in panels.values()]
    maps = (
        np.split(map_points(np.concatenate(sets), seed), len(sets))
        if joint
        else [map_points(embeddings, seed) for embeddings in sets]
    )
    figure = new_figure(4.4 * len(sets) + 0.4, 4.9, title)
    grid = figure.subplots(1, len(sets), squeeze=False, sharex=joint, sharey=joint)
    for axes, name, points in zip(grid[0], panels, maps, strict=True):
        _scatter(axes, points, labels[kept], names)
        axes.set_title(f"{plain(name, 40)} (n = {len(kept)})", fontsize=9)
    handles, listed = grid[0][0].get_legend_handles_labels()
    columns = min(4, len(names))
    figure.legend(handles, listed, loc="outside lower center", ncols=columns, fontsize=8)
    save(figure, path)


def tile_image(tile: NDArray[Any]) -> Floats:
    """Make an RGB picture of a tile input.

    Args:
        tile: `(M, S, S)`. Three channels are taken for RGB; others are laid over one another, each
            in a colour of its own, stretched to its 99th percentile.

    Returns:
        `(S, S, 3)`, 0 to 1.
    """
    from matplotlib.colors import to_rgb

    values = tile.astype(np.float64)
    if len(values) == 3:
        return np.moveaxis(values / (255.0 if tile.dtype == np.uint8 else 1.0), 0, -1).clip(0, 1)
    tops = np.maximum(np.percentile(values, 99, axis=(1, 2), keepdims=True), 1e-6)
    bright = [c for c in PALETTE if c != "#000000"]
    colours = np.array([to_rgb(bright[n % len(bright)]) for n in range(len(values))])
    mixed: Floats = np.tensordot((values / tops).clip(0, 1), colours, axes=(0, 0)).clip(0, 1)
    return mixed


def plot_tile_attention(
    path: Path,
    title: str,
    images: Sequence[Floats],
    attention: Sequence[Floats],
    captions: Sequence[str],
) -> None:
    """Draw tiles, each beside itself with the attention laid over it.

    Args:
        path: the PNG file.
        title: of the picture.
        images: each `(S, S, 3)`, as `tile_image` gives it.
        attention: for each tile `(h, w)`, weight of each token, row by row; not negative.
        captions: one line a tile.
    """
    count = len(images)
    figure = new_figure(2.3 * count + 0.9, 5.1, title)
    grid = figure.subplots(2, count, squeeze=False)
    top = max(float(np.max(weights)) for weights in attention)
    for column, (image, weights, caption) in enumerate(
        zip(images, attention, captions, strict=True)
    ):
        for axes in grid[:, column]:
            axes.set_axis_off()
        grid[0, column].imshow(image)
        _overlay(grid[1, column], image.mean(axis=2), weights, top)
        grid[0, column].set_title(plain(caption, 26), fontsize=8)
    _attention_bar(figure, top, "attention of a token")
    save(figure, path)


def plot_ct_attention(path: Path, title: str, volume: Floats, attention: Floats) -> None:
    """Draw where in the CT a tile looks: for each layer of tokens, the slice in its middle.

    Args:
        path: the PNG file.
        title: of the picture.
        volume: `(D, S, S)`, one window of the CT input.
        attention: `(d, h, w)`, weight of each CT token; not negative.
    """
    layers = len(attention)
    figure = new_figure(2.6 * layers + 0.9, 5.3, title)
    grid = figure.subplots(2, layers, squeeze=False)
    middles = ((np.arange(layers) + 0.5) * len(volume) / layers).astype(int)
    low, high = np.percentile(volume, [1, 99])
    for column, (middle, weights) in enumerate(zip(middles, attention, strict=True)):
        for axes in grid[:, column]:
            axes.set_axis_off()
        image = ((volume[middle] - low) / max(high - low, 1e-12)).clip(0, 1)
        grid[0, column].imshow(image, cmap="gray", vmin=0, vmax=1)
        _overlay(grid[1, column], image, weights, float(attention.max()))
        share = 100 * weights.sum() / max(float(attention.sum()), 1e-12)
        text = f"slice {middle + 1} of {len(volume)}: {share:.0f} %"
        grid[0, column].set_title(text, fontsize=8)
    _attention_bar(figure, float(attention.max()), "attention of a CT token")
    save(figure, path)


def _overlay(axes: Axes, image: Floats, weights: Floats, top: float) -> None:
    """Draw an image in gray and over it the heat of its tokens, the clearer the more weight."""
    from scipy.ndimage import zoom

    factors = [side / cells for side, cells in zip(image.shape, weights.shape, strict=True)]
    heat = zoom(weights, factors, order=1, mode="nearest", grid_mode=True)
    shares = (heat / top).clip(0, 1) if top > 0 else np.zeros_like(heat)
    axes.imshow(image, cmap="gray", vmin=0, vmax=1)
    axes.imshow(shares, cmap=HEAT, vmin=0, vmax=1, alpha=0.1 + 0.65 * shares)


def _attention_bar(figure: Figure, top: float, label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(0, top if top > 0 else 1), HEAT)
    bar = figure.colorbar(scale, ax=figure.axes, shrink=0.6, label=label)
    bar.ax.tick_params(labelsize=7)


def _thinned(count: int, most: int, seed: int) -> NDArray[np.int64]:
    chosen = np.random.default_rng(seed).permutation(count)[:most]
    return np.sort(chosen)


def _scatter(axes: Axes, points: Floats, labels: NDArray[np.int64], names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        mine = points[labels == number]
        colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        axes.scatter(
            mine[:, 0], mine[:, 1], s=14, alpha=0.75, color=colour, marker=marker, label=plain(name)
        )
    axes.set(xticks=[], yticks=[], xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)")
