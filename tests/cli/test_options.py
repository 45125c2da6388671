"""Settings on the command line: every field is an option, of its own type, and says what it is."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from fastvq.cli.main import _parser, main
from fastvq.cli.options import given_settings
from fastvq.training.config import PriorConfig, TrainConfig

COMMANDS = {"train": (["train", "--out=run"], TrainConfig), "prior": (["prior", "run"], PriorConfig)}
every_command = pytest.mark.parametrize("command", COMMANDS)


@every_command
def test_every_field_is_an_option(command):
    arguments, settings = COMMANDS[command]
    types = typing.get_type_hints(settings)
    given = []
    expected = {}
    for field in dataclasses.fields(settings):
        option = field.name.replace("_", "-")
        if types[field.name] is bool:
            given.append(f"--no-{option}" if field.default else f"--{option}")
            expected[field.name] = not field.default
        else:
            expected[field.name] = {str: "text", float: 0.25}.get(types[field.name], 7)
            given.append(f"--{option}={expected[field.name]}")
    found = given_settings(_parser().parse_args([*arguments, *given]), settings, arguments[0])
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {n: type(v) for n, v in expected.items()}


@every_command
def test_what_is_not_given_is_left_to_the_record(command):
    arguments, settings = COMMANDS[command]
    assert given_settings(_parser().parse_args(arguments), settings, arguments[0]) == {}


@every_command
def test_help_says_what_each_field_is(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(COMMANDS[command][1]):
        described = field.metadata["help"] + ("" if field.default is None else f" (default: {field.default})")
        assert described in text
        assert "default" in described
    assert "None" not in text


@pytest.mark.parametrize("value", ["wide", "1.5", "None"])
def test_an_optional_number_is_a_number(value, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["prior", "run", f"--dim={value}"])
    assert exit_.value.code == 2
    assert f"argument --dim: invalid int value: '{value}'" in capsys.readouterr().err
