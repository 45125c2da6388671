"""The parts of a modality."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastvq.data import Examples, load_folder
from fastvq.data.reader import Reader
from fastvq.files import StrPath, make_folder, whole

PerExample = Callable[[Tensor, Tensor], Tensor]
"""(reconstructions, originals), both (B, C, *size), to one number for each example, (B,), NaN where it has none."""


class Distance(Protocol):
    """Distance between the distributions of originals and reconstructions."""

    def update(self, restored: Tensor, originals: Tensor) -> None:
        """Add examples and their reconstructions."""

    def result(self) -> float:
        """Return the distance."""


class Measures(NamedTuple):
    """Measures that can be taken, and the reasons why others cannot.

    Attributes:
        per_example: functions by name.
        distances: distances by name.
        refused: for each name that is missing, why.
    """

    per_example: dict[str, PerExample]
    distances: dict[str, Distance]
    refused: dict[str, str]


class Measure(NamedTuple):
    """A number in records and tables.

    Attributes:
        label: its name in tables, with the unit in parentheses.
        decimals: digits behind the point.
        word: its name within a sentence, before the number; empty if the unit says enough.
        unit: what follows the number in a sentence.
        brief: digits behind the point where there is little room.
    """

    label: str
    decimals: int = 4
    word: str = ""
    unit: str = ""
    brief: int = 2

    def number(self, value: float) -> str:
        """Return a value as text, without its unit."""
        return f"{value:.{self.decimals}f}"

    def text(self, value: float) -> str:
        """Return a value as it stands in a sentence, such as "23.92 dB"."""
        word = f"{self.word} " if self.word else ""
        return f"{word}{self.number(value)}{self.unit}"

    def note(self, value: float) -> str:
        """Return a value as it stands below a picture."""
        return f"{value:.{self.brief}f}{self.unit}"


class Objective(nn.Module):
    """Reconstruction loss of a modality, and the error that it is judged by.

    Attributes:
        measure: name of the measure that `value` returns, in records and among `Modality.measures`.
    """

    measure: ClassVar[str]

    def loss(self, restored: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss () and the mean of `errors` () of reconstructions (B, C, *size) of x."""
        raise NotImplementedError

    def errors(self, restored: Tensor, x: Tensor) -> Tensor:
        """Return the error of each example, (B,) float64, whose mean over all examples is the error of a model."""
        raise NotImplementedError

    def value(self, error: float) -> float:
        """Return the measure of a mean error: a monotonic function."""
        raise NotImplementedError


class Modality(ABC):
    """Kind of data, as training, commands and pages see it.

    Attributes:
        name: its name in settings.
        reader: its files.
        value_range: lowest and highest value of a signal.
        measures: the measures of its evaluations, in the order of tables, by their names in records.
        usual_ending: ending of the files in folders of samples and of decoded examples, without a dot.
        first_half: what completions of examples are given, in words.
        played: endings, with a dot, of the files in which `play` shows several signals that move.
    """

    name: ClassVar[str]
    reader: ClassVar[Reader]
    value_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    measures: ClassVar[dict[str, Measure]]
    usual_ending: ClassVar[str]
    first_half: ClassVar[str] = "upper halves"
    played: ClassVar[frozenset[str]] = frozenset()

    @property
    def noun(self) -> tuple[str, str]:
        """The word for an example, and its plural."""
        return self.reader.noun

    def load(self, root: StrPath, config: Any, *, progress: bool = False) -> Examples:
        """Return the examples in a folder or in tar shards, see `fastvq.data.load_folder`."""
        return load_folder(
            root,
            self.reader,
            config.example_format,
            test_fraction=config.test_fraction,
            skip_unreadable=config.skip_unreadable,
            workers=config.workers,
            progress=progress,
        )

    @abstractmethod
    def networks(self, config: Any) -> tuple[nn.Module, nn.Module]:
        """Return the encoder and the decoder, drawn from torch's random state in this order.

        Raises:
            ConfigError: the settings fit no networks.
        """

    def bottleneck(self, config: Any, build: Callable[[tuple[int, ...]], Any]) -> Any:
        """Return the bottleneck; `build` returns the quantizer of the settings for a grid of features.

        Raises:
            ConfigError: the settings fit no bottleneck.
        """
        return build(config.feature_grid)

    @abstractmethod
    def objective(self, config: Any) -> Objective:
        """Return the reconstruction loss."""

    @abstractmethod
    def augmented(self, stored: Tensor, examples: Examples, config: Any, step: int, device: torch.device) -> Tensor:
        """Return this rank's part of a batch, of `examples.uncropped` or else `.train`, as floats to learn from."""

    @abstractmethod
    def as_images(self, x: Tensor, config: Any) -> Tensor:
        """Return pictures (B, 1 or 3, h, w) in [0, 1] of signals (B, C, *size)."""

    @abstractmethod
    def measures_of(self, config: Any, count: int, device: torch.device, *, download: bool = False) -> Measures:
        """Return the measures of `count` examples beside that of the objective.

        Args:
            config: the settings.
            count: number of examples.
            device: where the examples are.
            download: download the weights of networks that are not here yet.
        """

    @abstractmethod
    def write(self, path: StrPath | BinaryIO, x: Tensor, config: Any, ending: str) -> None:
        """Write a signal (C, *size) as a file of one of the endings `reader.written`."""

    def play(self, path: StrPath | BinaryIO, signals: Mapping[str, Tensor], config: Any, ending: str) -> None:
        """Write signals as one file of one of the endings `played`.

        Args:
            path: file to write, or a file that is open for writing.
            signals: tensors (N, C, *size) by what they are, such as "original" and "decoded", which belong together.
            config: the settings.
            ending: with or without a dot.
        """
        raise NotImplementedError

    def seconds(self, config: Any) -> float | None:
        """Return the duration of an example, or None for what has none."""
        return None

    def write_media(self, folder: StrPath, name: str, signals: Mapping[str, Tensor], config: Any) -> None:
        """Write what a page plays beside the picture `name`: files of that name, or that begin with it and a dash.

        Images have nothing to play.

        Args:
            folder: gets the files, and is made if there are any.
            name: of the picture.
            signals: see `play`.
            config: the settings.
        """
        if self.played:
            make_folder(Path(folder))
            with whole(Path(folder) / f"{name}.{self.usual_ending}") as file:
                self.play(file, signals, config, self.usual_ending)
