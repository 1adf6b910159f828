from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cdt_train.intervals import over_folds, verdict
from cdt_train.plots import plot_accuracy_by_k, plot_confusion
from cdt_train.report_html import COLUMNS, NOTICE, Report, render, write_report

ROWS = {
    "with_ct": "with CT",
    "without_ct": "without CT",
    "wrong_ct": "wrong patient's CT",
    "colour_statistics": "colour statistics",
    "permuted_labels": "permuted labels",
}
NASTY = "<script>alert('x')</script> & \"stroma\""


def invented(folds: int = 3) -> Report:
    """A report with figures that no run has given."""
    rng = np.random.default_rng(0)
    levels = dict(zip(ROWS, (0.94, 0.93, 0.92, 0.7, 0.5), strict=True))
    table = {
        row: {
            k: {
                name: over_folds(
                    (level + 0.01 * int(k) / 5 + 0.01 * rng.normal(size=folds)).tolist()
                )
                for name in COLUMNS
            }
            for k in ("1", "3", "5", "10")
        }
        for row, level in levels.items()
    }
    return Report(
        data="phantom data (generated with seed 0, no patients): 216 tiles of 18 patients",
        phantom=True,
        grouped_by="patient",
        classes=["invasion_front", NASTY],
        warnings=["12 tiles: no resolution in the file", NASTY],
        paired=False,
        seed=0,
        episodes=1000,
        rows=ROWS,
        over_folds=table,
        config={"data": {"image_size": 224, "channels": None}, "training": {"k_shot": 5}},
        verdict="CT against no CT: +0.8 points ± 1.2: no difference shown",
        effect=[
            {
                "title": "with CT less without",
                "mean": 0.008,
                "ci95": 0.012,
                "verdict": verdict(0.008, 0.012),
            },
            {
                "title": "right patient's CT less wrong",
                "mean": -0.03,
                "ci95": 0.01,
                "verdict": verdict(-0.03, 0.01),
            },
        ],
        calibration={
            "10": {"temperature": 3.1, "ece_before": 0.06, "ece_after": 0.019},
            "5": {"temperature": 2.9, "ece_before": 0.09, "ece_after": 0.021},
        },
        groups={
            "with_ct": {"5": {"mean": 0.94, "low": 0.881, "high": 0.975, "groups": 18}},
        },
        facts={"device": "cpu, 2 threads"},
    )


class Page(HTMLParser):
    """What a browser would see: tags, attributes, text, and a check that tables are square."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
            self.inside = True
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.inside = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.inside and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    report = invented()
    rows = {
        title: {int(k): cells["accuracy"] for k, cells in report["over_folds"][row].items()}
        for row, title in ROWS.items()
    }
    plot_accuracy_by_k(tmp_path / "k.png", "Accuracy by K", rows, chance=0.5)
    plot_confusion(
        tmp_path / "c.png", "Test tiles", np.array([[90, 10], [20, 80]]), report["classes"]
    )
    return {"Accuracy by K, all rows": tmp_path / "k.png", NASTY: tmp_path / "c.png"}


def test_the_report_is_one_file_that_asks_for_nothing(
    pictures: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "out" / "report.html"
    write_report(path, invented(), pictures)
    text = path.read_text("utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "base", "form"}
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"https?://|//\w+\.", text)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2
    assert all(str(image["src"]).startswith("data:image/png;base64,iVBOR") for image in images)
    assert [image["alt"] for image in images] == list(pictures)
    policy = next(a for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not any(name.startswith("on") for _, a in page.tags for name in a)


def test_it_says_twice_what_it_is_not_for(pictures: dict[str, Path]) -> None:
    text = Page(render(invented(), pictures)).text
    assert NOTICE.startswith("Research use only: not a medical device.")
    assert text.count(NOTICE) == 2


def test_whatever_a_user_named_stays_text(pictures: dict[str, Path]) -> None:
    report = invented()
    report["data"] = report["grouped_by"] = report["verdict"] = NASTY
    report["rows"] = dict.fromkeys(ROWS, NASTY)
    report["facts"] = {NASTY: NASTY}
    report["config"] = {NASTY: {NASTY: NASTY}}
    report["effect"] = [{"title": NASTY, "mean": 0, "ci95": 0, "verdict": NASTY}]
    raw = render(report, pictures)
    page = Page(raw)
    assert "<script" not in raw
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("alert('x')") > 15


def test_every_row_and_metric_has_its_cell(pictures: dict[str, Path]) -> None:
    page = Page(render(invented(), pictures))
    tables = page.tables[:4]
    for table in tables:
        assert {len(line) for line in table} == {len(table[0])}
        assert [line[0] for line in table[1:]] == list(ROWS.values())
    five = tables[2]
    titles = list(COLUMNS.values())
    assert five[0][1:] == [titles[0], "accuracy, 95 % over patients", *titles[1:]]
    spread = invented()["over_folds"]["with_ct"]["5"]["accuracy"]
    assert five[1][1] == f"{spread['mean']:.3f} ± {spread['ci95']:.3f}"
    assert five[1][2] == "0.881 to 0.975 (18)"
    assert five[2][2] == "–"
    assert "2-way 5-shot, 1000 episodes a fold: mean over 3 folds ± 95 % t-interval" in page.text
    assert [line.split(",")[0] for line in re.findall(r"2-way \d+-shot", page.text)] == [
        f"2-way {k}-shot" for k in (1, 3, 5, 10)
    ]


def test_two_folds_show_their_spread_and_mark_their_interval() -> None:
    report = invented(folds=2)
    page = Page(render(report, {}))
    spread = report["over_folds"]["with_ct"]["1"]["accuracy"]
    cell = f"{spread['mean']:.3f} ± {spread['std']:.3f} (± {spread['ci95']:.2f})"
    assert page.tables[0][1][1] == cell
    assert "± sd; the 95 % interval of two folds, 9 sd to either side, is in brackets" in page.text


def test_one_fold_claims_no_interval() -> None:
    page = Page(render(invented(folds=1), {}))
    assert "(one fold: no interval)" in page.text
    assert "±" not in page.tables[0][1][1]


def test_the_controls_stand_with_their_verdict() -> None:
    page = Page(render(invented(), {}))
    controls = page.tables[4]
    assert controls[1] == ["with CT less without", "+0.8 ± 1.2", "no difference shown"]
    assert controls[2] == ["right patient's CT less wrong", "-3.0 ± 1.0", "a loss"]
    assert "CT against no CT: +0.8 points ± 1.2: no difference shown" in page.text


def test_calibration_is_in_order_of_k() -> None:
    table = Page(render(invented(), {})).tables[5]
    assert table[1:] == [["K = 5", "2.90", "0.090", "0.021"], ["K = 10", "3.10", "0.060", "0.019"]]


@pytest.mark.parametrize("phantom", [True, False])
def test_phantom_data_are_named_for_what_they_are(phantom: bool) -> None:
    report = invented()
    report["phantom"] = phantom
    said = "Phantom data: these figures say that the pipeline learns, and nothing of patients."
    assert (said in Page(render(report, {})).text) == phantom


def test_what_a_run_did_not_measure_is_left_out() -> None:
    report = copy.deepcopy(invented())
    for key in ("verdict", "effect", "calibration", "groups", "facts"):
        del report[key]  # type: ignore[misc]
    report["warnings"] = []
    report["over_folds"] = {"with_ct": {"5": {"accuracy": over_folds([0.9, 0.8, 0.7])}}}
    page = Page(render(report, {}))
    for title in ("Does the CT help?", "Calibration", "Pictures", "Warnings"):
        assert title not in page.text
    assert page.tables == [[["", "accuracy"], ["with CT", "0.800 ± 0.248"]]]


def test_the_recipe_is_listed_flat() -> None:
    text = Page(render(invented(), {})).text
    assert "3 keys" in text
    assert "data.image_size = 224\ndata.channels = None\ntraining.k_shot = 5" in text


def test_a_report_read_back_from_json_looks_the_same(pictures: dict[str, Path]) -> None:
    report = invented()
    assert render(json.loads(json.dumps(report)), pictures) == render(report, pictures)
