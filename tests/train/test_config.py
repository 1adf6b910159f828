from __future__ import annotations

from pathlib import Path

import pytest

from cdt_runtime.errors import RecipeError
from cdt_train.config import Recipe, known_keys, load_recipe, recipe_from

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_loads_and_opens_with_its_command_cost_and_result(path: Path) -> None:
    load_recipe(path)
    head = path.read_text(encoding="utf-8").splitlines()[:3]
    assert [line.split()[1] for line in head] == ["cdt-train", "cost:", "gave:"]


def test_the_default_recipe_writes_every_default_out() -> None:
    path = next(path for path in CONFIGS if path.stem == "default")
    assert load_recipe(path) == Recipe()
    text = path.read_text(encoding="utf-8")
    assert [key for key in known_keys() if f"{key.rpartition('.')[2]}:" not in text] == []


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("training: {seed: 3, k_shot: 1}\n")
    recipe = load_recipe(file, ["training.k_shot=2", "data.hu_windows=[[0, 80]]"])
    assert (recipe.training.seed, recipe.training.k_shot) == (3, 2)
    assert recipe.data.hu_windows == ((0.0, 80.0),)
    assert recipe_from(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.kshot=5", r"training\.kshot: unknown key, did you mean training\.k_shot\?"),
        ("trainin.seed=5", r"trainin: unknown key"),
        ("model.feature_dims=5", r"did you mean model\.feature_dim\?"),
        ("data.zzz=5", r"data\.zzz: unknown key: the keys are data\.layout, data\.channels"),
        ("training.k_shot=five", r"training\.k_shot: 'five': input should be a valid integer"),
        ("training.k_shot=0", r"training\.k_shot: 0: input should be greater than or equal to 1"),
        ("data.image_size=225", r"data\.image_size: 225: input should be a multiple of 32"),
        (
            "data.slice_size=32",
            r"data\.slice_size: 32: input should be greater than",
        ),
        ("data.hu_windows=[[9, 9]]", r"data\.hu_windows: .*each window is \[low, high\] in HU"),
        (
            "model.ct_widths=[8,8,12,16]",
            r"model\.ct_widths\.2: 12: input should be a multiple",
        ),
        ("training.seed=5000000000", r"training\.seed: 5000000000: input should be less than"),
        ("training.test_episodes=1", r"training\.test_episodes: 1: input should be greater than"),
        ("training.device=gpu", r"training\.device: 'gpu': input should be 'auto', 'cpu' or"),
        ("model.attention_num_heads=7", r"model\.feature_dim: 512 is not a multiple of .* \(7\)"),
        ("k_shot", r"'k_shot': expected key=value, such as training\.num_epochs=20"),
        ("training.seed.deep=1", r"training\.seed: \{'deep': 1\}: input should be a valid integer"),
        ("training.seed=[", r"'training\.seed=\[': the value is not valid YAML"),
    ],
)
def test_a_wrong_key_or_value_is_one_line(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(None, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("training: [", r"recipe mine\.yaml: not valid YAML at line"),
        ("- 1\n", r"recipe mine\.yaml: expected sections data:, model:, training:"),
        ("training:\n  k_shots: 1\n", r"training\.k_shots: unknown key, did you mean training\.k_"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(file)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="can't be read \\(No such file or directory\\)"):
        load_recipe(tmp_path / "none.yaml")
