"""Video files: clips of one size and frame rate, files that are damaged or no video, and writing."""

from __future__ import annotations

import struct
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastvq.data.video_format import VideoFormat
from fastvq.data.video_io import SUFFIXES, WRITTEN, read_video, write_video
from fastvq.errors import ConfigError, DataError, MissingExtraError

from ..cases import generator

av = pytest.importorskip("av")
COLORS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]])


def colored(frames: int, height: int = 16, width: int = 16) -> Tensor:
    """Return a video (3, T, H, W) whose frames have the colors of the table in turn."""
    return COLORS[torch.arange(frames) % len(COLORS)].T[:, :, None, None].expand(-1, -1, height, width).contiguous()


def numbers(clips: Tensor) -> list[list[int]]:
    """Return, for each frame of clips of `colored`, the number of its color."""
    means = clips.float().mean((-1, -2)).transpose(1, 2) / 255
    return (means[:, :, None] - COLORS).square().sum(-1).argmin(-1).tolist()


@pytest.mark.parametrize("ending", sorted(WRITTEN))
@pytest.mark.parametrize("size", [(16, 16), (13, 17)])
def test_a_video_survives_writing_and_reading(tmp_path: Path, ending: str, size: tuple[int, int]) -> None:
    assert ending in SUFFIXES
    video = colored(8, *size)
    path = tmp_path / f"a{ending}"
    write_video(path, video, 8, ending)
    clips = read_video(path, VideoFormat(8, *size))
    assert (clips.dtype, clips.shape) == (torch.uint8, (1, 3, 8, *size))
    assert (clips[0] / 255 - video).abs().max() < (0.05 if ending == ".mp4" else 1e-6)
    content = path.read_bytes()
    assert torch.equal(read_video("elsewhere" + ending, VideoFormat(8, *size), content), clips)
    memory = BytesIO()
    write_video(memory, video, 8, ending)
    assert torch.equal(read_video("elsewhere" + ending, VideoFormat(8, *size), memory.getvalue()), clips)
    gray = video.mean(0, keepdim=True)  # some frames that follow each other are equal
    write_video(path, gray, 8, ending)
    assert (read_video(path, VideoFormat(8, *size, grayscale=True, frame_rate=8))[0] / 255 - gray).abs().max() < 0.05


def write_webm(path: Path, video: Tensor, frame_rate: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=frame_rate)
        stream.height, stream.width, stream.pix_fmt = *video.shape[2:], "yuv420p"
        for pixels in (video * 255).byte().permute(1, 2, 3, 0).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def test_webm_is_read(tmp_path: Path) -> None:
    write_webm(tmp_path / "a.webm", colored(8), 8)
    assert numbers(read_video(tmp_path / "a.webm", VideoFormat(8, 16))) == [list(range(8))]


@pytest.mark.parametrize("ending", sorted(WRITTEN))
@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        (10, [0, 1, 2, 3, 4, 5, 6, 7]),
        (5, [0, 2, 4, 6]),
        (20, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]),
        (4, [1, 3, 6]),
        (15, [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7]),
        (0.1, [7]),
    ],
)
def test_the_frame_in_the_middle_of_each_tick_is_taken(
    tmp_path: Path, ending: str, rate: float | None, expected: list[int]
) -> None:
    path = tmp_path / f"a{ending}"
    write_video(path, colored(8), 10, ending)
    clips = read_video(path, VideoFormat(len(expected), 16, frame_rate=rate))
    assert numbers(clips) == [expected]


def test_an_animation_has_its_own_times(tmp_path: Path) -> None:
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue", "white")]
    for ending in ("gif", "webp"):
        path = tmp_path / f"a.{ending}"
        images[0].save(path, save_all=True, append_images=images[1:], duration=[300, 100, 400, 200])
        clips = read_video(path, VideoFormat(10, 8, frame_rate=10))
        assert numbers(clips) == [[0, 0, 0, 1, 2, 2, 2, 2, 3, 3]]


def test_clips_follow_each_other_and_a_short_video_holds_its_last_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    write_video(path, colored(8), 10, "webp")
    assert numbers(read_video(path, VideoFormat(3, 16))) == [[0, 1, 2], [3, 4, 5]]
    assert numbers(read_video(path, VideoFormat(10, 16))) == [[*range(8), 7, 7]]


def test_frames_are_brought_to_size_like_images(tmp_path: Path) -> None:
    video = torch.zeros(3, 2, 8, 24)
    video[:, :, :, 8:16] = torch.tensor([1.0, 0.8])[:, None, None]
    path = tmp_path / "a.webp"
    write_video(path, video, 10, "webp")
    assert read_video(path, VideoFormat(2, 8)).float().mean() == 0.9 * 255
    padded = read_video(path, VideoFormat(2, 24, 24, fit="pad", grayscale=True))
    assert padded.shape == (1, 1, 2, 24, 24)
    assert padded.float().mean() == pytest.approx(0.9 * 255 / 9, abs=1)
    assert read_video(path, VideoFormat(2, 6, fit="stretch")).float().mean() == pytest.approx(0.9 * 255 / 3, abs=1)


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    images = [Image.new("RGBA", (8, 8), (255, 0, 0, alpha)) for alpha in (0, 255)]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], duration=100, lossless=True)
    clips = read_video(tmp_path / "a.webp", VideoFormat(2, 8))
    assert clips[0, :, :, 0, 0].T.tolist() == [[255, 255, 255], [255, 0, 0]]


def written(path: Path, video: Tensor | None = None) -> bytes:
    """Return the bytes of a video that is written to a path."""
    write_video(path, colored(8) if video is None else video, 10, path.suffix)
    return path.read_bytes()


@pytest.mark.parametrize("ending", sorted(SUFFIXES))
def test_what_is_no_video_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    still = BytesIO()
    Image.new("RGB", (8, 8)).save(still, "PNG")
    named = rf"a\{ending} is not a readable video: "
    for content, reason in ((b"", "the file is empty"), (still.getvalue(), "it is a still image"), (b"text", ".")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=named + reason):
            read_video(path, VideoFormat(4, 8))
        with pytest.raises(DataError, match=named + reason):
            read_video(path.name, VideoFormat(4, 8), content)
    path.unlink()
    with pytest.raises(DataError, match=named + "No such file"):
        read_video(path, VideoFormat(4, 8))
    path.mkdir()
    with pytest.raises(DataError, match=named + "it is a folder"):
        read_video(path, VideoFormat(4, 8))


@pytest.mark.parametrize("ending", sorted(WRITTEN))
def test_a_video_of_one_frame_is_a_still_image(tmp_path: Path, ending: str) -> None:
    written(tmp_path / f"a{ending}", colored(1))
    with pytest.raises(DataError, match="it is a still image"):
        read_video(tmp_path / f"a{ending}", VideoFormat(4, 8))
    written(tmp_path / f"a{ending}", colored(2))
    assert numbers(read_video(tmp_path / f"a{ending}", VideoFormat(4, 8))) == [[0, 1, 1, 1]]


def test_sound_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        container.mux(stream.encode(None))
    with pytest.raises(DataError, match=r"a\.mp4 is not a readable video: "):
        read_video(path, VideoFormat(4, 8))


def test_a_video_is_turned_as_the_camera_says(tmp_path: Path) -> None:
    video = torch.zeros(3, 4, 16, 16)
    video[:, :, :8, :8] = COLORS[:4].T[:, :, None, None]
    content = bytearray(written(tmp_path / "a.mp4", video))
    matrix = content.index(b"tkhd") + 44
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    assert content[matrix : matrix + 36] == upright
    # A quarter turn to the right, as telephones write it: the upper left corner becomes the upper right one.
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    clips = read_video("a.mp4", VideoFormat(4, 16), bytes(content))
    assert numbers(clips[..., 1:7, 9:15]) == [[0, 1, 2, 3]]
    assert numbers(clips[..., 1:7, 1:7]) == [[4, 4, 4, 4]]


def random_video() -> Tensor:
    """Return a video (3, 24, 32, 32) that takes some kilobytes."""
    return torch.rand(3, 24, 8, 8, generator=generator()).repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.mark.parametrize("ending", sorted(WRITTEN))
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_truncated_file_is_named(tmp_path: Path, ending: str, share: float) -> None:
    content = written(tmp_path / f"a{ending}", random_video())
    with pytest.raises(DataError, match=rf"a\{ending} is not a readable video: "):
        read_video(f"a{ending}", VideoFormat(4, 8), content[: round(share * len(content))])


def test_a_video_whose_index_comes_first_is_not_read_beyond_a_truncation(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height = stream.width = 32
        for pixels in (random_video() * 255).byte().permute(1, 2, 3, 0).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    assert read_video(path, VideoFormat(24, 32)).shape[0] == 1
    content = path.read_bytes()
    with pytest.raises(DataError, match=r"a\.mp4 is not a readable video: "):
        read_video(path, VideoFormat(4, 32), content[: round(0.8 * len(content))])


def test_damage_within_a_file_is_named(tmp_path: Path) -> None:
    content = bytearray(written(tmp_path / "a.mp4", random_video()))
    for place in range(content.index(b"mdat") + 1000, content.index(b"moov") - 4, 50):
        content[place] ^= 0x55
    with pytest.raises(DataError, match=r"a\.mp4 is not a readable video: it is damaged after"):
        read_video("a.mp4", VideoFormat(4, 32), bytes(content))


def test_what_is_missing_for_films_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    for call in (lambda: read_video(tmp_path / "a.mp4", VideoFormat(4, 8)), lambda: written(tmp_path / "b.mp4")):
        with pytest.raises(MissingExtraError, match=r"av is missing: pip install .fastvq-torch\[video\]."):
            call()
    written(tmp_path / "a.gif")
    assert len(read_video(tmp_path / "a.gif", VideoFormat(4, 8))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"height": 0}, "height must be at least 1, got 0"),
        ({"width": -1}, "width must be at least 1, got -1"),
        ({"fit": "zoom"}, "fit must be one of crop, pad, stretch, got 'zoom'"),
        ({"frame_rate": 0.0}, "frame_rate must be positive and finite, got 0.0"),
        ({"frame_rate": float("nan")}, "frame_rate must be positive and finite, got nan"),
    ],
)
def test_formats_are_validated(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VideoFormat(**{"frames": 4, "height": 8} | options)
    assert VideoFormat(4, 8, grayscale=True).shape == (1, 4, 8, 8)
