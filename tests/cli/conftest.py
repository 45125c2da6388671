"""Fixtures of the tests of commands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from .tiny import folder_of_images


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return folder_of_images(tmp_path / "images")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return the number of times that a picture is drawn or a model evaluated, by name."""
    from fastvq.runs import plots
    from fastvq.training import prior, trainer

    counts: Counter[str] = Counter()

    def counting(module: ModuleType, function: str, name: Callable[..., str]) -> None:
        original = getattr(module, function)

        def call(*arguments: Any, **options: Any) -> Any:
            counts[name(*arguments)] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(module, function, call)

    counting(plots, "save_figure", lambda figure, path, *_: f"{path.parent.name}/{path.name}")
    counting(trainer, "evaluate", lambda model, *_: type(model.bottleneck).__name__)
    counting(prior, "bits_per_index", lambda model, *_: type(model).__name__)
    return counts
