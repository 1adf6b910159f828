"""Ed25519 signatures of bundles: who made a bundle, where its hashes alone say that it is whole.

What is signed is the manifest, which holds the hash of every file. The signature lies beside it in
`bundle.sig`; keys are PEM files as OpenSSL writes them:

    openssl genpkey -algorithm ed25519 -out private.pem
    openssl pkey -in private.pem -pubout -out public.pem

Source: RFC 8032 (Ed25519).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdt_runtime.errors import BundleError, InputError, MissingDependencyError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SIGNATURE = "bundle.sig"
CONTEXT = b"cdt-edge bundle 1\n"
"""Goes before what is signed, so that no other signature of the same key can stand in for it."""

MAX_BYTES = 65536
"""Of a key or a signature."""

MAKE = "make one with openssl genpkey -algorithm ed25519"

Sign = Callable[[bytes], bytes]
"""From a manifest to the content of `bundle.sig`."""


def signer(path: Path) -> Sign:
    """Read a private key.

    Args:
        path: of a PEM file without a passphrase.

    Raises:
        InputError: it is no such file.
        MissingDependencyError: `cryptography` is not installed.
    """
    key = _load(path, private=True)

    def sign(manifest: bytes) -> bytes:
        facts = {
            "algorithm": "Ed25519",
            "public_key": key.public_key().public_bytes_raw().hex(),
            "signature": key.sign(CONTEXT + manifest).hex(),
        }
        return (json.dumps(facts, indent=1) + "\n").encode()

    return sign


def require_signature(name: str, manifest: bytes, signature: bytes | None, key: Path) -> None:
    """Make sure that a manifest was signed by the owner of a key.

    Args:
        name: of the bundle, for errors.
        manifest: its bytes.
        signature: content of `bundle.sig`; None where there is none.
        key: PEM file of the public key.

    Raises:
        BundleError: it was not.
        InputError: the key can't be used.
        MissingDependencyError: `cryptography` is not installed.
    """
    trusted = _load(key, private=False)
    if signature is None:
        raise BundleError(
            f"{name}: not signed, and --trust {key.name} asks for it: sign it with "
            "cdt-export --sign, or ask its maker for a signed one"
        )
    facts = _facts(name, signature)
    if facts["public_key"] != trusted.public_bytes_raw().hex():
        raise BundleError(
            f"{name}: signed by another key ({facts['public_key'][:16]}) than {key.name} "
            f"({trusted.public_bytes_raw().hex()[:16]}): ask its maker which is right"
        )
    if not _verifies(trusted, bytes.fromhex(facts["signature"]), manifest):
        raise BundleError(
            f"{name}: its signature does not fit its manifest: copy it again, or ask its maker"
        )


def _verifies(key: Ed25519PublicKey, signature: bytes, manifest: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, CONTEXT + manifest)
    except InvalidSignature:
        return False
    return True


def _facts(name: str, signature: bytes) -> dict[str, str]:
    try:
        facts = json.loads(signature)
        lengths = {name: len(bytes.fromhex(facts[name])) for name in ("public_key", "signature")}
        sound = lengths == {"public_key": 32, "signature": 64}
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise BundleError(f"{name}/{SIGNATURE}: is no signature: copy it again, or sign it anew")
    return {key: str(facts[key]) for key in ("public_key", "signature")}


def _load(path: Path, *, private: bool) -> Any:
    """Read a PEM file of an Ed25519 key."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "signatures need cryptography, which is not installed: pip install 'cdt-edge[sign]'"
        ) from error
    kind = "private" if private else "public"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES)
    except OSError as error:
        raise InputError(f"key {path}: can't be read ({error.strerror}): {MAKE}") from error
    wanted = ed25519.Ed25519PrivateKey if private else ed25519.Ed25519PublicKey
    try:
        key = (
            serialization.load_pem_private_key(data, password=None)
            if private
            else serialization.load_pem_public_key(data)
        )
    except TypeError as error:  # it has a passphrase
        raise InputError(
            f"key {path}: has a passphrase: give one without, such as "
            "openssl pkey -in KEY -out PLAIN makes"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"key {path}: is no {kind} key in PEM: {MAKE}") from error
    if not isinstance(key, wanted):
        raise InputError(f"key {path}: is no Ed25519 key: {MAKE}")
    return key
