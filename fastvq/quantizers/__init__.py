"""Quantizer layers, one class per file."""

from __future__ import annotations

from .binary_mapper import BinaryMapper
from .evo_lfq import EvoLFQ
from .fsp import FSP
from .fsq import FSQ
from .grouped import GroupedResidualVQ
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
from .vector_quantize import VectorQuantize

__all__ = [
    "FSP",
    "FSQ",
    "IBQ",
    "IFSQ",
    "LFQ",
    "BinaryMapper",
    "EvoLFQ",
    "GroupedResidualFSQ",
    "GroupedResidualLFQ",
    "GroupedResidualVQ",
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
    "VectorQuantize",
]
