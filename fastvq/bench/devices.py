"""Data sheets of GPUs, and what a pass over the codes takes of each of their parts: for predictions, which measure
nothing."""

from __future__ import annotations

from typing import NamedTuple

from fastvq.errors import BenchError

LAUNCH_SECONDS = 3e-6
"""From one kernel to the next of a stream: an assumption."""


class Device(NamedTuple):
    """A data sheet. Lane operations a second are `units * lanes * clock`."""

    target: str
    reported: str
    units: int
    lanes: int
    clock: float
    matrix: float
    memory: float
    cache: float
    float32: int = 128
    """Lanes of a unit that multiply and add float32 in a clock."""
    sync: float = 1.0
    """Share of `matrix` that mma.sync reaches, the instruction of the CUDA kernels."""
    shared: int = 227 << 10
    """Bytes of shared memory that a block may have."""

    @property
    def issue(self) -> float:
        """Lane operations a second."""
        return self.units * self.lanes * self.clock


SHARED_CLOCK = 128
"""Bytes that the shared memory of an SM moves in a clock. CUDA C++ Programming Guide: 32 banks of 4 bytes."""

# Units and clocks are those of the SXM and OAM modules. `lanes` is what a unit's schedulers issue in a clock: 4 warps
# of 32, or 4 wavefronts of 64 every fourth clock. NVIDIA publishes the rate of the L2 cache for A100 alone, 5120
# bytes a clock; for H100 the same is assumed, for B200, which is two such dies, twice that. `float32`: CUDA C++
# Programming Guide, throughput of native arithmetic instructions; by the peak of its data sheet a B200 has no more of
# them where an instruction is two multiply-adds. `sync`: A100 has no other matrix instruction; for H100 it is what Luo
# et al. measure on average (arXiv 2501.12084: 62.9 %); for B200 the rate of H100 is assumed, a unit and clock.
DEVICES = {
    # NVIDIA A100 80GB data sheet and A100 architecture white paper.
    "a100": Device(
        "sm_80", "A100-SXM4-80GB", 108, 128, 1.41e9, 312e12, 2.039e12, 5120 * 1.41e9, float32=64, shared=163 << 10
    ),
    # NVIDIA H100 SXM5 data sheet, dense; H100 architecture white paper.
    "h100": Device("sm_90", "H100 80GB HBM3", 132, 128, 1.755e9, 989.4e12, 3.35e12, 5120 * 1.755e9, sync=0.63),
    # NVIDIA Blackwell data sheet, dense; the clock is what gives its peak with 8192 multiply-adds a unit, 148 units.
    "b200": Device("sm_100", "B200", 148, 128, 1.856e9, 2250e12, 8e12, 2 * 5120 * 1.856e9, sync=0.315),
    # AMD CDNA 3 white paper; the cache is the Infinity Cache, for a codebook that outgrows an XCD's 4 MB.
    "mi300x": Device("gfx942", "MI300X", 304, 64, 2.1e9, 1307.4e12, 5.3e12, 17.2e12, float32=64),
}


def device_named(name: str) -> Device:
    """The data sheet of a device of this model.

    Raises:
        BenchError: there is none.
    """
    if name not in DEVICES:
        raise BenchError(f"model: must be one of {', '.join(DEVICES)}, got {name!r}")
    return DEVICES[name]


class Terms(NamedTuple):
    """Seconds that each part of a device needs for a pass over the codes."""

    matrix: float
    epilogue: float
    memory: float
    cache: float
    shared: float = 0.0
    """Counted of the CUDA kernels alone."""

    @property
    def binding(self) -> str:
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def overlapped(self) -> float:
        return max(self)

    @property
    def serial(self) -> float:
        """If the matrix units stand still during the epilogue and the other way round."""
        return max(self.matrix + self.epilogue, self.memory, self.cache, self.shared)
