"""Settings on the command line: every field is an option, of its own type, and says what it is."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch

from fastvq.cli import train
from fastvq.cli.main import _parser, main
from fastvq.cli.options import given_settings
from fastvq.errors import ConfigError
from fastvq.modalities import ImageConfig
from fastvq.models.bottlenecks import KINDS
from fastvq.training.build import build_model
from fastvq.training.config import PriorConfig

COMMANDS = {"train": (["train", "--out=run"], ImageConfig), "prior": (["prior", "run"], PriorConfig)}
every_command = pytest.mark.parametrize("command", COMMANDS)


@every_command
def test_every_field_is_an_option(command):
    arguments, settings = COMMANDS[command]
    types = typing.get_type_hints(settings)
    given = []
    expected = {}
    for field in dataclasses.fields(settings):
        if typing.get_origin(types[field.name]) is dict:  # has options of its own
            continue
        option = field.name.replace("_", "-")
        if types[field.name] is bool:
            given.append(f"--no-{option}" if field.default else f"--{option}")
            expected[field.name] = not field.default
        else:
            kind = next((part for part in typing.get_args(types[field.name]) if part is not type(None)), None)
            expected[field.name] = {str: "text", float: 0.25}.get(kind or types[field.name], 7)
            given.append(f"--{option}={expected[field.name]}")
    found = given_settings(_parser().parse_args([*arguments, *given]), arguments[0], settings)
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {n: type(v) for n, v in expected.items()}


@every_command
def test_what_is_not_given_is_left_to_the_record(command):
    arguments, settings = COMMANDS[command]
    assert given_settings(_parser().parse_args(arguments), arguments[0], settings) == {}


@every_command
def test_help_says_what_each_field_is(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(COMMANDS[command][1]):
        if field.default is dataclasses.MISSING:
            continue
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


def test_options_of_the_bottleneck_are_taken_in_every_form():
    arguments = ["--num-quantizers", "8", "--levels=8,5", "--shared-codebook", "--no-kmeans-init", "--steps=3"]
    options = _parser().parse_args(["train", "--quantize-dropout", "--out=run", *arguments, "--eps", "-1"])
    assert options.bottleneck_arguments == {
        "quantize_dropout": "true", "num_quantizers": "8", "levels": "8,5", "shared_codebook": "true",
        "kmeans_init": "false", "eps": "-1",
    }  # fmt: skip
    assert options.steps == 3


def test_no_option_of_a_bottleneck_is_taken_for_an_abbreviation_of_another():
    own = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(ImageConfig)} | {"--out", "--resume"}
    for name, kind in KINDS.items():
        for option in kind.options():
            option = "--" + option.replace("_", "-")
            assert not [other for other in own if other.startswith(option)], (name, option)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stps=3"], "--stps is no option of fastvq train, nor one of --bottleneck vq, which has --codebook-dim, "),
        (
            ["--bottleneck=fsq", "--num-quantizers=2"],
            "nor one of --bottleneck fsq, which has --levels, --num",
        ),
        (["--bottleneck=none", "--levels=8"], "nor one of --bottleneck none, which has --latent-dim"),
        (["--bottleneck=rqv", "--levels=8"], "--bottleneck must be one of vq, rvq, grouped-rvq, "),
        (["--bottleneck=random-projection"], "--bottleneck cannot be random-projection: it only returns indices"),
        (["--bottleneck=rvq", "--num-quantizers=two"], "num_quantizers must be an integer or none, got 'two'"),
        (["levels"], "unrecognized arguments: levels"),
    ],
)
def test_an_unknown_option_is_answered_with_those_that_there_are(arguments, message, capsys, tmp_path):
    try:
        status = main(["train", f"--out={tmp_path / 'run'}", f"--data={tmp_path}", *arguments])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_a_preset_replaces_defaults_and_options_replace_it(tmp_path):
    (tmp_path / "a.toml").write_text("level_blocks = 1\nsteps = 7\n")
    arguments = ["train", "--out=run", "--preset=vqgan", f"--config={tmp_path / 'a.toml'}", "--steps=9"]
    config = train._settings(_parser().parse_args(arguments))
    assert config == ImageConfig(**ImageConfig.presets["vqgan"] | {"level_blocks": 1, "steps": 9})
    assert train._settings(_parser().parse_args(["train", "--out=run"])) == ImageConfig()
    assert train._settings(_parser().parse_args(["train", "--out=run", "--preset=vqvae"])) == ImageConfig()


@pytest.mark.parametrize("name", ImageConfig.presets)
def test_a_model_is_built_of_every_preset(name):
    shape = (1, 14 * 14 + 7 * 7) if name == "vqvae2" else (1, 7, 7)
    assert build_model(ImageConfig(**ImageConfig.presets[name])).encode(torch.rand(1, 1, 28, 28)).shape == shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channel_multipliers": "1,2,3"}, "channel_multipliers must be 2 numbers of at least 1, one for each of the"),
        ({"channel_multipliers": "1,x"}, "channel_multipliers must be 2 numbers of at least 1, .* got '1,x'"),
        ({"norm_groups": 7}, "norm_groups: must divide the 96 channels of every layer, got 7"),
        ({"level_blocks": -1}, "level_blocks must be at least 0, got -1"),
    ],
)
def test_settings_of_networks_are_validated(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_model(ImageConfig(**settings))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out=x", "--skip-unreadable"], "--skip-unreadable: has no effect on the data set fashion-mnist"),
        (["train", "--out=x", "--test-fraction=0.2"], "--test-fraction: has no effect on the data set fashion-mnist"),
        (["train", "--out=x", "--bottleneck=none", "--decay=0.9"], "--decay: has no effect on the bottleneck none"),
        (["train", "--out=x", "--adversarial-start=5"], "--adversarial-start: has no effect without an"),
        (["train", "--out=x", "--discriminator-width=16"], "--discriminator-width: has no effect without an"),
        (["train", "--out=x", "--data=digits", "--modality=video"], "--modality: digits has images, not video"),
        (["train", "--out=x", "--overwrite"], "--overwrite: has no effect without --resume"),
        (["prior", "x", "--kind=lstm", "--heads=2"], "--heads: has no effect on a prior of kind lstm"),
        (["encode", "--held-out", "x.fvq", "--run=x", "--skip-unreadable"], "--skip-unreadable: has no effect with"),
        (["encode", "x.npy", "x.fvq", "--skip-unreadable"], "--skip-unreadable: has no effect with --held-out or an"),
        (["reconstruct", "x", "--out=x.png", "--skip-unreadable"], "--skip-unreadable: has no effect with --held-out"),
        (
            ["tokenize", "digits", "--run=x", "--out=y", "--workers=2"],
            "--workers: has no effect on the data set",
        ),
    ],
)
def test_an_option_without_effect_is_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
