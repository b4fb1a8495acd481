"""What is written is what is read."""

import tomllib

from config_strategies import Recipe, runs
from hypothesis import given

from moekit.config.codec import to_dict, to_toml, update
from moekit.config.run import RunConfig


@given(runs)
def test_a_configuration_survives_a_dict(recipe: Recipe) -> None:
    config = recipe.make()
    assert update(RunConfig(), to_dict(config)) == config


@given(runs)
def test_a_configuration_survives_toml(recipe: Recipe) -> None:
    config = recipe.make()
    assert update(RunConfig(), tomllib.loads(to_toml(config))) == config


def test_the_default_run_survives_toml() -> None:
    assert update(RunConfig(), tomllib.loads(to_toml(RunConfig()))) == RunConfig()


def test_an_empty_update_changes_nothing() -> None:
    assert update(RunConfig(), {}) == RunConfig()
