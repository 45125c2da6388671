"""The table of named data sets, which settings, command line and trainer read."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from fastvq.cli import train
from fastvq.data import DATA_SETS, DataError, DataSet, Examples
from fastvq.data.noto_emoji import SHIPPED, load_noto_emoji
from fastvq.data.registry import name_of
from fastvq.errors import ConfigError
from fastvq.modalities import ImageConfig, config_of, modality_of
from fastvq.training import load_examples

COLOR = {"image_size": 16, "grayscale": False}
DOTS = Examples("dots", *(torch.full((n, 3, 16, 16), n, dtype=torch.uint8) for n in (4, 2)), test_names=("a", "b"))


@pytest.fixture
def dots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATA_SETS, "dots", DataSet(lambda: DOTS, "dots", "in memory", "16x16 color", COLOR))


def settings(*arguments: str) -> ImageConfig:
    parser = argparse.ArgumentParser()
    train.add_options(parser)
    return train._settings(parser.parse_args(["--out=nowhere", *arguments]))


def test_an_entry_of_the_table_is_all_that_a_data_set_needs(dots: None) -> None:
    config = settings("--data=dots")
    assert (config.data, config.image_size, config.grayscale) == ("dots", 16, False)
    assert load_examples(config) is DOTS
    with pytest.raises(ConfigError, match="image_size must be 16, since dots is 16x16 color, got 28"):
        settings("--data=dots", "--image-size=28")


@pytest.mark.parametrize("name", [name for name, known in DATA_SETS.items() if known.modality == "image"])
def test_each_data_set_has_its_settings(name: str) -> None:
    config, known = settings(f"--data={name}"), DATA_SETS[name]
    side, gray = known.settings["image_size"], known.settings["grayscale"]
    assert (config.data, config.image_size, config.grayscale) == (name, side, gray)
    other = "--no-grayscale" if gray else "--grayscale"
    for changed in (other, "--fit=pad", f"--image-width={2 * side}", f"--crop-from={2 * side}"):
        setting = changed.removeprefix("--no").strip("-").partition("=")[0].replace("-", "_")
        with pytest.raises(ConfigError, match=f"{setting} must be .*, since {name} is {known.form}, got"):
            settings(f"--data={name}", changed)


@pytest.mark.parametrize("name", DATA_SETS)
def test_the_table_says_what_a_data_set_holds(name: str) -> None:
    known = DATA_SETS[name]
    if known.missing():
        pytest.skip(f"missing: {known.missing()}")
    images = known.load()
    assert (len(images.train), len(images.test)) == known.count
    config = config_of(known.modality)(data=name, **known.settings)
    assert images.train.shape[1:] == config.example_format.shape
    assert str(images.train.dtype) == f"torch.{modality_of(known.modality).reader.dtype}"
    assert images.noun == modality_of(known.modality).noun
    assert images.name == known.name
    if images.train_labels is not None:
        assert images.class_names is not None
        assert set(images.train_labels.tolist()) == set(range(len(images.class_names)))
    else:
        assert images.train_captions is not None
    if images.train_captions is not None:
        assert images.test_captions is not None
        assert (len(images.train_captions), len(images.test_captions)) == known.count
        assert all(images.train_captions + images.test_captions)
    assert len(images.train.unique()) > 10
    assert int(images.train.max()) > 200


def test_the_emoji_are_held_out_by_name_and_show_what_they_are_called() -> None:
    emoji = load_noto_emoji()
    assert emoji.class_names is not None
    assert emoji.train_captions is not None
    captions = [*emoji.train_captions, *(emoji.test_captions or ())]
    names = [name for text in captions for name in text.split("\n")]
    assert len(names) == len(set(names)) == 2 * 1689
    assert not any("skin tone" in name for name in names)
    assert len(torch.cat([emoji.train, emoji.test]).flatten(1).unique(dim=0)) == len(captions) == 1682
    assert emoji.test_names[:3] == ("ab button blood type", "airplane", "angry face with horns")
    row = emoji.train_captions.index("red heart\nred heart, smileys & emotion")
    red, green, blue = emoji.train[row, :, 16, 16].tolist()
    assert red > 200 > 100 > max(green, blue)
    assert emoji.train[row, :, 0, 0].tolist() == [255, 255, 255]
    license = SHIPPED.with_name("noto_emoji.LICENSE").read_text()
    assert "Apache License" in license
    assert SHIPPED.name in license


def test_images_have_the_name_of_their_data_set() -> None:
    assert load_examples(ImageConfig()).name == DATA_SETS["fashion-mnist"].name == name_of("fashion-mnist")


def test_a_folder_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_of(".") == name_of(str(tmp_path)) == tmp_path.name


def test_the_default_is_the_first() -> None:
    assert settings() == ImageConfig()
    assert ImageConfig().data == "fashion-mnist" == next(iter(DATA_SETS))


def test_any_other_name_is_a_folder(tmp_path: Path, dots: None) -> None:
    config = settings(f"--data={tmp_path}")
    assert (config.data, config.image_size, config.grayscale) == (str(tmp_path.resolve()), 64, False)
    listed = r"'fashion-mnist' \(.*\), 'fashion-mnist-full' \(.*\), .*'dots' \(in memory\) or a folder of files"
    with pytest.raises(DataError, match=f"typo doesn't exist: data must be {listed}"):
        load_examples(settings("--data=typo"))
