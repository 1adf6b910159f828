from __future__ import annotations

import numpy as np
import pytest

from cdt_runtime.errors import DatasetError
from cdt_train.episodes import EpisodeSampler, group_folds, hold_out_groups

LABELS = np.tile([0, 1, 2], 40)
GROUPS = np.repeat(np.arange(10), 12)
NAMES = ("a", "b", "c")


def sampler(n_way: int | None = None, k_shot: int = 3, n_query: int = 4) -> EpisodeSampler:
    return EpisodeSampler(LABELS, GROUPS, NAMES, n_way=n_way, k_shot=k_shot, n_query=n_query)


def test_support_and_query_never_share_a_tile_or_a_group() -> None:
    draw, rng = sampler(), np.random.default_rng(0)
    for _ in range(300):
        episode = draw.sample(rng)
        assert set(episode.support) & set(episode.query) == set()
        assert set(GROUPS[episode.support]) & set(GROUPS[episode.query]) == set()


def test_an_episode_has_its_classes_in_equal_numbers_and_right_labels() -> None:
    episode = sampler(n_way=2).sample(np.random.default_rng(1))
    assert len(episode.support) == 2 * 3
    assert len(set(episode.support)) == 2 * 3
    for index, label in (
        (episode.support, episode.support_labels),
        (episode.query, episode.query_labels),
    ):
        assert np.array_equal(episode.classes[label], LABELS[index])
    assert np.bincount(episode.query_labels).tolist() == [4, 4]


def test_the_same_seed_gives_the_same_episodes() -> None:
    first, second = (sampler().sample(np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(first.support, second.support)
    assert np.array_equal(first.query, second.query)


def test_every_class_takes_part_over_many_episodes() -> None:
    draw, rng = sampler(n_way=2), np.random.default_rng(0)
    seen = {tuple(draw.sample(rng).classes) for _ in range(100)}
    assert seen == {(0, 1), (0, 2), (1, 2)}


def test_too_few_tiles_are_said() -> None:
    with pytest.raises(
        DatasetError, match=r"class 'a' has 40 tiles in a split; an episode takes k"
    ):
        sampler(k_shot=40)


def test_too_few_classes_are_said() -> None:
    with pytest.raises(DatasetError, match=r"4 classes are needed and one side of a split holds 3"):
        sampler(n_way=4)


def test_a_class_of_one_patient_is_said() -> None:
    labels, groups = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 0, 0, 1, 2])
    with pytest.raises(DatasetError, match="class 'a' comes from 1 patient or group in a split"):
        EpisodeSampler(labels, groups, NAMES, n_way=None, k_shot=1, n_query=1)


def test_groups_that_cannot_be_parted_are_said() -> None:
    labels, groups = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    draw = EpisodeSampler(labels, groups, NAMES, n_way=None, k_shot=1, n_query=1)
    assert len(draw.sample(np.random.default_rng(0)).query) == 2
    labels, groups = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 2])
    draw = EpisodeSampler(labels, groups, NAMES, n_way=None, k_shot=2, n_query=1)
    with pytest.raises(DatasetError, match="no 2-way 2-shot episode found whose support and query"):
        draw.sample(np.random.default_rng(0))


def test_folds_are_by_group_and_cover_every_tile_once() -> None:
    folds = group_folds(LABELS, GROUPS, 3, seed=0)
    assert sorted(np.concatenate(folds)) == list(range(len(LABELS)))
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(LABELS)), fold)
        assert set(GROUPS[fold]) & set(GROUPS[rest]) == set()
        assert set(LABELS[fold]) == {0, 1, 2}


def test_more_folds_than_groups_are_refused() -> None:
    with pytest.raises(DatasetError, match=r"10 patients \(or groups\) can't make 11 folds"):
        group_folds(LABELS, GROUPS, 11, seed=0)


def test_a_class_with_fewer_tiles_than_folds_is_refused() -> None:
    with pytest.raises(
        DatasetError, match=r"the rarest class has 1 tile\(s\), too few for 2 folds: add"
    ):
        group_folds(np.array([0, 1]), np.array([0, 1]), 2, seed=0)


def test_held_out_groups_are_apart_and_hold_every_class() -> None:
    rest, held = hold_out_groups(LABELS, GROUPS, 0.25, np.random.default_rng(0))
    assert set(GROUPS[rest]) & set(GROUPS[held]) == set()
    assert len(set(GROUPS[held])) == 2
    assert len(rest) + len(held) == len(LABELS)


@pytest.mark.parametrize(("classes", "patients"), [(2, 4), (3, 6), (5, 6), (9, 8)])
def test_patients_with_one_label_each_can_be_parted(classes: int, patients: int) -> None:
    labels = np.repeat(np.arange(classes), patients * 4)
    groups = np.repeat(np.arange(classes * patients), 4)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        for side in hold_out_groups(labels, groups, 0.25, rng):
            names = [str(c) for c in range(classes)]
            draw = EpisodeSampler(
                labels[side], groups[side], names, n_way=None, k_shot=3, n_query=2
            )
            for _ in range(20):
                episode = draw.sample(rng)
                sides = [groups[side][index] for index in (episode.support, episode.query)]
                assert set(sides[0]) & set(sides[1]) == set()


def test_too_few_groups_to_hold_out_are_said() -> None:
    few = GROUPS < 3
    with pytest.raises(DatasetError, match=r"outside the test fold a class comes from 3 patients"):
        hold_out_groups(LABELS[few], GROUPS[few], 0.25, np.random.default_rng(0))
