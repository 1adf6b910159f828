from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cdt_export.cli import export_command
from cdt_runtime.bundle import Bundle

Shell = Callable[..., tuple[int, str, str]]


def test_it_ends_with_the_parity_table_and_the_next_step(
    trained_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shell: Shell,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = shell(export_command, "--checkpoint", trained_dir / "best_model.pt", "--fp16")
    assert (code, err) == (0, "")
    for part in ("max difference", "tile_classifier", "without CT", "with CT", "flips", "ties"):
        assert part in out
    assert "bundle    engines/phantom-2shot-fp16 (fp16, " in out
    assert "next      cdt-infer CT_DIR TILE --bundle engines/phantom-2shot-fp16" in out
    assert Bundle.open(tmp_path / "engines" / "phantom-2shot-fp16").manifest["precision"] == "fp16"


def test_json_is_the_manifest(trained_dir: Path, tmp_path: Path, shell: Shell) -> None:
    output = tmp_path / "mine"
    checkpoint = trained_dir / "best_model.pt"
    code, out, _ = shell(export_command, "--checkpoint", checkpoint, "--output", output, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((output / "bundle.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "models/best_model.pt: no such checkpoint: cdt-train writes it, or give another"),
        (("--checkpoint", "junk.pt"), "junk.pt: not a readable checkpoint"),
        (("--fp8",), "No such option '--fp8'. Did you mean '--fp16'?"),
        (("--checkpoint", "{best}", "--data-dir", "gone"), "training data not found at gone: give"),
        (("--checkpoint", "{best}", "--output", "full"), "full: exists and is not a bundle: give"),
    ],
)
def test_what_a_newcomer_gets_wrong_is_one_line(
    trained_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shell: Shell,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk.pt").write_text("junk")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    best = trained_dir / "best_model.pt"
    code, out, err = shell(export_command, *(word.format(best=best) for word in arguments))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
