"""Who imports whom, and what the base distribution alone can do."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "cdt_runtime": ROOT / "runtime" / "cdt_runtime",
    "cdt_train": ROOT / "train" / "cdt_train",
    "cdt_export": ROOT / "export" / "cdt_export",
}
FORBIDDEN = {
    "cdt_runtime": {
        "cdt_train",
        "cdt_export",
        "torch",
        "transformers",
        "onnx",
        "onnxscript",
        "monai",
        "scipy",
        "sklearn",
        "matplotlib",
        "pydantic",
        "tifffile",
        "tqdm",
        "yaml",
    },
    "cdt_train": {"cdt_export", "onnx", "onnxscript"},
    "cdt_export": set(),
}
ALLOWED = {
    # The heat map's writer, and its absence said before the work: with the `wsi` extra alone.
    "runtime/cdt_runtime/infer_run.py": {"tifffile"},
    "runtime/cdt_runtime/slides/heatmap.py": {"tifffile"},
    # `cdt-train convert`, once: with the `tensorflow` extra alone.
    "train/cdt_train/encoders/saved_model.py": {"onnx"},
}
HEAVY = ("numpy", "torch", "onnxruntime", "onnx", "pydicom", "tifffile", "matplotlib", "pydantic")
MODULES = [
    pytest.param(name, path, id=str(path.relative_to(ROOT)))
    for name, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
]


def imports(path: Path) -> Iterator[str]:
    """Top-level names of every import, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize(("package", "path"), MODULES)
def test_no_import_points_the_wrong_way(package: str, path: Path) -> None:
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
    assert set(imports(path)) & FORBIDDEN[package] == allowed


def test_a_wrong_import_would_be_seen(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("def f():\n    from torch.nn import Linear\n    return Linear\n")
    assert list(imports(module)) == ["torch"]


def run_python(code: str, python: str = sys.executable) -> str:
    return subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT.parent
    ).stdout


@pytest.mark.parametrize(
    "module",
    ["cdt_runtime.cli", "cdt_runtime.doctor_cli", "cdt_train.cli", "cdt_export.cli"],
)
def test_a_command_imports_nothing_heavy_before_it_works(module: str) -> None:
    code = f"import sys, {module}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    assert run_python(code).strip() == "[]"


def test_the_public_face_is_pinned() -> None:
    import cdt_runtime

    assert cdt_runtime.__all__ == [
        "Bundle",
        "CdtError",
        "FewShotClassifier",
        "Prediction",
        "Preprocess",
        "Prototypes",
        "Tile",
        "Volume",
        "read_series",
        "read_tile",
    ]
    assert all(
        getattr(cdt_runtime, name).__name__ == name
        for name in (name for name in cdt_runtime.__all__ if name[0].isupper())
    )
    with pytest.raises(AttributeError, match="module 'cdt_runtime' has no attribute 'Nonsense'"):
        _ = cdt_runtime.Nonsense


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the base distribution and nothing else."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "-c",
            str(ROOT / "constraints.txt"),
            str(ROOT),
        ],
        check=True,
    )
    return python


@pytest.mark.slow
def test_the_base_distribution_infers_without_torch(
    bare_python: Path, bundle_dir: Path, phantom_dir: Path, tmp_path: Path
) -> None:
    installed = run_python(
        "import importlib.metadata as m; print(*(d.name for d in m.distributions()))",
        str(bare_python),
    )
    assert not {"torch", "onnx", "scipy", "matplotlib", "pydantic"} & set(installed.split())
    patient = phantom_dir / "new_patient"
    result = subprocess.run(
        [
            bare_python.parent / "cdt-infer",
            patient / "ct",
            patient / "tumor_stroma_1.tif",
            "--bundle",
            bundle_dir,
            "--json",
        ],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "CDT_CACHE": str(tmp_path)},
    )
    record = json.loads(result.stdout)
    assert record["tile"] == "tumor_stroma_1.tif"
    assert sum(record["probabilities"].values()) == pytest.approx(1)
    assert result.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize(("command", "extra"), [("cdt-train", "train"), ("cdt-export", "export")])
def test_a_missing_part_names_the_command_that_adds_it(
    bare_python: Path, command: str, extra: str, tmp_path: Path
) -> None:
    result = subprocess.run(
        [bare_python.parent / command], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"which is not installed: pip install 'cdt-edge[{extra}]'" in result.stderr
