"""Codebooks that hold NaN or infinity: named, reported, and never silent where no code is left."""

from __future__ import annotations

import warnings

import pytest
import torch

import fastvq
from fastvq.codebook.kmeans import kmeans
from fastvq.errors import CodebookError

LAYERS = {
    "plain": lambda: fastvq.VectorQuantize(4, 8),
    "cosine": lambda: fastvq.VectorQuantize(4, 8, use_cosine_sim=True),
    "learnable": lambda: fastvq.VectorQuantize(4, 8, learnable_codebook=True, ema_update=False),
    "projected": lambda: fastvq.VectorQuantize(4, 8, codebook_dim=2),
    "rotation": lambda: fastvq.VectorQuantize(4, 8, rotation_trick=True),
    "heads": lambda: fastvq.VectorQuantize(4, 8, heads=2, separate_codebook_per_head=True, codebook_dim=2),
    "directional": lambda: fastvq.VectorQuantize(4, 8, directional_reparam=True, threshold_ema_dead_code=1),
    "residual": lambda: fastvq.ResidualVQ(dim=4, codebook_size=8, num_quantizers=2),
    "grouped": lambda: fastvq.GroupedResidualVQ(dim=4, groups=2, codebook_size=8, num_quantizers=2),
    "sim": lambda: fastvq.SimVQ(4, 8),
    "gumbel": lambda: fastvq.GumbelQuantize(4, 8),
    "gumbel of distances": lambda: fastvq.GumbelQuantize(4, 8, logits="distance"),
}


def spoil(layer, share):
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if name.endswith(("embed", "codebook")):
                tensor[..., : round(share * tensor.shape[-2]), 0] = torch.nan


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_without_a_finite_code_a_layer_says_so(kind, training):
    layer = LAYERS[kind]().train(training)
    spoil(layer, 1)
    with pytest.raises(CodebookError, match=r"^codebook.*: none of its 8 codes is finite"):
        layer(torch.randn(2, 5, 4))
    if isinstance(layer, fastvq.VectorQuantize | fastvq.ResidualVQ):
        with pytest.raises(CodebookError, match=r"^codebook.*: none of its 8 codes is finite"):
            layer.encode(torch.randn(2, 5, 4))
    assert (layer.health().non_finite == 1).all()


@pytest.mark.parametrize("kind", LAYERS)
def test_health_reports_the_share_of_codes_that_are_not_finite(kind):
    layer = LAYERS[kind]()
    assert (layer.health().non_finite == 0).all()
    layer(torch.randn(2, 5, 4))
    spoil(layer, 0.25)
    report = layer.health()
    assert report.non_finite.shape == report.usage.shape
    assert (report.non_finite == 0.25).all()


def test_averages_count_too():
    layer = fastvq.VectorQuantize(4, 8)
    layer._codebook.embed_avg[0, 1, 2] = torch.inf
    layer._codebook.cluster_size[0, 5] = torch.nan
    assert layer.health().non_finite == 0.25


def test_a_quantizer_without_codebook():
    assert fastvq.FSQ([8, 5]).health().non_finite == 0
    assert fastvq.LFQ(codebook_size=16, dim=4).health().non_finite == 0


@pytest.mark.parametrize("excluded", ["mask", "non-finite rows", "no rows"])
def test_excluded_rows_are_no_fault_of_the_codebook(excluded):
    layer = fastvq.VectorQuantize(4, 8)
    x, mask = torch.randn(1, 5, 4), None
    if excluded == "mask":
        mask = torch.zeros(1, 5, dtype=torch.bool)
    else:
        x = torch.full_like(x, torch.nan) if excluded == "non-finite rows" else x[:, :0]
    _, indices, loss = layer(x, mask=mask)
    assert (indices == -1).all()
    assert loss == 0
    spoil(layer, 1)
    with pytest.raises(CodebookError) if excluded != "no rows" else warnings.catch_warnings():
        layer(x, mask=mask)


def test_functions():
    x, codes = torch.randn(5, 4), torch.full((3, 4), torch.nan)
    assert (fastvq.search(x, codes) == -1).all(), "the specification of a search"
    for run in (lambda: fastvq.quantize(x, codes), lambda: fastvq.quantize(x.requires_grad_(), codes)):
        with pytest.raises(CodebookError, match=r"^codebook: none of its 3 codes"):
            run()
    with pytest.raises(CodebookError, match=r"^codebooks\[1\]: none of its 3 codes"):
        fastvq.residual_quantize(x, torch.stack([torch.randn(3, 4), codes]))
    assert fastvq.quantize(x, torch.cat([codes, x[:1].detach()])).indices.eq(3).all()


def test_compiled_and_mapped_layers_are_not_read():
    layer = fastvq.VectorQuantize(4, 8).eval()
    spoil(layer, 1)
    x = torch.randn(2, 5, 4)
    indices = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[1]
    assert (indices == -1).all()
    codes = torch.randn(8, 4)
    assert torch.func.vmap(lambda one: fastvq.quantize(one, codes).indices)(x).shape == (2, 5)


@pytest.mark.parametrize(("share", "count"), [(0.5, 4), (1, 8)])
def test_loading_warns(share, count):
    layer, fresh = fastvq.VectorQuantize(4, 8), fastvq.VectorQuantize(4, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.load_state_dict(layer.state_dict())
    spoil(layer, share)
    with pytest.warns(UserWarning, match=rf"^_codebook.embed: {count} of 8 loaded codes are not finite"):
        fresh.load_state_dict(layer.state_dict())


def test_kmeans_of_giant_rows_keeps_finite_codes():
    """The sum of a cluster overflows float32, though no row does."""
    x = torch.full((64, 4), 3e38)
    means, _ = kmeans(x, 2, iterations=3, mask=torch.ones(64, dtype=torch.bool))
    assert means.isfinite().all()
