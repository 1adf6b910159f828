"""The notebook runs from its first cell to its last, and carries no outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "first_steps.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_it_goes_from_a_folder_of_tiles_to_a_card(
    bundle_dir: Path,
    phantom_dir: Path,
    tmp_path: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDT_BUNDLE", str(bundle_dir))
    monkeypatch.setenv("CDT_TILES", str(phantom_dir / "new_patient"))
    monkeypatch.setenv("CDT_CT", str(phantom_dir / "new_patient" / "ct"))
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    for cell in cells("code"):
        exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
    out = capsys.readouterr().out
    assert "left out, right:" in out
    assert (tmp_path / "card.html").read_text("utf-8").startswith("<!doctype html>")
    assert names["vectors"].shape[0] == len(names["paths"]) == 6
    import anndata

    assert anndata.read_h5ad("tiles.h5ad").shape == names["vectors"].shape


def test_it_carries_no_outputs() -> None:
    for cell in cells("code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
