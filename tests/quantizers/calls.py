"""Types of calls of the layers, as a type checker sees them: mypy checks this file, nothing runs it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import assert_type

import fastvq
from fastvq.quantizers.evo_lfq import EvoLFQOutput
from fastvq.quantizers.lfq import LFQLosses, LFQOutput
from fastvq.quantizers.vector_quantize import VectorQuantizeLosses


def calls(x: Tensor, mask: Tensor, flag: bool) -> None:
    vq = fastvq.VectorQuantize(8, 16)
    assert_type(vq(x), tuple[Tensor, Tensor, Tensor])
    assert_type(vq(x, mask=mask, freeze_codebook=flag), tuple[Tensor, Tensor, Tensor])
    assert_type(vq(x, return_loss_breakdown=True), tuple[Tensor, Tensor, Tensor, VectorQuantizeLosses])
    assert_type(vq(x, indices=x), tuple[Tensor, Tensor])
    assert_type(vq(x, return_loss_breakdown=flag), tuple[Any, ...])

    rvq = fastvq.ResidualVQ(dim=8, num_quantizers=2, codebook_size=16)
    assert_type(rvq(x), tuple[Tensor, Tensor, Tensor])
    assert_type(rvq(x, mask), tuple[Tensor, Tensor, Tensor])
    assert_type(rvq(x, return_all_codes=True), tuple[Tensor, Tensor, Tensor, Tensor])
    assert_type(rvq(x, indices=x), tuple[Tensor, Tensor])
    assert_type(rvq(x, return_all_codes=flag), tuple[Tensor, ...])
    grouped = fastvq.GroupedResidualVQ(dim=8, groups=2, num_quantizers=2, codebook_size=16)
    assert_type(grouped(x), tuple[Tensor, Tensor, Tensor])
    assert_type(grouped(x, return_all_codes=True), tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]])

    assert_type(fastvq.SimVQ(8, 16)(x), tuple[Tensor, Tensor, Tensor])
    assert_type(fastvq.ResidualSimVQ(dim=8, num_quantizers=2, codebook_size=16)(x), tuple[Tensor, Tensor, Tensor])
    assert_type(fastvq.LatentQuantize([4, 4], 2)(x), tuple[Tensor, Tensor, Tensor])
    assert_type(fastvq.RandomProjectionQuantizer(dim=8, codebook_size=16, codebook_dim=4)(x), Tensor)
    assert_type(fastvq.HierarchicalVQ(dim=8, codebook_size=16, scales=(1, 2))(x)[0], Tensor)

    fsq = fastvq.FSQ([4, 4])
    assert_type(fsq(x), tuple[Tensor, Tensor | Any])
    assert_type(fastvq.FSP([4, 4])(x)[:3], tuple[Tensor, Tensor, Tensor])
    assert_type(fastvq.ResidualFSQ(dim=2, levels=[4, 4], num_quantizers=2)(x), tuple[Tensor, Tensor])
    assert_type(fastvq.GroupedResidualFSQ(dim=4, groups=2, levels=[4, 4], num_quantizers=2)(x), tuple[Tensor, Tensor])

    lfq = fastvq.LFQ(dim=4)
    assert_type(lfq(x), LFQOutput)
    assert_type(lfq(x, return_loss_breakdown=True), tuple[LFQOutput, LFQLosses])
    assert_type(fastvq.ResidualLFQ(dim=4, num_quantizers=2, codebook_size=16)(x), tuple[Tensor, Tensor, Tensor])
    grouped_lfq = fastvq.GroupedResidualLFQ(dim=8, groups=2, num_quantizers=2, codebook_size=16)
    assert_type(grouped_lfq(x), tuple[Tensor, Tensor, Tensor])
    assert_type(fastvq.BinaryMapper(4)(x), tuple[Tensor, Tensor])
    assert_type(fastvq.BinaryMapper(4)(x, return_indices=True), tuple[Tensor, Tensor, Tensor])
    evo = fastvq.EvoLFQ(fsq, fsq, dim=4)
    assert_type(evo(x), EvoLFQOutput)
    assert_type(fastvq.Sequential(vq)(x), tuple[Any, ...])

    # Misspelled arguments of the layers of one result are errors; mypy warns where such an ignore is unused.
    fsq(x, maks=mask)  # type: ignore[call-arg]
