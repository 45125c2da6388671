"""Settings: JSON and back, ranges, learning-rate schedules."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from typing import Any

import pytest

from fastvq.errors import ConfigError
from fastvq.modalities import ImageConfig
from fastvq.modalities.settings import Settings
from fastvq.models.priors import PRIORS
from fastvq.training.config import PRIOR_KINDS, PriorConfig

from .tiny import TINY


def test_settings_survive_json() -> None:
    assert ImageConfig.from_json(json.loads(json.dumps(TINY.to_json()))) == TINY
    older = TINY.to_json()
    del older["seed"]
    assert ImageConfig.from_json(older) == dataclasses.replace(TINY, seed=ImageConfig().seed)
    with pytest.raises(ConfigError, match="settings of another version of fastvq: sede"):
        ImageConfig.from_json(older | {"sede": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [("codebook_size", 0), ("dim", 0), ("steps", 0), ("batch_size", 0), ("learning_rate", 0.0), ("decay", 1.5),
     ("seed", -1), ("test_fraction", 1.0), ("bottleneck", "fsk"), ("image_size", 30), ("learning_rate", math.nan)],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        ImageConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kind", "oracle", "one of transformer, pixelcnn, lstm, depth, hierarchical, next-scale, got 'oracle'"),
        ("dim", 0, "at least 1, got 0"),
        ("depth", -2, "at least 1, got -2"),
        ("stage_dim", 0, "at least 1, got 0"),
        ("stage_depth", 0, "at least 1, got 0"),
        ("stage_depth", 2, "left out for a prior of kind transformer: it is for depth"),
        ("heads", 0, "at least 1, got 0"),
        ("dropout", 1.0, "at least 0 and below 1, got 1.0"),
        ("label_dropout", -0.1, "at least 0 and below 1, got -0.1"),
        ("steps", 0, "at least 1, got 0"),
        ("learning_rate", 0.0, "positive, got 0.0"),
        ("warmup_steps", -1, "at least 0, got -1"),
        ("weight_decay", -0.05, "at least 0, got -0.05"),
        ("learning_rate", math.inf, "finite, got inf"),
        ("weight_decay", 10**400, f"finite, got {10**400}"),
        ("depth", 10**9, "at most 1024, got 1000000000"),
        ("dim", 10**9, "at most 65536, got 1000000000"),
        ("steps", 10**30, f"at most {2**53}, got {10**30}"),
        ("seed", 2**63, f"between 0 and {2**63 - 1}, got {2**63}"),
    ],
)
def test_a_priors_setting_out_of_range_is_named(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be {re.escape(message)}$"):
        PriorConfig(**{name: value})


def fields_of(settings: type[Settings]) -> list[tuple[str, object]]:
    types = typing.get_type_hints(settings)
    return [(field.name, types[field.name]) for field in dataclasses.fields(settings)]


@pytest.mark.parametrize("settings", [ImageConfig, PriorConfig])
def test_every_number_has_a_range(settings: type[Settings]) -> None:
    # The images of a folder may have any size.
    given = {"data": "folder"} if settings is ImageConfig else {}
    for name, kind in fields_of(settings):
        if kind not in (str, bool):
            with pytest.raises(ConfigError, match=f"^{name} must be "):
                settings(**given, **{name: math.nan})
    assert PriorConfig(dropout=0, label_dropout=0, warmup_steps=0, weight_decay=0).dim is None


@pytest.mark.parametrize("settings", [ImageConfig, PriorConfig])
def test_every_number_is_finite_and_bounded(settings: type[Settings]) -> None:
    given = {"data": "folder"} if settings is ImageConfig else {}
    for name, kind in fields_of(settings):
        if kind not in (str, bool):
            for value in (10**400, *([math.inf] if kind is float else [])):
                with pytest.raises(ConfigError, match=f"^{name} must be "):
                    settings(**given, **{name: value})


def test_an_image_size_that_the_strides_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="image_size 30 is not a multiple"):
        ImageConfig(data="folder", image_size=30)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 32}, "image_size must be 8, since digits is 8x8 gray, got 32"),
        ({"grayscale": False}, "grayscale must be True"),
        ({"fit": "pad"}, "fit must be crop"),
        ({"image_width": 16}, "image_width must be 8"),
        ({"crop_from": 16}, "crop_from must be left out"),
    ],
)
def test_a_setting_that_follows_from_the_data_is_named_alone(settings: dict[str, Any], message: str) -> None:
    ImageConfig(data="digits", image_size=8, image_width=8, downsamples=1)
    with pytest.raises(ConfigError, match=f"^{message}"):
        ImageConfig(**{"data": "digits", "image_size": 8} | settings)


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    rates = [TINY.learning_rate_at(step) for step in range(TINY.steps + 1)]
    assert rates[0] == pytest.approx(TINY.learning_rate / 2)
    assert max(rates) < TINY.learning_rate
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_the_kinds_are_those_of_the_models() -> None:
    assert tuple(PRIORS) == PRIOR_KINDS


def test_a_setting_by_its_earlier_name_is_read():
    assert ImageConfig.from_json({"revival_threshold": 0.25}).dead_code_threshold == 0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate": 5}, "accumulate must divide batch_size 32, got 5"),
        ({"precision": "fp16"}, "precision must be one of float32, bf16, got 'fp16'"),
        ({"weight_average": 1.0}, "weight_average must be at least 0 and below 1, got 1.0"),
        ({"data": "photos", "image_width": 30}, "image_width 30 is not a multiple of"),
        ({"data": "photos", "crop_from": 20}, "crop_from must be at least image_size = 28, got 20"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ImageConfig(**settings)
