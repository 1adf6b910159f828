"""Foundation encoders as a bundle ships them: a graph and a card each."""

from __future__ import annotations

from cdt_runtime.backends import Precision, open_session
from cdt_runtime.bundle import Bundle
from cdt_runtime.cache import TokenCache
from cdt_runtime.encoder_card import EncoderCard
from cdt_runtime.encoders import Encode, Encoders, Float
from cdt_runtime.errors import BundleError


def bundle_cards(bundle: Bundle) -> tuple[EncoderCard, ...]:
    """Return the cards of the encoders that a bundle's model listens to, in their order."""
    return tuple(EncoderCard.from_dict(one) for one in bundle.manifest.get("encoders", ()))


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
        session = open_session(backend, bundle.read(f"{card.graph}.onnx"), precision)

        def encode(images: Float) -> tuple[Float, Float | None]:
            found = session.run({"images": images})
            if "embedding" not in found:
                raise BundleError(f"{bundle.path.name}/{card.graph}.onnx: gives no embedding")
            return found["embedding"], found.get("tokens")

        return encode

    held = [
        card for card in bundle_cards(bundle) if f"{card.graph}.onnx" in bundle.manifest["files"]
    ]
    return Encoders(held, opened, cache)
