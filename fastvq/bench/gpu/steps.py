"""The steps of a run, the most important first, and the function of each."""

from __future__ import annotations

from collections.abc import Callable

from . import build, exactness, machine, prediction, suites, times, tuning
from .run import Step
from .step import Context

_ALL: tuple[tuple[Step, Callable[[Context], None]], ...] = (
    (Step("machine", "device, rates and versions", 12, 20), machine.describe),
    (Step("build", "package, CPU library, CUDA library", 60, 120), build.build),
    (Step("compile", "Triton's kernels, in several processes", 45), build.compile_kernels),
    (Step("exact-triton", "indices of Triton, adversarial set", 40), exactness.adversarial_triton),
    (Step("exact-cuda", "indices of the CUDA kernels, adversarial set", 20), exactness.adversarial_cuda),
    (Step("full-triton", "indices of Triton at full size", 25), exactness.full_triton),
    (Step("full-cuda", "indices of the CUDA kernels at full size", 20), exactness.full_cuda),
    (Step("tests", "pytest -m gpu", 70), suites.gpu_tests),
    (Step("times", "times beside other methods", 110), times.measure),
    (Step("autotune", "other launch configurations", 60), tuning.autotune),
    (Step("paths", "other CUDA kernels", 25), tuning.cuda_paths),
    (Step("prediction", "predictions beside measurements", 6, 10), prediction.compare),
    (Step("kernel-tests", "the kernels' other tests, on the device", 40), suites.kernel_tests),
)
STEPS = tuple(step for step, _ in _ALL)
FUNCTIONS = {step.name: function for step, function in _ALL}
