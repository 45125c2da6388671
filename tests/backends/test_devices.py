"""Devices that torch cannot use here, or that have no float64: one clear line each."""

from __future__ import annotations

import pytest
import torch

from fastvq import precision
from fastvq.backends import devices, select
from fastvq.errors import BackendError

MPS = torch.device("mps")


@pytest.mark.parametrize("name", ["warp", "mps", "xpu", "meta", "hpu", "", "cuda:99"])
def test_an_unusable_device_is_one_line(name):
    with pytest.raises(ValueError, match=rf"^device: '{name}' cannot be used here: .*; cpu works everywhere$") as found:
        devices.usable_device(name)
    assert len(str(found.value)) < 300
    assert "\n" not in str(found.value)


def test_usable_devices():
    assert devices.usable_device("cpu") == torch.device("cpu")
    assert precision.widest_dtype(torch.device("cpu")) == torch.float64


def test_an_mps_device_that_is_there(monkeypatch):
    """On Apple's machines it can be used, but not by what needs float64."""
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(()).as_subclass(OnMps))
    with pytest.raises(ValueError, match=r"cannot be used here: mps has no float64, which defines the exact code; cpu"):
        devices.usable_device("mps")
    assert precision.widest_dtype(MPS) == torch.float32


class OnMps(torch.Tensor):
    device = MPS


@pytest.mark.parametrize(("has", "served"), [(True, "torch"), (False, None)])
def test_another_device_is_asked_for_its_float64(has, served, monkeypatch):
    """As of Intel's GPUs, some of which have none."""
    monkeypatch.setattr(devices, "_computes_float64", lambda kind: has)
    if served:
        assert select.choose("search", torch.device("xpu")) == served
        return
    for op in ("search", "accumulate", "soft_assign_forward"):
        with pytest.raises(BackendError, match=rf"^no backend can serve {op} on xpu: .*torch: xpu has no float64") as e:
            select.choose(op, torch.device("xpu"))
        assert str(e.value).endswith("; on the CPU every op is served: x.cpu()")
        assert len(str(e.value).splitlines()) == 1


def test_the_question_is_put_to_the_device(monkeypatch):
    devices._computes_float64.cache_clear()
    assert not devices.has_float64("xpu") or torch.xpu.is_available()
    devices._computes_float64.cache_clear()
