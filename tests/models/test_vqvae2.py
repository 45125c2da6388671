"""VQ-VAE-2: grids of indices in one sequence, the conditioning of fine on coarse, and any quantizers."""

from __future__ import annotations

import pytest
import torch

from fastvq import FSQ, GumbelQuantize, ResidualVQ, VectorQuantize
from fastvq.errors import ConfigError
from fastvq.modalities import ImageConfig
from fastvq.models import VQVAE, Decoder, Encoder, GridsBottleneck, NoBottleneck
from fastvq.training import build_model

from ..cases import generator

SMALL = {"width": 8, "residual_width": 4, "encoder_blocks": 1, "decoder_blocks": 1}


def make(*quantizers, grid=(4, 8), **options):
    torch.manual_seed(0)
    quantizers = quantizers or tuple(VectorQuantize(6, codebook_size=8) for _ in range(3))
    return GridsBottleneck(6, quantizers, grid, **SMALL | options)


def features(*grid, count=2):
    return torch.randn(count, 6, *grid, generator=generator())


@pytest.mark.parametrize(
    ("quantizers", "grid", "places"),
    [
        ([VectorQuantize] * 3, (4, 8), 2 + 8 + 32),
        ([VectorQuantize, ResidualVQ], (4, 4), 4 + 16 * 2),
        ([FSQ, VectorQuantize], (6,), 3 + 6),
        ([VectorQuantize, GumbelQuantize], (2, 2, 4), 2 + 16),
    ],
    ids=["three", "stages", "mixed", "3d"],
)
def test_indices_of_all_grids_decode_to_the_codes(quantizers, grid, places):
    arguments = {
        VectorQuantize: {"codebook_size": 8},
        ResidualVQ: {"codebook_size": 8, "num_quantizers": 2},
        FSQ: {"levels": [8]},
        GumbelQuantize: {"codebook_size": 8},
    }
    bottleneck = make(*(kind(dim=6, **arguments[kind]) for kind in quantizers), grid=grid).eval()
    x = features(*grid)
    codes, indices, loss = bottleneck(x)
    assert codes.shape == x.shape
    assert indices.shape == (2, places)
    assert loss.dim() == 0
    torch.testing.assert_close(bottleneck.get_output_from_indices(indices), codes)
    stages = bottleneck.adapter.stages(indices)
    assert torch.equal(torch.cat([stage.flatten(1) for stage in stages], 1).sort().values, indices.sort().values)
    assert [len(stage) for stage in stages] == [2] * len(bottleneck.adapter.stage_sizes())


def test_fine_indices_are_conditioned_on_coarse_ones_and_every_parameter_learns():
    bottleneck = make().train()
    x = features(4, 8).requires_grad_()
    codes, _, loss = bottleneck(x)
    (codes.square().mean() + loss).backward()
    assert all(p.grad is not None for p in bottleneck.parameters() if p.requires_grad)
    assert x.grad.abs().amax((0, 1)).min() > 0
    bottleneck.eval()
    before = bottleneck(x)[1]
    with torch.no_grad():
        bottleneck.quantizers[0].codebook.add_(100 * torch.randn(8, 6, generator=generator(1)))
    changed = bottleneck(x)[1]
    coarse = bottleneck.split(before)[0].flatten(1).shape[1]
    assert not torch.equal(before[:, coarse:], changed[:, coarse:])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_in_training_a_share_of_samples_is_decoded_from_coarse_grids_alone(share):
    bottleneck = make(coarse_share=share)
    above = []
    bottleneck.decoders[-1].register_forward_hook(lambda module, x, y: above.append(y))
    x = features(4, 8, count=40)
    codes, _, _ = bottleneck.train()(x)
    alone = (codes == above[-1]).flatten(1).all(1)
    assert alone.float().mean().item() == pytest.approx(share, abs=0.2 if share == 0.5 else 0)
    codes, _, _ = bottleneck.eval()(x)
    assert not (codes == above[-1]).flatten(1).all(1).any()


def test_each_codebook_learns_and_reports_its_health():
    bottleneck = make().train()
    before = [quantizer.codebook.clone() for quantizer in bottleneck.quantizers]
    for seed in range(3):
        bottleneck(torch.randn(4, 6, 4, 8, generator=generator(seed)))
    assert not any(torch.equal(a, b.codebook) for a, b in zip(before, bottleneck.quantizers, strict=True))
    assert bottleneck.health().perplexity.shape == (3,)
    assert [int(health.code_counts.sum()) for health in bottleneck.healths()] == [24, 96, 384]


def test_encoding_changes_nothing():
    model = VQVAE(Encoder(3, 6, width=8), make(), Decoder(6, 3, width=8)).train()
    x = torch.rand(2, 3, 16, 32, generator=generator())
    model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    indices = model.encode(x)
    assert model.training
    assert torch.equal(model.encode(x), indices)
    assert model.decode(indices).shape == x.shape
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make(VectorQuantize(6, codebook_size=8)), ValueError, "quantizers: must be at least 2"),
        (lambda: make(coarse_share=1.5), ValueError, r"coarse_share: must lie in \[0, 1\], got 1.5"),
        (lambda: make(grid=(4, 6)), ValueError, "grids: 3 need a finest grid whose sides are multiples of 4, got 4x6"),
        (lambda: make(NoBottleneck(), NoBottleneck()), TypeError, "quantizers: must have indices, got a NoBottleneck"),
        (
            lambda: make(VectorQuantize(6, codebook_size=8), VectorQuantize(6, codebook_size=9)),
            TypeError,
            "quantizers: must all have one codebook size, got 8, 9",
        ),
        (lambda: make()(features(4, 4)), ValueError, "x: must have the grid 4x8 .* got 4x4"),
        (
            lambda: make().get_output_from_indices(torch.zeros(1, 9, dtype=torch.int64)),
            ValueError,
            r"indices: must have shape \(B, 42\), got \(1, 9\): those of the grids 1x2, 2x4, 4x8",
        ),
        (lambda: ImageConfig(grids=4), ConfigError, "grids must be between 1 and 3, got 4"),
        (
            lambda: ImageConfig(grids=2),
            ConfigError,
            "grids must be 1 where the grid of features, 7x7, cannot be halved",
        ),
        (
            lambda: ImageConfig(data="x", image_size=32, grids=2, bottleneck="vae"),
            ConfigError,
            "grids must be 1 for the bottleneck vae, which has no indices, got 2",
        ),
        (
            lambda: build_model(
                ImageConfig(
                    data="x", image_size=32, grids=2, bottleneck="rvq", bottleneck_options={"codebook_sizes": [8, 4]}
                )
            ),
            ConfigError,
            "quantizers: must all have one codebook size, got 8, 4, 8, 4",
        ),
    ],
)
def test_refuses_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
