from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import tiny_model

from cdt_train.contexts import Contexts
from cdt_train.data.arrays import CtArrays

TOKENS = torch.arange(3.0)[:, None, None].expand(3, 2, 4) + 1


def test_each_tile_meets_its_own_patients_ct() -> None:
    contexts = Contexts(TOKENS, [5, 7, -1])
    tokens, present = contexts.of_tiles(np.array([7, 5, 6]))
    assert present.tolist() == [1, 1, 0]
    assert tokens[:, 0, 0].tolist() == [2, 1, 0]
    assert contexts.paired
    assert not Contexts(TOKENS, [-1, -1, -1]).paired


def test_a_patient_with_two_series_is_met_with_the_first() -> None:
    tokens, _ = Contexts(TOKENS, [5, 5, 7]).of_tiles(np.array([5]))
    assert tokens[0, 0, 0] == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_wrong_patients_ct_is_never_ones_own(seed: int) -> None:
    contexts = Contexts(TOKENS, [5, 7, 9])
    groups = np.array([5, 7, 9, 5])
    wrong, present = contexts.of_others(groups, np.random.default_rng(seed))
    own, _ = contexts.of_tiles(groups)
    assert present.tolist() == [1, 1, 1, 1]
    assert (wrong != own).all()
    assert torch.equal(wrong[0], wrong[3])  # one mix-up a patient, not one a tile


def test_volumes_are_encoded_once_and_no_ct_is_allowed() -> None:
    model = tiny_model(feature_dim=32)
    fine = tuple(torch.zeros(40, 40, 40, dtype=torch.int16) for _ in range(2))
    ct = CtArrays(torch.rand(2, 1, 8, 32, 32), ("b", "x"), ("1", "2"), fine)
    contexts = Contexts.encode(model, ct, ("a", "b"), torch.device("cpu"))
    assert contexts.of(torch.arange(2)).shape == (2, 2, 32)
    assert torch.allclose(contexts.one(1)[0], model.ct_encoder(ct.volumes[1:]))
    assert contexts.of_tiles(np.array([0, 1]))[1].tolist() == [0, 1]
    assert len(Contexts.encode(model, ct.take([]), ("a",), torch.device("cpu"))) == 0


def test_what_encoders_say_of_a_ct_follows_its_tokens_and_can_be_learnt_from() -> None:
    model = tiny_model(feature_dim=32, ct_features={"eye": (3, 5)})
    said = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    fine = tuple(torch.zeros(40, 40, 40, dtype=torch.int16) for _ in range(2))
    volumes = torch.rand(2, 1, 8, 32, 32, generator=torch.Generator().manual_seed(1))
    ct = CtArrays(volumes, ("b", "x"), ("1", "2"), fine, {"eye": said})
    contexts = Contexts.encode(model, ct, ("a", "b"), torch.device("cpu"))
    tokens, present = contexts.of_tiles(np.array([1, 0]))
    assert tokens.shape == (2, 2 + 3, 32)
    assert present.tolist() == [1, 0]
    assert not tokens[1].any()
    assert torch.allclose(tokens[0, 2:], model.ct_features(said[:1].flatten(1))[0])
    tokens.sum().backward()
    learnt = model.ct_features.project[0][1].weight.grad
    assert learnt is not None
    assert learnt.abs().sum() > 0
