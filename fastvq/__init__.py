"""fastvq: exact, memory-lean vector quantization for PyTorch.

    x -- search --> indices -- lookup --> codes -- straight-through or rotation --> output
                       |                     '-- commitment and codebook losses --> scalar
                       '-- accumulate(x, indices) --> counts, sums -- ema_update_ --> codebook

Layers: `VectorQuantize`, `ResidualVQ`, `SimVQ`, `FSQ`, `LFQ` and the others of vector_quantize_pytorch, each by example
in docs/quantizers.md; `fastvq.parts` has what they are composed from. As functions: `quantize`, `residual_quantize`,
`search`, `topk_search`, `sample`, `residual_search`, `accumulate`, `ema_update_`, `min_distance_`; soft assignments:
`soft_assign`, `binary_assign`, `cross_entropy`, `soft_lookup`.
Health of a codebook: `usage`, `perplexity`, `dead_share`, and each quantizer's `health()`. Which code runs:
`use_backend`, and `fastvq info` on the command line.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .compat import aliases

__version__ = "0.1.0"

__all__ = [
    "FSP",
    "FSQ",
    "LFQ",
    "BinaryAssignment",
    "BinaryMapper",
    "EvoLFQ",
    "GroupedResidualFSQ",
    "GroupedResidualLFQ",
    "GroupedResidualVQ",
    "HealthReport",
    "HierarchicalVQ",
    "LatentQuantize",
    "Quantized",
    "RandomProjectionQuantizer",
    "Replacement",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualQuantized",
    "ResidualSimVQ",
    "ResidualVQ",
    "Sequential",
    "SimVQ",
    "SoftAssignment",
    "VectorQuantize",
    "accumulate",
    "binary_assign",
    "cross_entropy",
    "dead_share",
    "ema_update_",
    "mean_assignment_entropy",
    "min_distance_",
    "perplexity",
    "quantize",
    "residual_quantize",
    "residual_search",
    "sample",
    "search",
    "soft_assign",
    "soft_lookup",
    "topk_search",
    "usage",
    "use_backend",
]

aliases.install()

# Layers, and the modules of vector_quantize_pytorch, are imported when they are first used: about half the time that
# `import fastvq` would take. The functions, and with them the ops, are loaded at once, except in the process of the
# command line, which loads them when it runs a command: its help needs no torch. Type checkers see everything at its
# home, and no `__getattr__` that would hide typos.
if TYPE_CHECKING:
    from .functions import (
        BinaryAssignment,
        HealthReport,
        Quantized,
        Replacement,
        ResidualQuantized,
        SoftAssignment,
        accumulate,
        binary_assign,
        cross_entropy,
        dead_share,
        ema_update_,
        mean_assignment_entropy,
        min_distance_,
        perplexity,
        quantize,
        residual_quantize,
        residual_search,
        sample,
        search,
        soft_assign,
        soft_lookup,
        topk_search,
        usage,
        use_backend,
    )
    from .quantizers import (
        FSP,
        FSQ,
        LFQ,
        BinaryMapper,
        EvoLFQ,
        GroupedResidualFSQ,
        GroupedResidualLFQ,
        GroupedResidualVQ,
        HierarchicalVQ,
        LatentQuantize,
        RandomProjectionQuantizer,
        ResidualFSQ,
        ResidualLFQ,
        ResidualSimVQ,
        ResidualVQ,
        Sequential,
        SimVQ,
        VectorQuantize,
    )
else:
    _MODULES = {
        *("backends", "codebook", "distributed", "errors", "functional", "functions", "ops", "parts", "precision"),
        *("quantizers", *aliases.MODULES),
    }

    def _load_functions() -> None:
        functions = importlib.import_module(f"{__name__}.functions")
        globals().update({name: getattr(functions, name) for name in functions.__all__})

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _load_functions()
        if name not in globals():
            globals()[name] = getattr(importlib.import_module(f"{__name__}.quantizers"), name)
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_MODULES})

    if "fastvq_command" not in sys.modules:
        _load_functions()
