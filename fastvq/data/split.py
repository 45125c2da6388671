"""The split of a data set into files to learn from and files to hold out, by their names alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fastvq.errors import DataError

from .source import Item


def split_items(items: Sequence[Item], test_fraction: float) -> tuple[list[Item], list[Item]]:
    """Return the items to learn from and those to hold out, see `load_folder`; fewer than two are all learned from."""
    if len(items) < 2:
        return list(items), []
    by_name = {item.name: item for item in items}
    train, test = split_by_file(list(by_name), test_fraction)
    learned = {by_name[name].class_name for name in train}
    for class_name in sorted({item.class_name or "" for item in items} - {name or "" for name in learned}):
        held_out = [name for name in test if by_name[name].class_name == class_name]
        if len(test) > 1:
            test.remove(max(held_out, key=_position))
    kept = set(test)
    return [item for item in items if item.name not in kept], [by_name[name] for name in test]


def split_by_file(names: list[str], test_fraction: float) -> tuple[list[str], list[str]]:
    """Return the names to train on and the names to hold out, in the given order; neither side is empty.

    Raises:
        DataError: `test_fraction` is not between 0 and 1, or there are fewer than two names.
    """
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    if len(names) < 2:
        raise DataError(f"a split needs at least two files, got {len(names)}")
    position = {name: _position(name) for name in names}
    # A small folder may fall on one side entirely: then the file nearest to the threshold changes sides.
    lowest, highest = min(names, key=position.__getitem__), max(names, key=position.__getitem__)
    test = [name for name in names if name != highest and (name == lowest or position[name] < test_fraction)]
    return [name for name in names if name not in set(test)], test


def _position(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64
