from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

from cdt_runtime.errors import CheckpointError, TrainingError
from cdt_train.checkpoint import (
    content_sha256,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    sweep_partial,
)


def content(value: float = 1.0) -> dict[str, object]:
    return {"epoch": 1, "model_state_dict": {"weight": torch.full((2, 2), value)}}


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "deep" / "a.pt", content())
    found = load_checkpoint(tmp_path / "deep" / "a.pt", ("epoch", "model_state_dict"))
    assert found["epoch"] == 1
    assert torch.equal(found["model_state_dict"]["weight"], torch.ones(2, 2))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.pt"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", content(1.0))
    with pytest.raises(TrainingError, match=r"a\.pt: weight is not finite, nothing was saved"):
        save_checkpoint(tmp_path / "a.pt", content(float("nan")))
    found = load_checkpoint(tmp_path / "a.pt", ())
    assert found["model_state_dict"]["weight"][0, 0] == 1


def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "a.pt", content(1.0))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"can't be written \(No space left on device\)"):
        save_checkpoint(tmp_path / "a.pt", content(2.0))
    assert load_checkpoint(tmp_path / "a.pt", ())["model_state_dict"]["weight"][0, 0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_missing_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint: cdt-train writes it"):
        load_checkpoint(tmp_path / "none.pt", ())


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", content())
    whole = (tmp_path / "a.pt").read_bytes()
    for damaged in (b"", b"junk", whole[: len(whole) // 2]):
        (tmp_path / "a.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="not a readable checkpoint"):
            load_checkpoint(tmp_path / "a.pt", ())


def test_a_changed_weight_is_seen(tmp_path: Path) -> None:
    """The archive's own checksums are not looked at when tensors are read."""
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"model_state_dict": {"w": torch.arange(4.0)}, "rng": [1, (2.5, None)]})
    whole = path.read_bytes()
    at = whole.index(torch.arange(4.0).numpy().tobytes())
    for place in range(at, at + 16):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"a\.pt: its content does not fit its hash"):
            load_checkpoint(path, ())
    path.write_bytes(whole)
    assert load_checkpoint(path, ())["rng"] == [1, (2.5, None)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": 1.0}),
        ({"a": 1}, {"a": True}),
        ({"a": "1"}, {"a": 1}),
        ({"a": None}, {"a": "None"}),
        ({"a": [1, 2]}, {"a": [12]}),
        ({"a": ["ab", "c"]}, {"a": ["a", "bc"]}),
        ({"a": {}, "b": 1}, {"a": {"b": 1}}),
        ({1: 2}, {"1": 2}),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(1, 2)}),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.int32)}),
        ({"a": torch.zeros(())}, {"a": torch.ones(())}),
        ({"a": torch.zeros(2, dtype=torch.bfloat16)}, {"a": torch.ones(2, dtype=torch.bfloat16)}),
    ],
)
def test_what_differs_has_another_hash(one: dict[str, object], other: dict[str, object]) -> None:
    assert content_sha256(one) != content_sha256(other)


def test_the_order_of_keys_does_not_count() -> None:
    assert content_sha256({"a": 1, "b": 2}) == content_sha256({"b": 2, "a": 1})


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("made-by-a-checkpoint",))


def test_a_checkpoint_never_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"epoch": Malicious()}, buffer)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "a.pt", ())
    assert not (tmp_path / "made-by-a-checkpoint").exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", {"state": 1})
    with pytest.raises(CheckpointError, match="not a cdt-train checkpoint: lacks epoch, config"):
        load_checkpoint(tmp_path / "a.pt", ("epoch", "config"))


def test_weights_must_fit_one_to_one(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    good = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    load_weights(layer, good, tmp_path)
    for bad in (
        {"weight": good["weight"]},
        {**good, "more": torch.ones(1)},
        {**good, "bias": torch.ones(3)},
    ):
        with pytest.raises(CheckpointError, match="weights do not fit the model of this recipe"):
            load_weights(layer, bad, tmp_path)


def test_what_killed_runs_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".a.pt.123.partial").write_text("half")
    (tmp_path / "a.pt").write_text("whole")
    sweep_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
