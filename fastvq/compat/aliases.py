"""Module paths of vector_quantize_pytorch under fastvq: `from fastvq.residual_vq import ResidualVQ` works.

Each path is a module that is made when it is first imported and holds the very classes of fastvq, so that pickles and
messages name their real home. Private helpers of vector_quantize_pytorch (`exists`, `pack_one`, `cdist`,
`gumbel_sample` ...) are not there: they replace einops or build the N x K matrix. Type checkers see
`from fastvq import ...`, but not these paths.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

HOME = "fastvq"
PEER = "vector_quantize_pytorch"

# Entries are NAME for fastvq.NAME, MODULE:NAME for fastvq.MODULE.NAME, and MODULE:NAME:THEIRS if the names differ.
MODULES = {
    "binary_mapper": "BinaryMapper",
    "evo_lookup_free_quantization": "EvoLFQ LFQ quantizers.evo_lfq:EvoLFQOutput:Return quantizers.evo_lfq:Result",
    "finite_scalar_perturbation": "FSP quantizers.fsp:VectorNorm quantizers.fsp:build_cdf_act",
    "finite_scalar_quantization": "FSQ quantizers.fsq:round_ste quantizers.fsq:floor_ste",
    "hierarchical_vq": "HierarchicalVQ VectorQuantize",
    "latent_quantization": "LatentQuantize",
    "lookup_free_quantization": (
        "LFQ parts.binary:CosineSimLinear quantizers.lfq:LFQLosses:LossBreakdown quantizers.lfq:LFQOutput:Return "
        "distributed:active:is_distributed distributed:mean:maybe_distributed_mean"
    ),
    "random_projection_quantizer": "RandomProjectionQuantizer VectorQuantize",
    "residual_fsq": "ResidualFSQ GroupedResidualFSQ FSQ",
    "residual_lfq": "ResidualLFQ GroupedResidualLFQ LFQ",
    "residual_sim_vq": "ResidualSimVQ SimVQ",
    "residual_vq": "ResidualVQ GroupedResidualVQ VectorQuantize parts.tables:NeuralCodes:MLP",
    "sim_vq": "SimVQ parts.gradients:rotate_to",
    "utils": (
        "Sequential quantizers.sequential:QUANTIZE_KLASSES VectorQuantize ResidualVQ GroupedResidualVQ "
        "RandomProjectionQuantizer FSQ FSP LFQ ResidualLFQ GroupedResidualLFQ ResidualFSQ GroupedResidualFSQ "
        "LatentQuantize SimVQ ResidualSimVQ HierarchicalVQ"
    ),
    "vector_quantize_pytorch": (
        "VectorQuantize quantizers.vector_quantize:VectorQuantizeLosses:LossBreakdown codebook:Codebook "
        "parts.gradients:rotate_to parts.gradients:straight_through parts.gradients:directional_reparam "
        "parts.losses:orthogonality:orthogonal_loss_fn distributed:active:is_distributed"
    ),
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finder and loader of the modules in `MODULES`, which imports the homes of their contents on demand."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != HOME or name not in MODULES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=__name__)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        name = spec.name.rpartition(".")[2]
        return types.ModuleType(spec.name, f"vector_quantize_pytorch's `{name}`, with the classes of fastvq.")

    def exec_module(self, module: types.ModuleType) -> None:
        for entry in MODULES[module.__name__.rpartition(".")[2]].split():
            *place, attribute = entry.split(":")[:2]
            theirs = entry.rpartition(":")[2]
            home = importlib.import_module(".".join([HOME, *place]))
            setattr(module, theirs, getattr(home, attribute))


def install() -> None:
    """Make the modules in `MODULES` importable. Called once, when fastvq is imported."""
    # Last, so that a module of fastvq itself would come first.
    sys.meta_path.append(_Finder())


def stand_in(name: str = PEER) -> None:
    """Make `import vector_quantize_pytorch`, and imports from its modules, mean fastvq in this process.

    For code that cannot be edited: call it before that code is imported. Objects that were pickled whole under the
    other package cannot be loaded this way; their state dicts can.

    Raises:
        RuntimeError: the other package has already been imported.
    """
    package = sys.modules[HOME]
    if sys.modules.get(name, package) is not package:
        raise RuntimeError(f"{name}: must not be imported before fastvq stands in for it")
    sys.modules[name] = package
    for module in MODULES:
        sys.modules[f"{name}.{module}"] = importlib.import_module(f"{HOME}.{module}")
