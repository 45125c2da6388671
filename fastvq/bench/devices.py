"""Data sheets of GPUs, and the load that a pass over the codes puts on each of their parts, for predictions."""

from __future__ import annotations

from typing import NamedTuple

from fastvq.errors import BenchError

LAUNCH_SECONDS = 3e-6
"""Time from one kernel to the next in a stream: an assumption."""


class Device(NamedTuple):
    """Data sheet of a GPU. Lane operations per second are `units * lanes * clock`."""

    target: str
    reported: str
    units: int
    lanes: int
    clock: float
    matrix: float
    memory: float
    cache: float
    float32: int = 128
    """Lanes of a unit that multiply and add float32 in one clock."""
    sync: float = 1.0
    """Share of `matrix` that mma.sync, the instruction of the CUDA kernels, reaches."""
    shared: int = 227 << 10
    """Bytes of shared memory available to a block."""

    @property
    def issue(self) -> float:
        """Lane operations per second."""
        return self.units * self.lanes * self.clock


SHARED_CLOCK = 128
"""Bytes that the shared memory of an SM moves per clock. CUDA C++ Programming Guide: 32 banks of 4 bytes."""

# Units and clocks are those of the SXM and OAM modules. `lanes` is the issue rate of a unit's schedulers: 4 warps
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
    # NVIDIA H200 data sheet: the processor of the H100 SXM5, and other memory.
    "h200": Device("sm_90", "H200", 132, 128, 1.755e9, 989.4e12, 4.8e12, 5120 * 1.755e9, sync=0.63),
    # NVIDIA Blackwell data sheet, dense; the clock is what gives its peak with 8192 multiply-adds a unit, 148 units.
    "b200": Device("sm_100", "B200", 148, 128, 1.856e9, 2250e12, 8e12, 2 * 5120 * 1.856e9, sync=0.315),
    # AMD CDNA 3 white paper; the cache is the Infinity Cache, for a codebook that outgrows an XCD's 4 MB.
    "mi300x": Device("gfx942", "MI300X", 304, 64, 2.1e9, 1307.4e12, 5.3e12, 17.2e12, float32=64),
}


def device_named(name: str) -> Device:
    """Return the data sheet of a device by its model name.

    Raises:
        BenchError: the model is unknown.
    """
    if name not in DEVICES:
        raise BenchError(f"model: must be one of {', '.join(DEVICES)}, got {name!r}")
    return DEVICES[name]


class Terms(NamedTuple):
    """Seconds that a pass over the codes needs of each part of a device."""

    matrix: float
    epilogue: float
    memory: float
    cache: float
    shared: float = 0.0
    """Only for the CUDA kernels."""

    @property
    def binding(self) -> str:
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def overlapped(self) -> float:
        return max(self)

    @property
    def serial(self) -> float:
        """Time if matrix units idle during the epilogue and vice versa."""
        return max(self.matrix + self.epilogue, self.memory, self.cache, self.shared)
