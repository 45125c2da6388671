"""The module paths of vector_quantize_pytorch, under fastvq: `from fastvq.residual_vq import ResidualVQ` works.

Each is a module in sys.modules that holds the very classes of fastvq, so that pickles and messages name their real
home. What vector_quantize_pytorch keeps for itself (`exists`, `pack_one`, `cdist`, `gumbel_sample` ...) isn't there: it
either stands for einops or builds the N x K matrix. Type checkers see `from fastvq import ...`, but not these paths.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types

HOME = "fastvq"
PEER = "vector_quantize_pytorch"

# NAME of fastvq itself, place:NAME of a module in it, place:NAME:THEIRS where that has another name.
MODULES = {
    "binary_mapper": "BinaryMapper",
    "evo_lookup_free_quantization": "EvoLFQ LFQ quantizers.evo_lfq:Return quantizers.evo_lfq:Result",
    "finite_scalar_perturbation": "FSP quantizers.fsp:VectorNorm quantizers.fsp:build_cdf_act",
    "finite_scalar_quantization": "FSQ quantizers.fsq:round_ste quantizers.fsq:floor_ste",
    "hierarchical_vq": "HierarchicalVQ VectorQuantize",
    "latent_quantization": "LatentQuantize",
    "lookup_free_quantization": (
        "LFQ parts.binary:CosineSimLinear quantizers.lfq:LFQLosses:LossBreakdown quantizers.lfq:Return "
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


def register(package: types.ModuleType) -> None:
    """Puts the modules of the table beside those of `package`, which is fastvq. Called once, at its import."""
    for name, contents in MODULES.items():
        full_name = f"{package.__name__}.{name}"
        module = types.ModuleType(full_name, f"vector_quantize_pytorch's `{name}`, as fastvq has it.")
        module.__spec__ = importlib.machinery.ModuleSpec(full_name, None, origin=__name__)
        module.__package__ = package.__name__
        for entry in contents.split():
            *place, attribute = entry.split(":")[:2]
            theirs = entry.rpartition(":")[2]
            home = importlib.import_module(".".join([package.__name__, *place]))
            setattr(module, theirs, getattr(home, attribute))
        sys.modules[full_name] = module
        setattr(package, name, module)


def stand_in(name: str = PEER) -> None:
    """Makes `import vector_quantize_pytorch`, and imports from its modules, mean fastvq in this process.

    For code that can't be edited: call it before that code is imported. Objects that were pickled whole under the other
    package can't be loaded so; their state dicts can.

    Raises:
        RuntimeError: the other package has been imported already.
    """
    package = sys.modules[HOME]
    if sys.modules.get(name, package) is not package:
        raise RuntimeError(f"{name}: must not be imported before fastvq stands in for it")
    sys.modules[name] = package
    for module in MODULES:
        sys.modules[f"{name}.{module}"] = sys.modules[f"{HOME}.{module}"]
