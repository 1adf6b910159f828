from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from toys import tiny_model

from cdt_train.models.bridge import Bridge
from cdt_train.models.domain import (
    DomainDiscriminator,
    coral,
    mmd,
    ramp,
    reverse_gradient,
)
from cdt_train.models.layers import Centre
from cdt_train.models.prototypical import PrototypicalHead, class_means
from cdt_train.models.transfer_model import TransferModel


def model(**changes: Any) -> TransferModel:
    options = {"feature_dim": 32, "num_heads": 4, "bank_size": 4}
    widths = {"path_widths": (8, 8, 16, 16), "ct_widths": (8, 8, 16, 16)}
    return tiny_model(**options, **widths, **changes).eval()


def tiles(count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 64, 64), generator=generator).to(torch.uint8)


CT = torch.rand(1, 1, 8, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def embed(whole: TransferModel, tile: torch.Tensor, ct: torch.Tensor | None) -> torch.Tensor:
    return whole.bridge(whole.path_encoder(tile), *whole.context(ct))


def test_tokens_and_embeddings_have_the_promised_shapes() -> None:
    whole = model()
    assert whole.path_encoder(tiles()).shape == (3, 2 * 4, 32)  # two scales
    assert whole.ct_encoder(CT).shape == (1, 2 * 1, 32)
    assert whole.path_encoder(tiles()[:, :, :32, :32]).shape == (3, 2 * 1, 32)
    embedded = embed(whole, tiles(), CT)
    assert embedded.shape == (3, 32)
    assert torch.allclose(embedded.norm(dim=1), torch.ones(3), atol=1e-5)


def test_a_closed_gate_gives_exactly_the_tile_alone() -> None:
    whole = model()
    assert whole.bridge.gate.item() == 0  # as it starts
    assert torch.equal(embed(whole, tiles(), CT), embed(whole, tiles(), None))


def test_without_ct_an_open_gate_changes_no_bit() -> None:
    whole = model()
    alone = embed(whole, tiles(), None)
    with torch.no_grad():
        whole.bridge.gate.fill_(3.0)
    assert torch.equal(embed(whole, tiles(), None), alone)
    assert not torch.allclose(embed(whole, tiles(), CT), alone)


def test_an_open_gate_looks_at_this_ct() -> None:
    whole = model()
    with torch.no_grad():
        whole.bridge.gate.fill_(1.0)
    assert not torch.allclose(embed(whole, tiles(), CT), embed(whole, tiles(), -CT))


def test_the_gate_and_the_ct_encoder_learn() -> None:
    whole = model().train()
    with torch.no_grad():
        whole.bridge.gate.fill_(0.1)
    embed(whole, tiles(), CT)[:, 0].sum().backward()
    assert whole.bridge.gate.grad is not None
    assert whole.bridge.gate.grad.abs() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in whole.ct_encoder.parameters())


def test_a_tile_can_look_away_from_the_ct() -> None:
    bridge = Bridge(32, 4, 2).eval()
    with torch.no_grad():
        bridge.query.weight.fill_(0.0)
        bridge.query.bias.fill_(1.0)
        bridge.null_key.fill_(1000.0)
    tile_tokens, ct_tokens = torch.randn(2, 4, 32), torch.randn(1, 6, 32)
    weights = bridge.attention(tile_tokens, ct_tokens)
    assert weights.shape == (2, 4, 4, 7)
    assert torch.equal(weights[..., -1], torch.ones(2, 4, 4))
    drawn = bridge.residual(tile_tokens, ct_tokens, torch.ones(1))
    assert torch.allclose(drawn, bridge.output.bias.expand(2, 32))  # nothing of the CT


def test_alignment_reaches_neither_encoder() -> None:
    whole = model().train()
    tokens = whole.path_encoder(tiles())
    loss, accuracy = whole.discriminator(
        *whole.bridge.projected(tokens, whole.ct_encoder(CT)), strength=0.3
    )
    loss.backward()
    assert accuracy == 0.5  # undecided at the start
    assert all(p.grad is None for p in whole.path_encoder.parameters())
    assert whole.bridge.query.weight.grad is not None
    assert all(p.grad is None for p in whole.ct_encoder.parameters())
    assert whole.bridge.key.weight.grad is not None


def test_reversed_gradients_are_negative_and_scaled() -> None:
    features = torch.ones(3, requires_grad=True)
    (reverse_gradient(features, 0.5) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert features.grad is not None
    assert features.grad.tolist() == [-0.5, -1.0, -1.5]


def test_the_ramp_starts_at_zero_and_ends_near_its_top() -> None:
    assert ramp(0.0, 0.3) == 0
    assert ramp(1.0, 0.3) == pytest.approx(0.3, rel=1e-3)
    assert DomainDiscriminator(8)(torch.ones(5, 2, 8), torch.ones(1, 3, 8), 0.0)[1] == 0.5


def test_the_head_gives_distances_and_scaled_negative_squares() -> None:
    embedding = torch.tensor([[1.0, 0.0]])
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    logits, distances = PrototypicalHead()(embedding, prototypes, torch.tensor([3.0]))
    assert torch.allclose(distances, torch.tensor([[0.0, 2**0.5, 2.0]]))
    assert torch.allclose(logits, torch.tensor([[0.0, -6.0, -12.0]]))


def test_class_means_match_the_runtime() -> None:
    from cdt_runtime.prototypes import class_means as in_numpy

    embeddings = torch.nn.functional.normalize(torch.randn(6, 8), dim=1)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    ours, theirs = (
        class_means(embeddings, labels, 2),
        in_numpy(embeddings.numpy(), labels.numpy(), 2),
    )
    assert torch.allclose(ours, torch.from_numpy(theirs), atol=1e-6)


def test_weights_hang_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = model(seed=1).state_dict()
    second = model(seed=1).state_dict()
    other = model(seed=2).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["bridge.query.weight"], other["bridge.query.weight"])


def test_tiles_are_standardised_by_their_training_statistics() -> None:
    whole = model()
    whole.path_encoder.standardise_by(tiles(8))
    unit = tiles(8).float() / 255
    standard = (unit - whole.path_encoder.mean) / whole.path_encoder.std
    assert standard.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (standard.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3


def test_each_tile_may_have_a_ct_of_its_own_or_none() -> None:
    whole = model()
    with torch.no_grad():
        whole.bridge.gate.fill_(1.0)
    tokens = whole.path_encoder(tiles())
    first, second = whole.context(CT)[0], whole.context(-CT)[0]
    contexts = torch.cat([first, second, torch.zeros_like(first)])
    mixed = whole.bridge(tokens, contexts, torch.tensor([1.0, 1.0, 0.0]))
    for row, ct in enumerate((CT, -CT, None)):
        alone = whole.bridge(tokens[row : row + 1], *whole.context(ct))
        assert torch.allclose(mixed[row], alone[0], atol=1e-6)


def test_foundation_tokens_join_the_context_and_silent_ones_change_nothing() -> None:
    whole = model(tile_features={"eye": (2, 6), "ear": (1, 4)}, ct_features={"lung": (3, 5)})
    with torch.no_grad():
        whole.bridge.gate.fill_(1.0)
    generator = torch.Generator().manual_seed(2)
    eye, ear = (torch.randn(3, *shape, generator=generator) for shape in ((2, 6), (1, 4)))
    lung = torch.randn(1, 3, 5, generator=generator)
    silent = whole.tile_tokens(tiles(), {})
    heard = whole.tile_tokens(tiles(), {"eye": eye, "ear": ear})
    assert heard.shape == (3, 2 * 4 + 3, 32)
    assert torch.equal(whole.bridge.of_tile(heard), whole.path_encoder(tiles()))
    alone, nothing = whole.context(None), torch.zeros(1, 2 + 3, 32)

    def embedded(tokens: torch.Tensor, context: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return whole.bridge(tokens, *context)

    plain = model()
    plain.load_state_dict(whole.state_dict(), strict=False)
    only = plain.bridge(plain.path_encoder(tiles()), *plain.context(None))
    assert torch.equal(embedded(silent, alone), only)  # bit for bit the tile alone
    assert not torch.allclose(embedded(heard, alone), only, atol=1e-4)
    with_ct = embedded(silent, whole.context(CT))
    assert torch.allclose(
        with_ct, plain.bridge(plain.path_encoder(tiles()), *plain.context(CT)), atol=1e-6
    )
    assert not torch.allclose(
        with_ct, embedded(silent, whole.context(CT, {"lung": lung})), atol=1e-4
    )
    one = whole.tile_tokens(tiles(), {"eye": eye})
    assert not one[:, -1].any()  # the ear said nothing
    for other in (embedded(heard, alone), embedded(silent, alone)):
        assert not torch.allclose(embedded(one, alone), other, atol=1e-4)
    absent = embedded(heard, (nothing, torch.zeros(1)))
    assert torch.equal(absent, embedded(heard, alone))


def test_attention_tells_the_scales_of_the_ct_apart() -> None:
    whole = model()
    tokens, (ct, _) = whole.path_encoder(tiles()), whole.context(CT)
    alike = ct[:, :1].expand(-1, 2, -1)
    weights = whole.bridge.attention(tokens, alike)
    assert not torch.allclose(weights[..., 0], weights[..., 1])
    with torch.no_grad():
        whole.bridge.ct_scale.zero_()
    weights = whole.bridge.attention(tokens, alike)
    assert torch.allclose(weights[..., 0], weights[..., 1])


@pytest.mark.parametrize("distance", [coral, mmd])
def test_alignment_distances_are_zero_for_one_domain_and_grow_with_the_gap(
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    generator = torch.Generator().manual_seed(0)
    side = torch.randn(2, 40, 8, generator=generator)
    assert distance(side, side).abs() < 1e-6
    near, far = distance(side, side * 1.2 + 0.1), distance(side, side * 2 + 1)
    assert 0 < near < far


def test_the_settled_embedding_favours_what_parts_the_classes() -> None:
    centre = Centre(3, 1).eval()
    labels = torch.tensor([0, 0, 1, 1])
    vectors = torch.tensor([[1.0, 3, 5], [1, -3, 5], [-1, 3, 5], [-1, -3, 5]])
    centre.settle(vectors, labels, 0.25)
    assert centre.mean.tolist() == [0, 0, 5]
    expected = torch.tensor([[1.0, 0.75, 0], [1, -0.75, 0], [-1, 0.75, 0], [-1, -0.75, 0]])
    assert torch.allclose(centre(vectors), expected, atol=1e-6)
    centre.settle(vectors, labels, 1.0)
    assert torch.allclose(centre(vectors), vectors - centre.mean, atol=1e-6)


def test_the_settled_residual_has_no_common_part() -> None:
    whole = model()
    tokens = whole.path_encoder(tiles())
    contexts = torch.cat([whole.context(CT)[0], whole.context(-CT)[0]])
    before = torch.cat(
        [whole.bridge.residual(tokens, ct, torch.ones(1)) for ct in contexts.split(1)]
    )
    assert whole.bridge.offset(before).mean(dim=0).abs().max() > 1e-3
    whole.bridge.settle(tokens, contexts)
    assert whole.bridge.offset(before).mean(dim=0).abs().max() < 1e-6
