from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from cdt_runtime.cache import TokenCache, cache_dir

TOKENS = np.ones((1, 4, 8), dtype=np.float32)


def test_tokens_are_found_again(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path / "cache")
    assert cache.get("key", TOKENS.shape) is None
    cache.put("key", TOKENS)
    found = cache.get("key", TOKENS.shape)
    assert found is not None
    assert np.array_equal(found, TOKENS)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["key.tokens"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 junk", b"junk", bytes(32 + 4 * 32)])
def test_a_damaged_entry_is_a_miss(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key.tokens").write_bytes(content)
    assert TokenCache(tmp_path).get("key", TOKENS.shape) is None


def test_a_truncated_entry_is_a_miss(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path)
    cache.put("key", TOKENS)
    whole = (tmp_path / "key.tokens").read_bytes()
    (tmp_path / "key.tokens").write_bytes(whole[:-5])
    assert cache.get("key", TOKENS.shape) is None


def test_a_flip_of_any_bit_is_a_miss(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path)
    cache.put("key", TOKENS)
    whole = (tmp_path / "key.tokens").read_bytes()
    for position in range(len(whole)):
        flipped = whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :]
        (tmp_path / "key.tokens").write_bytes(flipped)
        assert cache.get("key", TOKENS.shape) is None


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".tokens-old").write_bytes(b"half")
    os.utime(tmp_path / ".tokens-old", (0, 0))
    (tmp_path / ".tokens-new").write_bytes(b"half")
    TokenCache(tmp_path).put("key", TOKENS)
    assert {path.name for path in tmp_path.iterdir()} == {"key.tokens", ".tokens-new"}


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("CDT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    cache = TokenCache(cache_dir())
    cache.put("key", TOKENS)
    assert cache.get("key", TOKENS.shape) is None


def test_an_entry_of_another_shape_or_not_finite_is_a_miss(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path)
    cache.put("shape", TOKENS)
    cache.put("nan", TOKENS * np.nan)
    assert cache.get("shape", (1, 4, 9)) is None
    assert cache.get("nan", TOKENS.shape) is None


def test_a_folder_that_cannot_be_made_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    TokenCache(tmp_path / "file" / "cache").put("key", TOKENS)


def test_the_folder_is_chosen_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CDT_CACHE", raising=False)
    assert cache_dir() == tmp_path / "cdt-edge"
    monkeypatch.setenv("CDT_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
