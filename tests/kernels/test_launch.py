"""Launch configurations fit every shape; measuring them is asked for, cached, and never breaks a search."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

from fastvq.backends import environment
from fastvq.kernels import launch
from fastvq.kernels.frame import columns_of

DEFAULT = launch.SCANS["sm_90"][1, 64]


@pytest.mark.parametrize("architecture", launch.SCANS)
def test_every_dimension_has_a_configuration(architecture, monkeypatch):
    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    for dim in [*range(1, 300), 512, 1000, 4096]:
        columns = columns_of(dim)
        assert columns >= dim
        first, second = (launch.scan(torch.device("cuda"), columns, terms) for terms in (1, 3))
        assert columns % first.block_d == columns % second.block_d == 0
        assert first.block_k % second.block_k == 0, "codes are padded to the tiles of the first scan"
        assert not second.paired


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 16, 17, 64, 65, 4096])
def test_root(dim):
    assert 4 ** launch.root_of(dim) >= dim


@pytest.mark.parametrize(("blocks", "tiles", "expected"), [(1, 1, 1), (1, 100, 2), (100, 100, 1), (0, 5, 2)])
def test_codes_are_shared_out_where_rows_are_few(blocks, tiles, expected):
    assert launch.splits(torch.device("cpu"), blocks, tiles) == expected


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return launch.cache_file()


def test_the_fastest_candidate_is_kept(cache):
    fastest = launch.candidates(DEFAULT)[3]
    timed = []

    def seconds(candidate):
        timed.append(candidate)
        return 1.0 if candidate == fastest else 2.0

    assert launch.tuned("key", DEFAULT, seconds) == fastest
    assert sorted(map(str, timed)) == sorted(map(str, launch.candidates(DEFAULT)))
    assert launch.tuned("key", DEFAULT, lambda candidate: pytest.fail("timed again")) == fastest
    assert json.loads(cache.read_text()) == {"key": dataclasses.asdict(fastest)}
    launch.tuned("other", DEFAULT, lambda candidate: 1.0)
    assert set(json.loads(cache.read_text())) == {"key", "other"}
    assert [path.name for path in cache.parent.iterdir()] == [cache.name], "no temporary file is left"


def test_a_candidate_that_cannot_run_is_passed_over(cache):
    def seconds(candidate):
        if candidate.block_k == 256:
            raise RuntimeError("out of resource: shared memory")
        return float(candidate.block_n)

    with pytest.warns(UserWarning, match="can't run here: out of resource"):
        assert launch.tuned("key", DEFAULT, seconds).block_n == 64


def test_a_default_that_cannot_run_is_an_error(cache):
    def seconds(candidate):
        raise RuntimeError("no device")

    with pytest.raises(RuntimeError, match="no device"):
        launch.tuned("key", DEFAULT, seconds)


def poisoned(**changes):
    return {"key": dataclasses.asdict(DEFAULT) | changes}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"key": ["block_n"]}',
        '{"key": null}',
        '{"key": {"block_n": 1}}',
        json.dumps(poisoned(block_n=7)),
        json.dumps(poisoned(num_warps=0)),
        json.dumps(poisoned(num_stages=-1)),
        json.dumps(poisoned(block_k=2**40)),
        json.dumps(poisoned(block_n="128")),
        json.dumps(poisoned(block_n=float(DEFAULT.block_n))),
        json.dumps(poisoned(paired=1)),
        json.dumps(poisoned(other=1)),
        json.dumps(poisoned(block_d=float("nan"))),
    ],
    ids=lambda content: content[:60],
)
def test_a_damaged_or_poisoned_cache_is_not_used(cache, content):
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    with pytest.warns(UserWarning, match=f"^fastvq: {re.escape(str(cache))}"):
        assert launch.tuned("key", DEFAULT, lambda candidate: float(candidate != DEFAULT)) == DEFAULT
    assert json.loads(cache.read_text()) == {"key": dataclasses.asdict(DEFAULT)}
    assert launch.tuned("key", DEFAULT, lambda candidate: pytest.fail("timed again")) == DEFAULT


def test_a_cache_that_is_no_text(cache):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="cannot be read, and is written anew"):
        launch.tuned("key", DEFAULT, lambda candidate: 1.0)


def test_a_cache_that_cannot_be_written(cache):
    cache.mkdir(parents=True)
    with pytest.warns(UserWarning, match="launch.json"):
        assert launch.tuned("key", DEFAULT, lambda candidate: float(candidate != DEFAULT)) == DEFAULT


@pytest.mark.parametrize("value", [None, "0", "1"])
def test_nothing_is_timed_unasked(value, monkeypatch):
    monkeypatch.setattr(environment, "setting", {"FASTVQ_AUTOTUNE": value}.get)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert launch.autotuning(torch.device("cuda")) == (value == "1")
    assert not launch.autotuning(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not launch.autotuning(torch.device("cuda"))
