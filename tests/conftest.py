"""Fixtures shared by every test."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import click
import pytest

SHARED = Path(os.environ.get("CDT_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real files; tests that need it are skipped where it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"real data not found at {SHARED} (set CDT_SHARED_DATA)")
    return SHARED


def _unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def chest_series(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 contiguous axial slices of a real chest CT, 512 x 512, explicit VR little endian."""
    archive = real_data / "ct" / "lidc_idri_0001_64slices.tar.xz"
    return _unpacked(archive, tmp_path_factory.mktemp("chest")) / "lidc_idri_0001"


@pytest.fixture(scope="session")
def tilted_series(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head phantom scanned with a tilted gantry; its localizer and a summary page lie by."""
    archive = real_data / "dicom_odd" / "philips_phantom_tilt_mixed.tar.xz"
    return _unpacked(archive, tmp_path_factory.mktemp("tilt")) / "phantom_tilt_mixed"


@pytest.fixture
def shell(
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, str]]:
    """Run a command with arguments; returns its exit code, stdout and stderr."""
    from cdt_runtime.console import run

    def call(command: click.Command, *arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run(command, [str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for CT tokens."""
    monkeypatch.setenv("CDT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny_recipe() -> tuple[str, ...]:
    """A recipe that runs through everything in seconds and learns next to nothing."""
    return (
        "data.ct_depth=8",
        "data.slice_size=64",
        "data.image_size=64",
        "model.feature_dim=32",
        "model.attention_num_heads=4",
        "model.path_widths=[8,8,16,16]",
        "model.ct_widths=[8,8,16,16]",
        "training.num_folds=2",
        "training.precision=fp32",
        "training.ema_decay=0",
        "training.ssl_epochs=2",
        "training.ssl_steps=2",
        "training.ssl_batch_size=4",
        "training.view_epochs=1",
        "training.view_size=32",
        "training.encoder_epochs=2",
        "training.encoder_steps=8",
        "training.encoder_learning_rate=0.005",
        "training.encoder_batch_size=8",
        "training.num_epochs=2",
        "training.episodes_per_epoch=2",
        "training.k_shot=2",
        "training.eval_shots=[1,2]",
        "training.n_query=2",
        "training.val_episodes=20",
        "training.test_episodes=50",
        "training.min_confidence=0.5",
    )


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small phantom hospital: 8 patients with tiles, 3 with a CT, one new patient."""
    from cdt_train.data.phantom import write_phantom

    folder = tmp_path_factory.mktemp("phantom") / "data"
    write_phantom(folder, seed=1, n_patients=8, n_ct=3, regions_per_class=3)
    return folder


@pytest.fixture(scope="session")
def trained_dir(
    phantom_dir: Path, tiny_recipe: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output folder of a tiny training run."""
    from cdt_train.config import load_recipe
    from cdt_train.run import run_training

    folder = tmp_path_factory.mktemp("models") / "models"
    recipe = load_recipe(None, tiny_recipe)
    run_training(recipe, data_dir=phantom_dir, output_dir=folder, resume=False)
    return folder


@pytest.fixture(scope="session")
def bundle_dir(trained_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in float32, exported from the tiny run."""
    from cdt_export.build import export_bundle
    from cdt_train.trained import load_trained

    trained = load_trained(trained_dir / "best_model.pt")
    folder = tmp_path_factory.mktemp("engines") / "tiny"
    return export_bundle(trained, folder, precision="fp32", data_dir=None).path
