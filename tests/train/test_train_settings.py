"""Settings: what is refused, and with which words."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from zoo.errors import ZooError
from zoo.train.settings import FREE_TO_CHANGE, TrainSettings


def test_defaults_are_valid_and_frozen() -> None:
    settings = TrainSettings(data="digits")
    assert settings.evaluation_interval == 100
    assert settings.checkpoint_interval == 100
    with pytest.raises(ValidationError):
        settings.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ["'data' is missing", "name of the data set"]),
        ({"learning_rat": 1}, ["'learning_rat'", "did you mean 'learning_rate'?"]),
        ({"steps": 0}, ["steps", "greater than or equal to 1", "not 0"]),
        ({"steps": -1, "clip": 0}, ["steps", "clip"]),
        ({"learning_rate": float("nan")}, ["learning_rate"]),
        ({"learning_rate": "fast"}, ["learning_rate", "'fast'"]),
        ({"batch": 32, "accumulate": 5}, ["cannot be cut into 5", "accumulate=4 would do"]),
        ({"betas": (0.9, 1.0)}, ["betas", "below 1"]),
        ({"schedule": "wsd", "warmup_share": 0.6, "decay_share": 0.6}, ["more than the whole run"]),
        ({"schedule": "linear"}, ["schedule", "'cosine'", "'wsd'"]),
        ({"precision": "16", "device": "cpu"}, ["needs a GPU", "bf16"]),
        ({"device": "gpu"}, ["device", "'gpu'"]),
        ({"seed": -1}, ["seed"]),
    ],
)
def test_mistakes_are_explained(values: dict, words: list[str]) -> None:
    given = values if not values or "data" in values else {"data": "digits"} | values
    with pytest.raises(ZooError) as caught:
        TrainSettings.parse(given)
    for word in words:
        assert word in str(caught.value)


def test_factor_follows_the_schedule() -> None:
    cosine = TrainSettings(data="x", steps=100, warmup_share=0.1)
    assert cosine.factor(0) == 0.1
    assert cosine.factor(10) == 1.0
    constant = TrainSettings(data="x", steps=100, warmup_share=0, schedule="constant")
    assert {constant.factor(step) for step in range(101)} == {1.0}
    wsd = TrainSettings(data="x", steps=100, schedule="wsd", decay_share=0.5, decay_shape="linear", minimum_ratio=0)
    assert [wsd.factor(step) for step in (50, 75, 100)] == [1.0, 0.5, 0.0]


def test_settings_that_may_change_exist() -> None:
    assert set(TrainSettings.model_fields) >= FREE_TO_CHANGE


def test_nothing_heavy_is_imported_for_settings_and_data() -> None:
    code = (
        "import sys; import zoo.train.settings, zoo.train.schedule; from zoo.train.data import load_data;"
        "load_data('copy').train_batch(0); load_data('bytes:stdlib').describe();"
        "assert not {'torch', 'lightning', 'optuna', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
