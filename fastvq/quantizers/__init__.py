"""Quantizer layers, one class per file."""

from __future__ import annotations

from .binary_mapper import BinaryMapper
from .evo_lfq import EvoLFQ
from .factorized_residual_vq import FactorizedResidualVQ
from .factorized_vq import FactorizedVQ
from .fsp import FSP
from .fsq import FSQ
from .grouped import GroupedResidualVQ
from .grouped_spherical_vq import GroupedSphericalVQ
from .gumbel import GumbelQuantize
from .hierarchical_vq import HierarchicalVQ
from .ibq import IBQ
from .ifsq import IFSQ
from .latent_quantize import LatentQuantize
from .lfq import LFQ
from .llamagen_vq import LlamaGenVQ
from .random_projection import RandomProjectionQuantizer
from .residual_fsq import GroupedResidualFSQ, ResidualFSQ
from .residual_lfq import GroupedResidualLFQ, ResidualLFQ
from .residual_sim_vq import ResidualSimVQ
from .residual_vq import ResidualVQ
from .sequential import Sequential
from .sim_vq import SimVQ
from .split_residual_vq import SplitResidualVQ
from .stochastic_vq import StochasticVQ
from .strided_residual_vq import StridedResidualVQ
from .vector_quantize import VectorQuantize

__all__ = [
    "FSP",
    "FSQ",
    "IBQ",
    "IFSQ",
    "LFQ",
    "BinaryMapper",
    "EvoLFQ",
    "FactorizedResidualVQ",
    "FactorizedVQ",
    "GroupedResidualFSQ",
    "GroupedResidualLFQ",
    "GroupedResidualVQ",
    "GroupedSphericalVQ",
    "GumbelQuantize",
    "HierarchicalVQ",
    "LatentQuantize",
    "LlamaGenVQ",
    "RandomProjectionQuantizer",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualSimVQ",
    "ResidualVQ",
    "Sequential",
    "SimVQ",
    "SplitResidualVQ",
    "StochasticVQ",
    "StridedResidualVQ",
    "VectorQuantize",
]
