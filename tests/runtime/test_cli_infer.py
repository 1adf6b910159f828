from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cdt_runtime.bundle import Bundle, write_bundle
from cdt_runtime.cli import infer_command
from cdt_runtime.prediction import CtChange, CtUsed, Prediction
from cdt_runtime.prototypes import FACTS
from cdt_runtime.report import as_text


class Infer:
    """Runs cdt-infer with a bundle, as a user would."""

    def __init__(self, shell: Callable[..., tuple[int, str, str]], bundle: Path) -> None:
        self._shell, self.bundle = shell, str(bundle)

    def __call__(self, *arguments: object, bundle: bool = True) -> tuple[int, str, str]:
        chosen = ["--bundle", self.bundle] if bundle else []
        return self._shell(infer_command, *arguments, *chosen)


@pytest.fixture
def infer(
    bundle_dir: Path,
    cache_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shell: Callable[..., tuple[int, str, str]],
) -> Infer:
    monkeypatch.chdir(tmp_path)
    return Infer(shell, bundle_dir)


@pytest.fixture
def ct(phantom_dir: Path) -> Path:
    return phantom_dir / "new_patient" / "ct"


@pytest.fixture
def tile(phantom_dir: Path) -> Path:
    return phantom_dir / "new_patient" / "tumor_stroma_1.tif"


def test_the_answer_names_everything_it_rests_on(infer: Infer, ct: Path, tile: Path) -> None:
    code, out, err = infer(ct, tile)
    assert (code, err) == (0, "")
    assert out.startswith("tumor_stroma_1.tif: ")
    for part in (
        "invasion_front",
        "probability",
        "distance",
        "CT        24 slices of 256 x 256",
        "bundle    tiny (fp32, ",
        "support tiles: 2 invasion_front, 2 tumor_stroma",
        "trained   on phantom data (generated with seed 1, no patients)",
        "Research use only: not a medical device.",
    ):
        assert part in out
    assert re.search(r"^engine    (openvino|onnxruntime) \d[\d.]* CPU", out, re.MULTILINE)
    assert "tokens from the cache" in infer(ct, tile)[1]


def test_json_has_one_object_a_line_with_the_promised_keys(
    infer: Infer, ct: Path, tile: Path
) -> None:
    code, out, err = infer(ct, tile, tile, "--json")
    assert (code, err) == (0, "")
    records = [json.loads(line) for line in out.splitlines()]
    assert len(records) == 2
    assert set(records[0]) == {
        "tile",
        "sha256",
        "label",
        "nearest",
        "probabilities",
        "distances",
        "abstained",
        "reason",
        "unlikeness",
        "tta",
        "coverage",
        "prediction_set",
        "ct",
        "ct_change",
        "channels",
        "warnings",
        "backend",
        "bundle",
        "training_data",
        "timings_ms",
    }
    assert records[0]["ct"]["cache_hit"] is False
    assert "phantom" in records[0]["training_data"]
    assert json.loads(infer(ct, tile, "--json")[1])["ct"]["cache_hit"] is True


OFF = "CT context is off: validation showed no gain from it (+0.1 ± 0.3 points)"


def with_ct_context(bundle_dir: Path, folder: Path, **changed: object) -> Path:
    """A copy of a bundle whose prototypes say otherwise."""
    bundle = Bundle.open(bundle_dir)
    files = {name: bundle.read(name) for name in bundle.manifest["files"]}
    gain = {"mean": 0.0012, "ci95": 0.0034, "low": -0.0022}
    facts = {**json.loads(files[FACTS]), "ct_gain": gain, **changed}
    files[FACTS] = json.dumps(facts).encode()
    return write_bundle(folder / "changed", files, bundle.manifest).path


def test_a_ct_that_brought_no_gain_is_shown_and_not_used(
    infer: Infer, ct: Path, tile: Path, tmp_path: Path
) -> None:
    infer.bundle = str(with_ct_context(Path(infer.bundle), tmp_path, ct_context=False))
    alone = json.loads(infer("--no-ct", tile, "--json")[1])
    record = json.loads(infer(ct, tile, "--json")[1])
    assert record["probabilities"] == alone["probabilities"]
    assert alone["ct_change"] is None
    assert set(record["ct_change"]) == {"label", "nearest", "shift"}
    assert record["ct"]["off"] == OFF
    _, out, _ = infer(ct, tile)
    assert "\n    with the CT (not used): " in out
    assert ", probability of " in out
    assert out.count(OFF) == 1
    assert out.index("CT        24 slices") < out.index(OFF) < out.index("bundle    changed")


def test_a_ct_that_brought_a_gain_decides(
    infer: Infer, ct: Path, tile: Path, tmp_path: Path
) -> None:
    infer.bundle = str(with_ct_context(Path(infer.bundle), tmp_path, ct_context=True))
    record = json.loads(infer(ct, tile, "--json")[1])
    assert (record["ct_change"], record["ct"]["off"]) == (None, None)
    assert record["ct"]["series"].startswith("24 slices")
    _, out, _ = infer(ct, tile)
    assert "not used" not in out
    assert "CT context" not in out


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("a", "with the CT (not used): the same, probability of b 0.350 (+0.250)"),
        ("b", "with the CT (not used): b, probability of b 0.350 (+0.250)"),
        (None, "with the CT (not used): can't tell, probability of b 0.350 (+0.250)"),
    ],
)
def test_the_change_is_said_in_a_line(label: str | None, words: str) -> None:
    prediction = Prediction(
        tile="t",
        sha256="",
        label="a",
        probabilities={"a": 0.9, "b": 0.1},
        distances={"a": 0.5, "b": 1.0},
        abstained=False,
        reason=None,
        ct=CtUsed("24 slices", True, off=OFF),
        ct_change=CtChange(label, "b", {"a": -0.25, "b": 0.25}),
        channels={},
        warnings=(),
        unlikeness=0.5,
    )
    assert words in [line.strip() for line in as_text(prediction).splitlines()]


def test_no_patient_data_of_the_headers_is_printed(infer: Infer, ct: Path, tile: Path) -> None:
    _, out, err = infer(ct, tile, "--json")
    assert "PHANTOM^" not in out + err
    assert "NEW_PATIENT" not in out + err


def test_without_ct_the_folder_may_be_left_out(infer: Infer, ct: Path, tile: Path) -> None:
    code, out, _ = infer("--no-ct", tile)
    assert code == 0
    assert "CT        none: the tile alone decides" in out
    with_folder = infer("--no-ct", ct, tile)
    assert with_folder[0] == 0
    assert with_folder[1].splitlines()[:3] == out.splitlines()[:3]


def test_without_bundle_the_newest_is_taken_and_named(
    infer: Infer, ct: Path, tile: Path, tmp_path: Path
) -> None:
    code, _, err = infer(ct, tile, bundle=False)
    assert code == 2
    assert err == (
        "error: no bundle in engines: make one with cdt-train and cdt-export, or give "
        "--bundle DIR\n"
    )
    shutil.copytree(infer.bundle, tmp_path / "engines" / "mine")
    code, out, err = infer(ct, tile, bundle=False)
    assert code == 0
    assert err == "bundle: engines/mine (the newest; --bundle chooses another)\n"
    assert "bundle    mine (fp32" in out


def test_a_bad_tile_does_not_cost_the_others_their_answer(
    infer: Infer, ct: Path, tile: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("not a tile")
    code, out, err = infer(ct, tile, "notes.txt", tile, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 2
    assert [record["tile"] for record in records] == [tile.name, "notes.txt", tile.name]
    assert set(records[1]) == {"tile", "error"}
    assert err.startswith("error: notes.txt: ")
    assert err.count("\n") == 1


def test_tiles_of_one_name_are_told_apart(infer: Infer, phantom_dir: Path, ct: Path) -> None:
    regions = [
        phantom_dir / "pathology_data" / patient / "region_001" / "tile.ome.tif"
        for patient in ("Patient_001", "Patient_002")
    ]
    records = [json.loads(line) for line in infer(ct, *regions, "--json")[1].splitlines()]
    assert [record["tile"] for record in records] == [
        "Patient_001/region_001/tile.ome.tif",
        "Patient_002/region_001/tile.ome.tif",
    ]
    assert records[0]["sha256"] != records[1]["sha256"]


def test_results_that_cannot_be_written_are_an_error(
    bundle_dir: Path, ct: Path, tile: Path, cache_dir: Path
) -> None:
    command = [Path(sys.executable).with_name("cdt-infer"), ct, tile, "--bundle", bundle_dir]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: results can't be written: no space left on the device\n"
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True
    )
    assert closed.returncode == 2
    assert closed.stderr == "error: standard output is closed: the results would be lost\n"


def write_rgb(path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no CT_DIR and TILE given: see cdt-infer --help"),
        (("{ct}",), "no TILE given: cdt-infer CT_DIR TILE [TILE ...]"),
        (("{tile}",), "tumor_stroma_1.tif: CT_DIR comes first and is a folder of DICOM slices, "),
        (("empty", "{tile}"), "no DICOM images in empty (0 files seen): give the folder that"),
        (("text", "{tile}"), "no DICOM images in text (1 file seen): give the folder that"),
        (("gone", "{tile}"), "gone: no such folder: give the folder that holds the CT series"),
        (("{ct}", "rgb.png"), "rgb.png"),
        (("{ct}", "none.tif"), "none.tif"),
        (("{ct}", "text/notes.txt"), "notes.txt"),
        (("{ct}", "{tile}", "--jsn"), "No such option '--jsn'. Did you mean '--json'?"),
        (("{ct}", "{tile}", "--backend", "tpu"), "backend 'tpu': expected one of auto, tensorrt"),
        (("{ct}", "{tile}", "--backend", "cuda"), "CUDA"),
        (("{ct}", "{tile}", "--backend", "tensorrt"), "pip install 'cdt-edge[tensorrt]', or use"),
        (("{ct}", "{tile}", "--mpp", "-1"), "Invalid value for '--mpp'"),
        (("{ct}", "{tile}", "--series", ""), "--series is empty: is a variable of your script uns"),
        (("", "{tile}"), "an empty path was given: is a variable of your script unset?"),
        (("{ct}", ""), "an empty path was given: is a variable of your script unset?"),
        (("x" * 5000, "{tile}"), "name too long"),
        (("{ct}", "{tile}", "--series", "1.2.3"), "does not hold the series asked for; it holds"),
    ],
)
def test_what_a_newcomer_gets_wrong_is_one_line(
    infer: Infer, ct: Path, tile: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("hello")
    write_rgb(tmp_path / "rgb.png")
    code, out, err = infer(*(word.format(ct=ct, tile=tile) for word in arguments))
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shutil.rmtree(path), "no such folder: give the folder that cdt-export wrote"),
        (lambda path: (path / "bundle.json").unlink(), "holds no bundle.json"),
        (
            lambda path: (path / "bridge.onnx").write_bytes(b"junk"),
            "bridge.onnx: altered since export",
        ),
    ],
)
def test_a_missing_or_wrong_bundle_is_one_line(
    infer: Infer, ct: Path, tile: Path, tmp_path: Path, damage: object, message: str
) -> None:
    copy = Path(shutil.copytree(infer.bundle, tmp_path / "copy"))
    damage(copy)  # type: ignore[operator]
    code, out, err = infer(ct, tile, "--bundle", copy, bundle=False)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_the_real_chest_series_and_a_real_multiplex_tile(
    infer: Infer, chest_series: Path, real_data: Path
) -> None:
    tile = real_data / "mif" / "ABCM22001_B09_MiniCrop.ome.tif"
    code, out, _ = infer(chest_series, tile, "--fill-missing", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["ct"]["series"] == "64 slices of 512 x 512, 0.70 x 0.70 x 2.50 mm"
    assert record["channels"] == {
        "DAPI": "DAPI",
        "PanCK": "CK-EPCAM",
        "CD3": None,
        "CD8": "CD8a",
        "FOXP3": "FOXP3",
        "PDL1": "PDL1",
    }


def test_the_real_jpeg_2000_series(infer: Infer, real_data: Path, tile: Path) -> None:
    code, out, _ = infer(real_data / "ct" / "totalseg" / "example_ct_dicom", tile, "--json")
    assert code == 0
    assert json.loads(out)["ct"]["series"] == "20 slices of 512 x 512, 0.98 x 0.98 x 2.00 mm"
