"""fastvq: exact, memory-lean vector quantization for PyTorch.

    x -- search --> indices -- lookup --> codes -- straight-through or rotation --> output
                       |                     '-- commitment and codebook losses --> scalar
                       '-- accumulate(x, indices) --> counts, sums -- ema_update_ --> codebook

Layers: `VectorQuantize`, `ResidualVQ`, `SimVQ`, `FSQ`, `LFQ` and the others of vector_quantize_pytorch, each by example
in docs/quantizers.md; `fastvq.parts` has what they are composed from. As functions: `quantize`, `residual_quantize`,
`search`, `topk_search`, `sample`, `residual_search`, `accumulate`, `ema_update_`, `min_distance_`; soft assignments:
`soft_assign`, `binary_assign`, `cross_entropy`, `soft_lookup`. `PackedCodebook` is a codebook for many small searches.
Health of a codebook: `usage`, `perplexity`, `dead_share`, and each quantizer's `health()`. Which code runs:
`use_backend`, and `fastvq info` on the command line. `load` returns the trained model of a run. `accelerate` replaces
the quantizers within models of other projects, `restore` undoes it.
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
    "IBQ",
    "IFSQ",
    "LFQ",
    "BinaryAssignment",
    "BinaryMapper",
    "EvoLFQ",
    "FactorizedResidualVQ",
    "FactorizedVQ",
    "GroupedResidualFSQ",
    "GroupedResidualLFQ",
    "GroupedResidualVQ",
    "GroupedSphericalVQ",
    "GumbelQuantize",
    "HealthReport",
    "HierarchicalVQ",
    "LatentQuantize",
    "LlamaGenVQ",
    "PackedCodebook",
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
    "SplitResidualVQ",
    "StochasticVQ",
    "StridedResidualVQ",
    "VectorQuantize",
    "accelerate",
    "accumulate",
    "binary_assign",
    "cross_entropy",
    "dead_share",
    "ema_update_",
    "load",
    "mean_assignment_entropy",
    "min_distance_",
    "perplexity",
    "quantize",
    "residual_quantize",
    "residual_search",
    "restore",
    "sample",
    "search",
    "soft_assign",
    "soft_lookup",
    "topk_search",
    "usage",
    "use_backend",
]

aliases.install()

# Layers, `load`, and the modules of vector_quantize_pytorch are imported when first used: the layers take about half
# of the time that `import fastvq` would take with them. The functions, and with them the ops, are loaded at once,
# except in the process of the command line, which loads them when it runs a command: its help needs no torch. Type
# checkers see everything at its home, and no `__getattr__` that would hide typos.
if TYPE_CHECKING:
    from .backends.select import use_backend
    from .clients import accelerate, restore
    from .codebook import Replacement
    from .codebook.health import HealthReport, dead_share, perplexity, usage
    from .functional.binary_assign import BinaryAssignment, binary_assign
    from .functional.quantize import Quantized, quantize
    from .functional.residual_quantize import ResidualQuantized, residual_quantize
    from .functional.soft_assign import SoftAssignment, cross_entropy, mean_assignment_entropy, soft_assign, soft_lookup
    from .ops.accumulate import accumulate
    from .ops.ema_update import ema_update_
    from .ops.min_distance import min_distance_
    from .ops.packed import PackedCodebook
    from .ops.residual_search import residual_search
    from .ops.sample import sample
    from .ops.search import search
    from .ops.topk_search import topk_search
    from .quantizers import (
        FSP,
        FSQ,
        IBQ,
        IFSQ,
        LFQ,
        BinaryMapper,
        EvoLFQ,
        FactorizedResidualVQ,
        FactorizedVQ,
        GroupedResidualFSQ,
        GroupedResidualLFQ,
        GroupedResidualVQ,
        GroupedSphericalVQ,
        GumbelQuantize,
        HierarchicalVQ,
        LatentQuantize,
        LlamaGenVQ,
        RandomProjectionQuantizer,
        ResidualFSQ,
        ResidualLFQ,
        ResidualSimVQ,
        ResidualVQ,
        Sequential,
        SimVQ,
        SplitResidualVQ,
        StochasticVQ,
        StridedResidualVQ,
        VectorQuantize,
    )
    from .runs.trained import load
else:
    _MODULES = {
        *(
            "backends",
            "clients",
            "codebook",
            "distributed",
            "errors",
            "functional",
            "ops",
            "parts",
            "precision",
            "quantizers",
        ),
        *aliases.MODULES,
    }
    _FUNCTIONS = {
        "backends.select": ("use_backend",),
        "codebook": ("Replacement",),
        "codebook.health": ("HealthReport", "dead_share", "perplexity", "usage"),
        "functional.binary_assign": ("BinaryAssignment", "binary_assign"),
        "functional.quantize": ("Quantized", "quantize"),
        "functional.residual_quantize": ("ResidualQuantized", "residual_quantize"),
        "functional.soft_assign": (
            *("SoftAssignment", "cross_entropy", "mean_assignment_entropy", "soft_assign", "soft_lookup"),
        ),
        "ops": (
            *("PackedCodebook", "accumulate", "ema_update_", "min_distance_", "residual_search", "sample", "search"),
            "topk_search",
        ),
    }
    _LATER = {"accelerate": "clients", "restore": "clients", "load": "runs.trained"}

    def _load_functions() -> None:
        for home, names in _FUNCTIONS.items():
            module = importlib.import_module(f"{__name__}.{home}")
            globals().update({name: getattr(module, name) for name in names})

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name not in _LATER:
            _load_functions()
        if name not in globals():
            home = _LATER.get(name, "quantizers")
            globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), name)
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_MODULES})

    def _is_command() -> bool:
        """Return whether this process is the command line: its console script, or `python -m fastvq`."""
        # Python imports the package before __main__ can say so; until then it leaves "-m" in place of the program.
        started = sys.argv[:1] == ["-m"] and any(part == "fastvq" or part.endswith("mfastvq") for part in sys.orig_argv)
        return started or "fastvq_command" in sys.modules

    if not _is_command():
        _load_functions()
