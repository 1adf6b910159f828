"""The recipe: every number of a training run that a user may want to change.

Defaults live here. A YAML file names only what differs, and `key=value` on the command line names
what differs from the file. `configs/default.yaml` writes the defaults out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cdt_runtime.errors import RecipeError

Width = Annotated[int, Field(ge=8, multiple_of=8)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataRecipe(_Section):
    """What the model takes in."""

    layout: str = Field("hospital", description="key of cdt_train.data.DATASETS")
    channels: tuple[str, ...] | None = Field(
        None, description="tile channels; null: R, G, B for RGB tiles, else the default markers"
    )
    channel_dropout: float = Field(
        0.1, ge=0, lt=1, description="chance that training hides a marker; RGB tiles: never"
    )
    ct_depth: int = Field(16, ge=8, multiple_of=8)
    slice_size: int = Field(128, ge=64, multiple_of=32)
    image_size: int = Field(224, ge=32, multiple_of=32)
    hu_windows: tuple[tuple[float, float], ...] = ((-1000.0, 1000.0),)

    @field_validator("hu_windows")
    @classmethod
    def _low_before_high(
        cls, windows: tuple[tuple[float, float], ...]
    ) -> tuple[tuple[float, float], ...]:
        if not windows or any(not low < high for low, high in windows):
            raise ValueError("each window is [low, high] in HU with low below high")
        return windows


class ModelRecipe(_Section):
    """The shape of the model."""

    feature_dim: int = Field(512, ge=8, description="width of tokens and of the embedding")
    attention_num_heads: int = Field(8, ge=1)
    path_widths: tuple[Width, Width, Width, Width] = (16, 32, 64, 128)
    ct_widths: tuple[Width, Width, Width, Width] = (16, 32, 64, 128)
    bank_size: int = Field(16, ge=2, multiple_of=2, description="tokens of the context bank")
    ct_encoder: str | None = Field(
        None,
        description="weights of the CT encoder, as phase 1 writes them; null: phase 1 trains them",
    )
    path_encoder: str = Field(
        "conv2d", description="the tile encoder: conv2d, or a foundation encoder of tiles"
    )
    lora_rank: int = Field(
        0, ge=0, description="of the changes to a foundation encoder as path_encoder; 0: frozen"
    )
    use_haidef: bool = Field(
        False, description="adds medsiglip, medgemma and path-foundation to model.encoders"
    )
    encoders: tuple[str, ...] = Field(
        (), description="foundation encoders whose features the bridge sees; cdt-train encoders"
    )
    encoder_weights: dict[str, str] = Field(
        {}, description="path of an encoder's weights by its key, or tiny-random; else looked for"
    )
    allow_download: bool = Field(False, description="fetch weights that are not on this machine")


class TrainingRecipe(_Section):
    """How it is trained and evaluated."""

    seed: int = Field(0, ge=0, lt=4294)
    num_folds: int = Field(3, ge=2, description="folds by patient, or by group")
    folds: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, min_length=1, description="train these folds alone; null: all"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="auto: bf16 on a GPU or CPU that knows it, else fp32; 3D on a CPU is fp32",
    )
    accumulate: int = Field(1, ge=1, description="batches before the weights move")
    # Phase 1: self-supervised pretraining on CT.
    ssl_epochs: int = Field(6, ge=0)
    ssl_steps: int = Field(8, ge=1, description="batches an epoch")
    ssl_batch_size: int = Field(16, ge=2, description="places a batch, two views of each")
    ssl_learning_rate: float = Field(1e-3, gt=0)
    ssl_temperature: float = Field(0.2, gt=0)
    ssl_contrast_weight: float = Field(0.5, ge=0)
    ssl_position_weight: float = Field(1.0, ge=0)
    # Phases 2 and 3: what training sees of a tile.
    tile_size: Annotated[int, Field(ge=32, multiple_of=32)] | None = Field(
        None, description="side that training resizes tiles to; null: about 5/7 of data.image_size"
    )
    min_crop: float = Field(0.85, gt=0, le=1, description="least side of a random square, a share")
    stain_jitter: float = Field(
        0.3, ge=0, lt=1, description="change of a stain's optical density; RGB alone"
    )
    stain_mix: float = Field(
        0.05, ge=0, le=0.5, description="spread of how colours mix in optical density; RGB alone"
    )
    gray: float = Field(0.1, ge=0, le=1, description="chance of a tile without colours; RGB alone")
    blur: float = Field(0.0, ge=0, le=1, description="chance of a slight blur")
    # Phase 2: the tile encoder, first by views of tiles alone, then by classes too.
    view_epochs: int = Field(0, ge=0, description="of encoder_steps, before any class is told")
    view_size: Annotated[int, Field(ge=32, multiple_of=32)] | None = Field(
        None, description="side of the tiles then; null: tile_size"
    )
    view_batch_size: int = Field(48, ge=2, description="tiles a step then, two views of each")
    encoder_epochs: int = Field(4, ge=0)
    encoder_steps: int = Field(20, ge=1, description="batches an epoch")
    encoder_batch_size: int = Field(32, ge=4)
    encoder_learning_rate: float = Field(2e-3, gt=0)
    cutmix: float = Field(0.0, ge=0, le=1, description="chance of a batch of mixed tiles")
    supcon_weight: float = Field(0.5, ge=0, description="of the supervised contrastive loss")
    view_weight: float = Field(
        0.0, ge=0, description="of the contrast of two views of a tile beside classes"
    )
    # Phase 3: episodic training of the whole model.
    num_epochs: int = Field(3, ge=1)
    episodes_per_epoch: int = Field(15, ge=1)
    k_shot: int = Field(5, ge=1)
    n_way: int | None = Field(
        None, ge=2, description="classes of a training episode; null: all, as in evaluation"
    )
    n_query: int = Field(8, ge=1, description="query tiles a class in a training episode")
    learning_rate: float = Field(1e-3, gt=0)
    encoder_rate: float = Field(
        0.1, ge=0, le=1, description="of learning_rate, for the tile encoder in phase 3; 0: frozen"
    )
    proxy_weight: float = Field(0.5, ge=0, description="of classifying every tile by class proxies")
    agreement_weight: float = Field(
        1.0, ge=0, description="keeps the CT of another patient from changing an answer"
    )
    domain_method: Literal["adversarial", "coral", "mmd", "none"] = "adversarial"
    domain_weight: float = Field(0.3, ge=0, description="top of the gradient-reversal ramp")
    ct_share: float = Field(0.5, ge=0, le=1, description="share of the episodes with a CT")
    bank_share: float = Field(
        0.25, ge=0, le=1, description="share with the learnt context bank; the rest have none"
    )
    encoder_silence: float = Field(
        0.25, ge=0, lt=1, description="share of episodes in which a foundation encoder is masked"
    )
    off_axis: float = Field(
        0.33,
        gt=0,
        le=1,
        description="weight of directions in which training classes do not differ; 1: all alike",
    )
    # All phases.
    weight_decay: float = Field(5e-3, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    schedule: Literal["cosine", "plateau"] = Field(
        "cosine", description="of phases 2 and 3: plateau lowers the rate when the score stands"
    )
    ema_decay: float = Field(0.99, ge=0, lt=1, description="of the averaged weights; 0: none")
    patience: int | None = Field(
        None, ge=1, description="epochs without a better score before phases 2 and 3 stop"
    )
    keep_checkpoints: int = Field(3, ge=1)
    # Evaluation.
    fit: Literal["mean", "shrunk", "ridge"] = Field(
        "mean", description="how a support set becomes prototypes"
    )
    eval_shots: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 3, 5), description="K of the tables; k_shot is always among them"
    )
    val_share: float = Field(0.25, gt=0, lt=1, description="of a fold's training patients")
    val_episodes: int = Field(200, ge=2)
    test_episodes: int = Field(1000, ge=2)
    test_queries: int = Field(5, ge=1, description="query tiles a class in an evaluation episode")
    min_confidence: float = Field(0.6, ge=0, le=1, description="below it the answer is none")

    @property
    def shots(self) -> tuple[int, ...]:
        """Every K that is evaluated, ascending."""
        return tuple(sorted({*self.eval_shots, self.k_shot}))

    def training_size(self, image_size: int) -> int:
        """Side of the tiles that phases 2 and 3 see: smaller is half the work, and as good."""
        return self.tile_size or max(32, 32 * round(image_size * 5 / 7 / 32))


class Recipe(_Section):
    """A whole recipe."""

    data: DataRecipe = DataRecipe()
    model: ModelRecipe = ModelRecipe()
    training: TrainingRecipe = TrainingRecipe()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as a checkpoint keeps them."""
        return self.model_dump(mode="json")


def load_recipe(file: Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Build a recipe from the defaults, a YAML file and `key=value` pairs, in that order.

    Raises:
        RecipeError: the file can't be read, a key is unknown, or a value has a wrong type or range.
    """
    values = _read_yaml(file) if file else {}
    for pair in overrides:
        key, separator, text = pair.partition("=")
        if not separator:
            raise RecipeError(f"{pair!r}: expected key=value, such as training.num_epochs=20")
        _set(values, key.strip(), _parse(pair, text))
    return recipe_from(values)


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """Build a recipe from nested values.

    Raises:
        RecipeError: a key is unknown, or a value has a wrong type or range.
    """
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_explain(error)) from error
    width, heads = recipe.model.feature_dim, recipe.model.attention_num_heads
    if width % heads:
        raise RecipeError(
            f"model.feature_dim: {width} is not a multiple of model.attention_num_heads ({heads})"
        )
    if recipe.training.ct_share + recipe.training.bank_share > 1:
        raise RecipeError(
            f"training.ct_share + training.bank_share: {recipe.training.ct_share} + "
            f"{recipe.training.bank_share} is more than 1: lower one of them"
        )
    return recipe


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe {file}: can't be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = getattr(error, "problem_mark", None)
        line = f" at line {place.line + 1}" if place else ""
        raise RecipeError(f"recipe {file.name}: not valid YAML{line}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {file.name}: expected sections data:, model:, training:")
    return values


def _parse(pair: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{pair!r}: the value is not valid YAML") from error


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    node = values
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise RecipeError(f"{key}: {section} holds a value, not further keys")
    node[last] = value


def known_keys() -> list[str]:
    """Return every key of a recipe, dotted."""
    return [
        f"{section}.{key}"
        for section, field in Recipe.model_fields.items()
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    ]


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(key)}"
    found = first.get("input")
    return f"{key}: {found!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _nearest(key: str) -> str:
    keys = known_keys()
    by_name = {name.rpartition(".")[2]: name for name in keys}
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    near = near or [
        by_name[name] for name in difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1)
    ]
    return f", did you mean {near[0]}?" if near else f": the keys are {', '.join(keys)}"
