"""Video among the modalities: its settings, the shipped clips, and what moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastvq.cli import main as cli
from fastvq.data import DATA_SETS
from fastvq.data.emoji_clips import SHIPPED, write_clips
from fastvq.data.video_format import VideoFormat
from fastvq.data.video_io import read_video, write_video
from fastvq.errors import ConfigError
from fastvq.modalities import VideoConfig, modality_of, recognized
from fastvq.training.build import build_model

from .folders import FOLDERS

SMALL: dict[str, Any] = {"data": "folder", **FOLDERS["video"].settings}


def test_settings_fit_each_other_and_the_network() -> None:
    config = VideoConfig(data="folder", frames=9, frame_size=32, frame_width=48, time_downsamples=1, downsamples=3)
    assert config.example_format == VideoFormat(9, 32, 48, frame_rate=6.0)
    assert config.feature_grid == (5, 4, 6)
    model = build_model(VideoConfig(**SMALL, dim=4, codebook_size=8))
    assert model.encode(torch.rand(1, 3, 5, 16, 16)).shape == (1, 2, 4, 4)
    assert (model.strides, model.first) == ((4, 4, 4), (1, 0, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 16}, r"frames must be 1 plus a multiple of 2\*\*time_downsamples = 4, got 16"),
        ({"time_downsamples": 3}, "time_downsamples must be at most downsamples = 2, got 3"),
        ({"frame_size": 18}, r"frame_size 18 is not a multiple of 2\*\*downsamples = 4"),
        ({"frame_width": 18}, r"frame_width 18 is not a multiple"),
        ({"frame_rate": 0.0}, "frame_rate must be positive, got 0.0"),
        ({"data": "emoji-clips"}, "frames must be 17, since emoji-clips is 17 frames of 32x32 in color, got 5"),
        ({"data": "fashion-mnist"}, "data: fashion-mnist is for the modality image, not video"),
    ],
)
def test_settings_are_validated(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VideoConfig(**SMALL | options)


def test_what_only_one_modality_reads_decides_about_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.gif").touch()
    (tmp_path / "b.webp").touch()
    assert recognized(tmp_path) == "image"
    (tmp_path / "c.mp4").touch()
    assert recognized(tmp_path) == "video"
    (tmp_path / "d.png").touch()
    with pytest.raises(ConfigError, match=r"modality: .* holds \d image files? and \d video files?: say which"):
        recognized(tmp_path)


def test_the_shipped_clips_are_small_and_move() -> None:
    assert SHIPPED.stat().st_size < 1_500_000
    clips = DATA_SETS["emoji-clips"].load()
    assert clips.train.shape == (124, 3, 17, 32, 32)
    assert clips.test.shape == (10, 3, 17, 32, 32)
    assert clips.train_captions is not None
    names = {*clips.train_captions, *clips.test_names}
    assert len(names) == 134
    assert {"dolphin", "penguin"} < names
    for part in (clips.train, clips.test):
        moving = part.float().diff(dim=2).abs().mean((1, 2, 3, 4))
        assert moving.min() > 0.3
        assert part.float().mean() > 128  # on white
    notice = SHIPPED.with_name("emoji_clips.LICENSE").read_text()
    assert "Microsoft" in notice
    assert "Permission is hereby granted" in notice


def test_clips_are_written_with_their_names_and_split_by_them(tmp_path: Path) -> None:
    from fastvq.data.emoji_clips import load_emoji_clips
    from fastvq.data.split import split_by_file

    names = [f"clip {n}" for n in range(30, 0, -1)]
    clips = torch.randint(256, (30, 3, 2, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    write_clips(clips, names, tmp_path / "a.npz.xz")
    loaded = load_emoji_clips(tmp_path / "a.npz.xz")
    assert (list(loaded.train_captions or ()), list(loaded.test_names)) == split_by_file(sorted(names), 0.1)
    for name, clip in zip(loaded.test_names, loaded.test, strict=True):
        assert torch.equal(clip, clips[names.index(name)])
    for name, clip in zip(loaded.train_captions or (), loaded.train, strict=True):
        assert (clip.int() - clips[names.index(name)].int()).abs().max() <= 3


def test_frames_side_by_side_are_a_picture_of_a_clip() -> None:
    config, video = VideoConfig(**SMALL | {"frames": 9}), modality_of("video")
    x = torch.arange(9.0).reshape(1, 1, 9, 1, 1).expand(2, 3, 9, 4, 6) / 10
    pictures = video.as_images(x, config)
    assert pictures.shape == (2, 3, 4, 30)
    assert (pictures[0, 0, 0, ::6] * 10).round().tolist() == [0, 2, 4, 6, 8]
    assert video.as_images(x[:, :, :1], config).shape == (2, 3, 4, 6)


def test_an_animation_shows_several_clips_beside_and_below_each_other(tmp_path: Path) -> None:
    config, video = VideoConfig(**SMALL | {"frame_rate": 5.0}), modality_of("video")
    signals = {name: torch.full((3, 3, 5, 8, 8), value) for name, value in (("original", 0.0), ("decoded", 1.0))}
    for x in signals.values():
        x += torch.arange(5.0).view(5, 1, 1) / 10 * (1 if x[0, 0, 0, 0, 0] == 0 else -1)
    video.play(tmp_path / "a.webp", signals, config, ".webp")
    with Image.open(tmp_path / "a.webp") as file:
        assert (file.size, file.n_frames) == ((36, 22), 5)
        assert [file.getpixel((x, y))[0] for x, y in ((4, 4), (4, 14), (30, 4), (0, 0), (35, 21))] == [
            0,
            255,
            0,
            128,
            128,
        ]
        file.seek(4)
        assert file.getpixel((4, 4))[0] == 102
        assert file.info["duration"] == 200


def test_measures_of_images_are_taken_over_frames() -> None:
    config, video = VideoConfig(**SMALL), modality_of("video")
    taken = video.measures_of(config, 2, torch.device("cpu"))
    x = torch.rand(2, 3, 5, 16, 16)
    y = x.clone()
    y[0, :, 2] += 0.1
    psnr = taken.per_example["psnr_db_mean"](y, x)
    torch.testing.assert_close(psnr, torch.tensor([(4 * 120 + 20) / 5, 120], dtype=psnr.dtype), atol=1e-3, rtol=0)
    assert taken.per_example["ssim"](x, x).tolist() == pytest.approx([1, 1])
    assert taken.per_example["ssim"](y, x)[0] < 1
    assert {"ms_ssim", "lpips", "rfid"} <= taken.refused.keys() | taken.per_example.keys() | taken.distances.keys()


def test_a_run_shows_and_writes_what_moves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", str(tmp_path / "run")
    FOLDERS["video"].write(data)
    (data / "broken.mp4").write_bytes(b"no video")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in FOLDERS["video"].settings.items()]
    train = ["train", f"--out={run}", f"--data={data}", *options, "--codebook-size=8", "--dim=4", "--steps=2"]
    train += ["--batch-size=4", "--quiet"]
    assert cli.main([*train, "--no-skip-unreadable"]) != 0
    assert "broken.mp4 is not a readable video" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main(train) == 0
    assert "skipped 1 file of" in capsys.readouterr().err
    prior = ["prior", run, "--kind=pixelcnn", "--steps=1", "--dim=4", "--depth=1", "--batch-size=4", "--quiet"]
    assert cli.main(prior) == 0
    page = (tmp_path / "run" / "index.html").read_text()
    assert "Each clip becomes 2 x 4 x 4 indices below 8" in page
    for name in ("reconstructions", "samples", "completions"):
        assert f'src="media/{name}.webp"' in page
        with Image.open(tmp_path / "run" / "media" / f"{name}.webp") as file:
            assert file.n_frames == 5
    for ending in ("gif", "mp4"):
        out = tmp_path / f"samples.{ending}"
        assert cli.main(["sample", run, f"--out={out}", "--count=2"]) == 0
        assert read_video(out, VideoFormat(5, 20, fit="stretch")).shape[2] == 5
        out = tmp_path / f"reconstructions.{ending}"
        assert cli.main(["reconstruct", run, str(data / "v0.webp"), f"--out={out}"]) == 0
        assert read_video(out, VideoFormat(5, 20, fit="stretch")).shape[2] == 5
    long = torch.rand(3, 12, 16, 16)
    write_video(tmp_path / "long.webp", long, 12, "webp")
    assert cli.main(["encode", str(tmp_path / "long.webp"), str(tmp_path / "long.fvq"), f"--run={run}"]) == 0
    assert "2 clips of 3840 bytes" in capsys.readouterr().out
