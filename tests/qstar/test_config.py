"""The configuration: what it refuses, and in which words."""

import dataclasses
import json

import pytest

from qstar import QuietStarConfig

REFUSED = [
    ("thought_length", -1, "at least 0"),
    ("thought_length", 2.0, "an integer"),
    ("thought_length", True, "an integer"),
    ("talk_length", 0, "at least 1"),
    ("talk_length", "4", "an integer"),
    ("num_thoughts", 0, "at least 1"),
    ("thinking_positions", "some", "one of all, random, uncertain"),
    ("thinking_fraction", 0.0, "in (0, 1]"),
    ("thinking_fraction", 1.5, "in (0, 1]"),
    ("thinking_fraction", float("nan"), "in (0, 1]"),
    ("thinking_fraction", 0.5, "1 when thinking_positions is 'all'"),
    ("thought_temperature", -0.1, "at least 0"),
    ("thought_temperature", float("nan"), "at least 0"),
    ("reinforce_temperature", 0.0, "positive"),
    ("policy_weight", -1.0, "at least 0"),
    ("base_weight", -0.1, "in [0, 1]"),
    ("base_weight", 1.1, "in [0, 1]"),
    ("boundary_scale", 0.0, "positive"),
    ("talk_weight", -0.5, "at least 0"),
    ("advantage", "normalised", "one of paper, normalized"),
    ("writer", "frozen", "one of self, base"),
    ("start_token", "", "a non-empty text"),
    ("end_token", "", "a non-empty text"),
]


@pytest.mark.parametrize("name, value, allowed", REFUSED, ids=lambda x: str(x) or "empty")
def test_a_refused_value_names_field_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError) as error:
        QuietStarConfig(**{name: value})
    assert str(error.value) == f"{name} = {value!r}: must be {allowed}"


def test_a_frozen_writer_has_no_policy_to_learn():
    with pytest.raises(ValueError, match=r"^policy_weight = 1000000\.0: must be 0 when writer is 'base'"):
        QuietStarConfig(writer="base")
    assert QuietStarConfig(writer="base", policy_weight=0.0).writer == "base"


ALLOWED = [
    {"thought_length": 0},
    {"talk_length": 1},
    {"thought_temperature": 0.0},
    {"policy_weight": 0.0},
    {"base_weight": 0.0},
    {"base_weight": 1.0},
    {"thinking_positions": "random", "thinking_fraction": 0.25},
    {"thinking_positions": "uncertain", "thinking_fraction": 1.0},
    {"suppressed_tokens": []},
]


@pytest.mark.parametrize("values", ALLOWED, ids=str)
def test_the_ends_of_every_allowed_range_are_allowed(values):
    config = QuietStarConfig(**values)
    assert {name: getattr(config, name) for name in values} == values


def test_the_defaults_are_the_papers_recipe():
    config = QuietStarConfig()
    authors_n_ahead, authors_n_ahead_talk = 12, 4
    assert (config.thought_length, config.talk_length) == (authors_n_ahead - 3, authors_n_ahead_talk)
    assert (config.num_thoughts, config.thinking_positions, config.thinking_fraction) == (2, "all", 1.0)
    assert (config.thought_temperature, config.reinforce_temperature) == (1.0, 3.0)
    assert (config.policy_weight, config.base_weight, config.boundary_scale) == (1e6, 0.5, 100.0)
    assert (config.advantage, config.writer, config.talk_weight) == ("paper", "self", 0.0)


@pytest.mark.parametrize("thought_length, talk_length, slots", [(0, 1, 2), (9, 1, 11), (9, 4, 14)])
def test_slots_are_the_boundaries_the_thought_and_the_talk_tokens_that_are_fed(
    thought_length, talk_length, slots
):
    assert QuietStarConfig(thought_length=thought_length, talk_length=talk_length).slots == slots


@pytest.mark.parametrize("name", ["n_ahead", "boundary_token"])
def test_an_unknown_key_is_refused_and_the_known_ones_are_listed(name):
    with pytest.raises(ValueError) as error:
        QuietStarConfig.from_dict({name: 12, "talk_length": 4})
    known = ", ".join(field.name for field in dataclasses.fields(QuietStarConfig))
    assert str(error.value) == f"QuietStarConfig = ['{name}']: unknown; must be among {known}"


def test_json_and_back_gives_an_equal_config():
    config = QuietStarConfig(thought_length=0, start_token=" is", suppressed_tokens=[0, 1])
    assert QuietStarConfig.from_dict(json.loads(config.to_json())) == config


def test_a_config_does_not_change_under_its_model():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuietStarConfig().thought_length = 3


def test_every_field_tells_a_command_line_user_what_it_is():
    assert all(field.metadata.get("help") for field in dataclasses.fields(QuietStarConfig))
