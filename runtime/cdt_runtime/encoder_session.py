"""Foundation encoders as a bundle ships them: a graph and a card each."""

from __future__ import annotations

from cdt_runtime.backends import Precision, Session, open_session
from cdt_runtime.bundle import Bundle
from cdt_runtime.cache import TokenCache
from cdt_runtime.encoder_card import EncoderCard
from cdt_runtime.encoders import Encode, Encoders, Float
from cdt_runtime.errors import BundleError


def bundle_cards(bundle: Bundle) -> tuple[EncoderCard, ...]:
    """Return the cards of the encoders that a bundle's model listens to, in their order."""
    return tuple(EncoderCard.from_dict(one) for one in bundle.manifest.get("encoders", ()))


def encoder_marks(bundle: Bundle) -> tuple[str, ...]:
    """Say of each encoder what an answer must not hide: random weights, or that it is missing."""
    marks = []
    if own := bundle.manifest.get("path_encoder"):
        card = EncoderCard.from_dict(own)
        if card.origin != "weights":
            marks.append(f"tile encoder {card.key}: {card.origin}, it has learnt nothing")
    for card in bundle_cards(bundle):
        if f"{card.graph}.onnx" not in bundle.manifest["files"]:
            marks.append(f"encoder {card.key} is not in this bundle: masked")
        elif card.origin != "weights":
            marks.append(f"encoder {card.key}: {card.origin}, it has learnt nothing")
    return tuple(marks)


def session_encode(session: Session, key: str) -> Encode:
    """Let the session of an exported encoder encode images."""

    def encode(images: Float) -> tuple[Float, Float | None]:
        found = session.run({"images": images})
        if "embedding" not in found:
            raise BundleError(f"encoder {key}: its graph gives no embedding: export again")
        return found["embedding"], found.get("tokens")

    return encode


def bundle_encoders(
    bundle: Bundle, backend: str, precision: Precision, cache: TokenCache
) -> Encoders:
    """Make the encoders of a bundle ready; each graph is opened when it is first needed.

    An encoder whose graph the bundle does not hold says nothing: the bridge masks it.

    Args:
        bundle: an opened bundle.
        backend: key of `BACKENDS`.
        precision: as `open_session` takes it.
        cache: of the features.
    """

    def opened(card: EncoderCard) -> Encode:
        graph = bundle.read(f"{card.graph}.onnx")
        return session_encode(open_session(backend, graph, precision), card.key)

    held = [
        card for card in bundle_cards(bundle) if f"{card.graph}.onnx" in bundle.manifest["files"]
    ]
    return Encoders(held, opened, cache)
