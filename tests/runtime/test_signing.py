"""Who made a bundle: Ed25519 signatures of the manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from test_bundle import FACTS, FILES

from cdt_runtime.bundle import MANIFEST, Bundle, change_bundle, write_bundle
from cdt_runtime.cli import infer_command
from cdt_runtime.errors import BundleError, InputError
from cdt_runtime.signing import SIGNATURE, signer


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Write the private and the public key."""
    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "own")


@pytest.fixture
def path(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    return write_bundle(tmp_path / "small", FILES, FACTS, signer(keys[0])).path


def test_a_signed_bundle_is_trusted(path: Path, keys: tuple[Path, Path]) -> None:
    assert Bundle.open(path, keys[1]).signed
    assert Bundle.open(path).signed  # who trusts the folder need not check


def test_an_unsigned_bundle_is_refused(path: Path, keys: tuple[Path, Path]) -> None:
    (path / SIGNATURE).unlink()
    assert not Bundle.open(path).signed
    with pytest.raises(BundleError, match=r"small: not signed, and --trust own\.pub\.pem asks"):
        Bundle.open(path, keys[1])


def test_another_key_is_refused(path: Path, tmp_path: Path) -> None:
    _, other = write_keys(tmp_path, "other")
    with pytest.raises(
        BundleError, match=r"small: signed by another key \([0-9a-f]{16}\) than oth"
    ):
        Bundle.open(path, other)


def test_a_forged_name_in_the_signature_does_not_help(
    path: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, _ = write_keys(tmp_path, "other")
    forged = json.loads(signer(private)((path / MANIFEST).read_bytes()))
    own = json.loads((path / SIGNATURE).read_text())
    (path / SIGNATURE).write_text(json.dumps({**forged, "public_key": own["public_key"]}))
    with pytest.raises(BundleError, match="small: its signature does not fit its manifest"):
        Bundle.open(path, keys[1])


def test_another_manifest_is_refused(path: Path, keys: tuple[Path, Path]) -> None:
    """A bundle whose every hash is right, by someone else, beside the old signature."""
    signature = (path / SIGNATURE).read_bytes()
    write_bundle(path, {**FILES, "head.onnx": b"another graph"}, FACTS)
    (path / SIGNATURE).write_bytes(signature)
    Bundle.open(path)
    with pytest.raises(BundleError, match="its signature does not fit its manifest"):
        Bundle.open(path, keys[1])


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"public_key": "00"}', b"\xff" * 99])
def test_what_is_no_signature_is_said(path: Path, keys: tuple[Path, Path], content: bytes) -> None:
    (path / SIGNATURE).write_bytes(content)
    with pytest.raises(BundleError, match=r"small/bundle\.sig: is no signature: copy it again"):
        Bundle.open(path, keys[1])


def test_every_flip_of_the_signature_is_refused(path: Path, keys: tuple[Path, Path]) -> None:
    whole = (path / SIGNATURE).read_bytes()
    begin = whole.index(b'"signature"')
    for at in range(begin, len(whole) - 3):
        changed = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        (path / SIGNATURE).write_bytes(changed)
        with pytest.raises(BundleError):
            Bundle.open(path, keys[1])


def test_a_change_ends_the_signature_unless_signed_again(
    path: Path, keys: tuple[Path, Path]
) -> None:
    kept = {name: name for name in FILES}
    bundle = change_bundle(Bundle.open(path), {"new.json": b"{}"}, kept, {}, signer(keys[0]))
    assert Bundle.open(path, keys[1]).identity == bundle.identity
    change_bundle(bundle, {"newer.json": b"{}"}, kept, {})
    assert not Bundle.open(path).signed


def test_keys_that_are_none_are_named(tmp_path: Path, path: Path) -> None:
    gone = tmp_path / "gone.pem"
    with pytest.raises(InputError, match=r"gone\.pem: can't be read \(No such file"):
        signer(gone)
    text = tmp_path / "text.pem"
    text.write_text("no key")
    with pytest.raises(InputError, match=r"text\.pem: is no private key in PEM: make one with"):
        signer(text)
    with pytest.raises(InputError, match=r"text\.pem: is no public key in PEM: make one with"):
        Bundle.open(path, text)
    curve = tmp_path / "curve.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    curve.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(InputError, match=r"curve\.pem: is no Ed25519 key"):
        signer(curve)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")
        )
    )
    with pytest.raises(InputError, match=r"locked\.pem: has a passphrase: give one without"):
        signer(locked)


def test_the_command_refuses_what_is_not_signed(
    shell: Callable[..., tuple[int, str, str]],
    bundle_dir: Path,
    phantom_dir: Path,
    tmp_path: Path,
    keys: tuple[Path, Path],
) -> None:
    copy = Path(shutil.copytree(bundle_dir, tmp_path / "copy"))
    tile = phantom_dir / "new_patient" / "tumor_stroma_1.tif"
    asked = ("--no-ct", tile, "--backend", "onnxruntime", "--bundle", copy, "--trust", keys[1])
    code, out, err = shell(infer_command, *asked)
    assert (code, out) == (2, "")
    assert err.startswith("error: copy: not signed, and --trust own.pub.pem asks for it")
    (copy / SIGNATURE).write_bytes(signer(keys[0])((copy / MANIFEST).read_bytes()))
    code, out, err = shell(infer_command, *asked)
    assert (code, err) == (0, "")
