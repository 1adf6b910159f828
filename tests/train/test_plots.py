"""Every picture is drawn, at its size, with what it is about in it; how it looks is for eyes."""

from __future__ import annotations

from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from cdt_train.canvas import plain
from cdt_train.intervals import over_folds
from cdt_train.metrics import curves
from cdt_train.pictures import (
    map_points,
    plot_ct_attention,
    plot_embeddings,
    plot_tile_attention,
    tile_image,
)
from cdt_train.plots import (
    plot_accuracy_by_k,
    plot_confusion,
    plot_curves,
    plot_reliability,
    plot_risk_coverage,
    plot_roc,
)
from cdt_train.scores import EpisodeScores

CLASSES = ("invasion_front", "tumor_stroma", "necrosis <b>&", "$lymph$ 淋巴 of a very long name")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """Every figure that is saved, to be asked what it shows."""
    seen: list[matplotlib.figure.Figure] = []
    write = matplotlib.figure.Figure.savefig

    def savefig(figure: matplotlib.figure.Figure, *args: object, **options: object) -> None:
        seen.append(figure)
        write(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return seen


def texts(figure: matplotlib.figure.Figure) -> str:
    from matplotlib.text import Text

    found = figure.findobj(Text)
    return "\n".join(text.get_text() for text in found)


def drawn(path: Path) -> np.ndarray:
    """Pixels of a PNG that is no blank sheet."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.std() > 5
    return pixels


def scores(ways: int, sharp: float = 2.0) -> EpisodeScores:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, ways, 1200)
    logits = sharp * (1.2 * np.eye(ways)[truth] + rng.normal(size=(1200, ways)) * 0.7)
    return EpisodeScores(np.full(100, 0.8), logits, truth)


def test_training_curves_mark_the_epoch_that_was_kept(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    history = [
        {"epoch": n, "loss": 2 / n, "val_loss": 2 / n + 0.01 * n, "val_accuracy": 1 - 0.5 / n}
        for n in range(1, 13)
    ]
    panels = {"loss": "loss", "val_loss": "loss", "val_accuracy": "accuracy", "absent": "accuracy"}
    plot_curves(tmp_path / "a" / "curves.png", "Fold 1", history, panels, best_epoch=7)
    drawn(tmp_path / "a" / "curves.png")
    left, right = figures[0].axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("loss", "accuracy")
    lines = {line.get_label(): line for line in right.lines}
    assert set(lines) == {"val accuracy", "best epoch"}
    assert list(lines["best epoch"].get_xdata()) == [7, 7]
    assert len(lines["val accuracy"].get_xdata()) == 12


def test_training_curves_without_a_best_epoch_mark_none(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    plot_curves(tmp_path / "c.png", "SSL", [{"epoch": 1, "loss": 1.0}], {"loss": "loss"})
    assert "best epoch" not in texts(figures[0])


@pytest.mark.parametrize("ways", [2, 4])
def test_a_confusion_matrix_shows_shares_and_counts(
    tmp_path: Path, figures: list[matplotlib.figure.Figure], ways: int
) -> None:
    confusion = np.arange(ways * ways).reshape(ways, ways) * 10
    confusion[0] = 0
    confusion[1] = [75, 25, *[0] * (ways - 2)]
    plot_confusion(tmp_path / "c.png", "Test tiles", confusion, CLASSES[:ways])
    drawn(tmp_path / "c.png")
    shown = texts(figures[0])
    assert "75 %\n75" in shown
    assert "0 %\n0" in shown
    assert "true class" in shown
    assert "predicted class" in shown


def test_roc_curves_name_each_class_with_its_area(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    plot_roc(
        tmp_path / "r.png", "ROC, each class against the rest", curves(scores(4))["roc"], CLASSES
    )
    drawn(tmp_path / "r.png")
    shown = texts(figures[0])
    assert "invasion_front: AUC 0." in shown
    assert "false positive rate" in shown


def test_reliability_and_risk_are_drawn_for_several_rows(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    before, after = curves(scores(3, 5.0)), curves(scores(3, 5.0), 3.0)
    plot_reliability(
        tmp_path / "rel.png",
        "Reliability, K = 5",
        {"before": before["reliability"], "after calibration": after["reliability"]},
    )
    plot_risk_coverage(
        tmp_path / "risk.png",
        "Risk and coverage, K = 5",
        {"with CT": before["risk_coverage"], "without CT": after["risk_coverage"]},
    )
    for name in ("rel.png", "risk.png"):
        drawn(tmp_path / name)
    assert "after calibration" in texts(figures[0])
    assert "errors in %" in texts(figures[1])
    upper, lower = figures[0].axes
    assert sum(lower.lines[0].get_ydata()) == pytest.approx(100)
    assert upper.get_ylim() == (0, 1.02)


@pytest.mark.parametrize("interval", ["ci95", "std"])
def test_accuracy_by_k_shows_every_row_with_its_interval(
    tmp_path: Path, figures: list[matplotlib.figure.Figure], interval: str
) -> None:
    rng = np.random.default_rng(0)
    rows = {
        name: {k: over_folds((level + 0.02 * k + 0.01 * rng.normal(size=3)).tolist()) for k in ks}
        for name, level, ks in (
            ("with CT", 0.8, (1, 3, 5, 10)),
            ("without CT", 0.79, (1, 3, 5, 10)),
            ("wrong patient's CT", 0.75, (1, 3, 5, 10)),
            ("colour statistics", 0.6, (1, 3, 5, 10)),
            ("permuted labels", 0.3, (5,)),
        )
    }
    path = tmp_path / "k.png"
    plot_accuracy_by_k(path, "Accuracy by K", rows, chance=1 / 3, interval=interval)
    drawn(path)
    shown = texts(figures[0])
    assert set(rows) | {"chance"} <= set(shown.splitlines())
    assert ("95 % interval" in shown) == (interval == "ci95")
    assert [tick.get_text() for tick in figures[0].axes[0].get_xticklabels()] == [
        "1",
        "3",
        "5",
        "10",
    ]


def clusters(count: int, width: int = 32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, count)
    points = 3 * np.eye(3, width)[labels] + rng.normal(size=(count, width)) * 0.5
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), labels


def test_a_map_keeps_neighbours_and_is_the_same_again() -> None:
    points, labels = clusters(90)
    laid = map_points(points, seed=1)
    assert laid.shape == (90, 2)
    assert np.array_equal(laid, map_points(points, seed=1))
    gaps = np.linalg.norm(laid[:, None] - laid[None], axis=2) + 1e9 * np.eye(90)
    assert (labels[gaps.argmin(axis=1)] == labels).mean() > 0.9


@pytest.mark.parametrize("count", [1, 2, 9, 10])
def test_a_map_of_few_points_does_not_fail(count: int) -> None:
    assert map_points(clusters(count)[0]).shape == (count, 2)


def test_a_map_of_equal_points_does_not_fail() -> None:
    assert np.isfinite(map_points(np.ones((12, 8), np.float32))).all()


@pytest.mark.parametrize("joint", [True, False])
def test_embeddings_are_drawn_in_panels_and_thinned(
    tmp_path: Path, figures: list[matplotlib.figure.Figure], joint: bool
) -> None:
    points, labels = clusters(700)
    turned = points + np.float32(0.3) * np.random.default_rng(1).normal(size=points.shape)
    panels = {"with CT": points, "without CT": turned}
    plot_embeddings(
        tmp_path / "e.png", "Test tiles of fold 1", panels, labels, CLASSES[:3], joint=joint
    )
    drawn(tmp_path / "e.png")
    kept = 300 if joint else 600
    for axes in figures[0].axes:
        assert sum(len(part.get_offsets()) for part in axes.collections) == kept
    assert f"with CT (n = {kept})" in texts(figures[0])
    assert (figures[0].axes[0].get_xlim() == figures[0].axes[1].get_xlim()) == joint


def test_rgb_tiles_stay_as_they_are_and_markers_get_colours() -> None:
    rgb = np.zeros((3, 4, 4), np.uint8)
    rgb[0] = 255
    assert np.array_equal(tile_image(rgb)[0, 0], [1, 0, 0])
    markers = np.zeros((6, 8, 8), np.float32)
    markers[2, 0, 0] = 0.01
    mixed = tile_image(markers)
    assert mixed.shape == (8, 8, 3)
    assert mixed[0, 0].max() > 0.3
    assert mixed[1:].max() == 0


def test_attention_over_tiles_shares_one_scale(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:64, :64] / 63
    images = [np.stack([xx, yy, np.full_like(xx, f)], axis=-1) for f in (0.2, 0.5, 0.8)]
    weights = [rng.dirichlet(np.ones(49)).reshape(7, 7) for _ in images]
    plot_tile_attention(tmp_path / "t.png", "Attention", images, weights, CLASSES[:3])
    drawn(tmp_path / "t.png")
    heat = [axes.images[1].get_array() for axes in figures[0].axes if len(axes.images) == 2]
    most = max(w.max() for w in weights)
    assert len(heat) == 3
    for shown, given in zip(heat, weights, strict=True):
        assert shown.shape == (64, 64)
        assert shown.max() == pytest.approx(given.max() / most, rel=0.1)
        peak = np.array(np.unravel_index(shown.argmax(), shown.shape)) // (64 / 7)
        assert peak.tolist() == list(np.unravel_index(given.argmax(), given.shape))


def test_attention_over_ct_shows_the_middle_slice_of_each_layer(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    yy, xx = np.mgrid[-1:1:64j, -1:1:64j]
    body = np.where(xx**2 + 1.5 * yy**2 < 0.7, 0.1, -1.0)
    volume = np.stack([body + 0.02 * n for n in range(16)]).astype(np.float32)
    weights = np.ones((2, 4, 4)) / 64
    weights[1] *= 3
    plot_ct_attention(tmp_path / "ct.png", "Attention over the CT", volume, weights)
    drawn(tmp_path / "ct.png")
    assert "slice 5 of 16: 25 %" in texts(figures[0])
    assert "slice 13 of 16: 75 %" in texts(figures[0])
    first = figures[0].axes[0].images[0].get_array()
    low, high = np.percentile(volume, [1, 99])
    assert np.allclose(first, ((volume[4] - low) / (high - low)).clip(0, 1))


def test_attention_of_nothing_is_drawn_too(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).normal(size=(8, 16, 16)).astype(np.float32)
    plot_ct_attention(tmp_path / "ct.png", "Closed gate", volume, np.zeros((1, 2, 2)))
    drawn(tmp_path / "ct.png")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("stroma", "stroma"),
        ("_hidden", " _hidden"),
        ("a$b$c", r"a\$b\$c"),
        ("two\nlines", "two lines"),
        ("x" * 40, "x" * 23 + "…"),
    ],
)
def test_no_class_name_breaks_a_label(name: str, shown: str) -> None:
    assert plain(name) == shown
