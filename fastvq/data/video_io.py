"""Video in files: reading as clips of one format, and writing.

Animated GIF and WebP are read and written by Pillow, all others by PyAV (FFmpeg).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from io import BytesIO
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fastvq.errors import DataError
from fastvq.extras import require
from fastvq.files import StrPath

from .image_io import fit_image, why_unreadable
from .reader import Reader
from .video_format import VideoFormat

_ANIMATIONS = frozenset({".gif", ".webp"})
SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}) | _ANIMATIONS
"""Endings of the files that are video."""
WRITTEN = frozenset({".mp4"}) | _ANIMATIONS
"""Endings of the files that `write_video` writes."""
_UNTIMED = 0.1
"""Duration in seconds of a GIF's frame that states none, as in browsers."""
_EARLIER = 0.05
"""Share of a tick by which its middle may lie before a frame that is taken all the same: files round their times, and a
middle that falls between two frames must not go to either by chance."""
_MOST_FRAMES = 1 << 20
_QUALITY = "18"
"""Constant rate factor of x264: visually lossless."""


class _Frame(NamedTuple):
    """A frame of a file: when it begins and ends, in seconds, and a function that returns it as a Pillow image."""

    start: float
    end: float
    image: Callable[[], Any]


def read_video(path: StrPath, format: VideoFormat, content: bytes | None = None) -> Tensor:
    """Return a video as clips, uint8 (clips, C, frames, height, width), one after the other.

    At a frame rate, each frame of a clip is the one that the file shows in the middle of its time. Frames after the
    last whole clip are left out. A video shorter than one clip is one, whose last frame is repeated. Frames are turned
    upright, and brought to size and color as `read_image` does.

    Args:
        path: the video file.
        format: the clips.
        content: the file's bytes where it stands in an archive; `path` then only names it.

    Raises:
        DataError: the file is not a readable video, or a still image; the message names it.
        MissingExtraError: Pillow, or PyAV for other files than GIF and WebP, is not installed.
    """
    path = Path(path)
    animated = path.suffix.lower() in _ANIMATIONS
    require("PIL.Image")
    if not animated:
        require("av", "video")
    source = path if content is None else BytesIO(content)
    try:
        frames = list(_at_rate(_animation(source) if animated else _film(source), format))
    except Exception as error:  # decoders raise errors of all kinds for damaged files
        raise DataError(f"{path} is not a readable video: {why_unreadable(path, error, content)}") from error
    missing = max(0, format.frames - len(frames))
    video = torch.stack(frames + frames[-1:] * missing, 1)
    clips = video.shape[1] // format.frames
    return video[:, : clips * format.frames].unflatten(1, (clips, -1)).transpose(0, 1).contiguous()


def _at_rate(frames: Iterable[_Frame], format: VideoFormat) -> Iterator[Tensor]:
    """Yield the pixels (C, H, W) of each frame, or, at a frame rate, those shown in the middle of each of its ticks.

    Raises:
        ValueError: there are fewer than two frames, or too many.
    """
    count = taken = 0
    first = math.inf
    for frame, following in pairwise(chain(frames, [None])):
        assert frame is not None
        count += 1
        first = min(first, frame.start)
        until = taken + 1
        if format.frame_rate is not None:
            end = frame.end if following is None else following.start
            until = math.floor((end - first) * format.frame_rate + 0.5 + _EARLIER)
            if following is None:
                until = max(1, until)
        if until > _MOST_FRAMES:
            raise ValueError(f"it has more than {_MOST_FRAMES} frames, cut it into parts first")
        if until > taken:
            pixels = fit_image(frame.image(), format.frame)
            yield from [pixels] * (until - taken)
            taken = until
    if count < 2:
        raise ValueError("it is a still image" if count else "it has no frames")


def _animation(source: Path | BytesIO) -> Iterator[_Frame]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        with require("PIL.Image").open(source) as file:
            end = 0.0
            for number in range(getattr(file, "n_frames", 1)):
                file.seek(number)
                file.load()
                image, start = file.copy(), end
                end = start + (file.info.get("duration", 0) / 1000 or _UNTIMED)
                yield _Frame(start, end, lambda image=image: image)  # type: ignore[misc]


def _film(source: Path | BytesIO) -> Iterator[_Frame]:
    with require("av", "video").open(str(source) if isinstance(source, Path) else source) as container:
        if not container.streams.video:
            raise ValueError("it has no video")
        stream = container.streams.video[0]
        end = 0.0
        length = float(1 / (stream.average_rate or 25))
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise ValueError(f"it is damaged after {end:.2f} s")
            start = end if frame.time is None else frame.time
            end = start + (float(frame.duration * frame.time_base) if frame.duration else length)
            yield _Frame(start, end, lambda frame=frame: _upright(frame))  # type: ignore[misc]


def _upright(frame: Any) -> Any:
    """Return a frame as an image, turned as the camera says."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def write_video(path: StrPath | BinaryIO, video: Tensor, frame_rate: float, ending: str) -> None:
    """Write a video (C, T, H, W), float in [0, 1], with one or three channels, in the format of an `ending`.

    WebP is lossless; GIF has 256 colors a frame; MP4 is H.264, with half the color resolution where sides are even.
    Animations repeat for ever. Equal frames may become one of longer duration.

    Args:
        path: file to write, which need not have that ending, or a file that is open for writing.
        video: the frames.
        frame_rate: frames per second; GIF rounds times to hundredths of a second, WebP to thousandths.
        ending: one of `WRITTEN`.

    Raises:
        MissingExtraError: Pillow, or PyAV for MP4, is not installed.
    """
    kind = ending.lower().lstrip(".")
    frames = (video * 255).round().to(torch.uint8).permute(1, 2, 3, 0).squeeze(-1).cpu().numpy()
    if kind == "mp4":
        _write_film(path, frames, frame_rate)
        return
    pillow = require("PIL.Image")
    images = [pillow.fromarray(frame) for frame in frames]
    unit = 100 if kind == "gif" else 1000
    ticks = [round(unit * n / frame_rate) for n in range(len(images) + 1)]
    durations = [(after - before) * 1000 // unit for before, after in pairwise(ticks)]
    options: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
    images[0].save(path, kind.upper(), save_all=True, append_images=images[1:], duration=durations, loop=0, **options)


CLIPS = Reader(("clip", "clips"), SUFFIXES, read_video, "uint8", WRITTEN)
"""Files of video, each cut into clips."""


def _write_film(path: StrPath | BinaryIO, frames: Any, frame_rate: float) -> None:
    av = require("av", "video")
    height, width = frames.shape[1:3]
    with av.open(str(path) if isinstance(path, str | Path) else path, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1001))
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        stream.options = {"crf": _QUALITY}
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="gray" if pixels.ndim == 2 else "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
