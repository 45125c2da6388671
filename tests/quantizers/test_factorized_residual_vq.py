"""DAC's, SNAC's and Mimi's quantizers against their formulas, dense and in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import fastvq

from ..cases import close, generator

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def vectors(*shape, seed=1):
    return torch.randn(*(shape or (2, 12, 6)), generator=generator(seed))


def dense(stage, x, counted):
    """(output, index, loss) of a stage as DAC computes them, for x (B, N, dim) in float64."""
    z = F.linear(x, stage.project_in.weight, stage.project_in.bias)
    codes = stage.embed
    index = torch.cdist(F.normalize(z, dim=-1), F.normalize(codes, dim=-1)[None]).argmin(-1)
    chosen = codes[index]
    errors = [(z - chosen.detach()).square().mean(-1), (chosen - z.detach()).square().mean(-1)]
    loss = sum(w * (e * counted).sum() / counted.sum() for w, e in zip((0.25, 1.0), errors, strict=True))
    out = F.linear(z + (chosen - z).detach(), stage.project_out.weight, stage.project_out.bias)
    return out, index, loss


def test_results_and_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    layer = fastvq.FactorizedResidualVQ(6, 12, 3, (4, 3, 5))
    theirs = copy.deepcopy(layer)
    for parameter in theirs.parameters():
        parameter.data = parameter.data.double()
    x, weights = vectors().requires_grad_(), vectors(seed=2)
    numbers = torch.tensor([2, 3])
    quantized, indices, losses = layer(x, n_quantizers=numbers)
    ((quantized * weights).sum() + losses.sum()).backward()

    own = x.detach().double().requires_grad_()
    residual, total, expected = own, 0, []
    for place, stage in enumerate(theirs.layers):
        counted = (numbers > place).double()[:, None].expand(2, 12)
        out, index, loss = dense(stage, residual, counted)
        assert torch.equal(indices[..., place], torch.where(counted > 0, index, -1))
        residual, total = residual - out * counted[..., None], total + out * counted[..., None]
        expected.append(loss)
    ((total * weights).sum() + sum(expected)).backward()
    close(quantized.double(), total, tolerance=TOLERANCE)
    close(losses.double(), torch.stack(expected), tolerance=TOLERANCE)
    close(x.grad.double(), own.grad, tolerance=TOLERANCE)
    for one, other in zip(layer.parameters(), theirs.parameters(), strict=True):
        close(one.grad.double(), other.grad, tolerance=TOLERANCE)


def test_one_stage_is_the_layer_itself():
    torch.manual_seed(0)
    stack = fastvq.FactorizedResidualVQ(6, 12, 1, 4)
    x = vectors()
    for training in (True, False):
        quantized, indices, losses = stack.train(training)(x)
        alone = stack.layers[0](x)
        close(quantized, alone[0], tolerance=TOLERANCE)
        assert torch.equal(indices[..., 0], alone[1])
        close(losses[0], alone[2])


@pytest.mark.parametrize("options", [{}, {"n_quantizers": 2}, {"n_quantizers": torch.tensor([1, 3])}], ids=str)
@torch.no_grad()
def test_eval_has_the_indices_of_training_and_decodes_to_its_output(options):
    torch.manual_seed(0)
    layer = fastvq.FactorizedResidualVQ(6, 12, 3, 4, channel_first=True, stage_axis=1)
    x = vectors(2, 6, 3, 4)
    trained = layer(x, **options)
    quantized, indices, losses = layer.eval()(x, **options)
    assert torch.equal(indices, trained[1])
    assert indices.shape == (2, 3, 3, 4)
    close(quantized, trained[0], tolerance=TOLERANCE)
    assert not losses.any()
    assert torch.equal(layer.encode(x, **options), indices)
    close(layer.get_output_from_indices(indices), quantized, tolerance=TOLERANCE)
    layer.reset_health()
    with layer.measuring():
        layer(x, **options)
    assert layer.code_counts.sum() == (indices >= 0).sum()


@torch.no_grad()
def test_strides_average_and_repeat():
    torch.manual_seed(0)
    layer = fastvq.StridedResidualVQ(6, 12, (4, 2, 1), 4)
    x, mask = vectors(), torch.ones(2, 12, dtype=torch.bool)
    mask[1, 6:] = False
    for options, here in (({}, torch.ones_like(mask)), ({"mask": mask}, mask), ({"lens": torch.tensor([12, 6])}, mask)):
        trained = layer.train()(x, **options)
        quantized, indices, _ = layer.eval()(x, **options)
        assert [one.shape for one in indices] == [(2, 3), (2, 6), (2, 12)]
        residual = x
        for stage, stride, found, other in zip(layer.layers, layer.strides, indices, trained[1], strict=True):
            cells = (residual * here[..., None]).unflatten(1, (-1, stride)).sum(2)
            number = here.unflatten(1, (-1, stride)).sum(2)
            _, expected, _ = stage(cells / number.clamp_min(1)[..., None], mask=number > 0)
            assert torch.equal(found, expected)
            assert torch.equal(other, expected)
            residual = residual - stage.indices_to_codes(found).repeat_interleave(stride, 1)
        close(quantized, (x - residual) * here[..., None], tolerance=TOLERANCE)
        close(quantized, trained[0], tolerance=TOLERANCE)
        assert all(map(torch.equal, layer.encode(x, **options), indices))
    indices = layer(x)[1]
    close(layer.get_output_from_indices(indices), layer(x)[0], tolerance=TOLERANCE)
    close(layer.get_output_from_indices(indices[:2]), layer(x, n_quantizers=2)[0], tolerance=TOLERANCE)


def test_strided_stages_learn_from_all_their_gradients():
    torch.manual_seed(0)
    layer, x = fastvq.StridedResidualVQ(6, 12, (2, 1), 4, channel_first=True), vectors(2, 6, 12).requires_grad_()
    quantized, _, losses = layer(x)
    (quantized.square().mean() + losses.sum()).backward()
    assert x.grad.any()
    assert all(p.grad.any() for p in layer.parameters())


@torch.no_grad()
def test_semantic_stages_stand_beside_the_acoustic_ones():
    torch.manual_seed(0)
    layer = fastvq.SplitResidualVQ(dim=6, codebook_size=12, num_quantizers=4, num_semantic=2, codebook_dim=4).eval()
    x, lens = vectors(), torch.tensor([12, 5])
    quantized, indices, losses = layer(x, lens=lens)
    parts = layer.semantic(x, lens=lens), layer.acoustic(x, lens=lens)
    close(quantized, parts[0][0] + parts[1][0])
    assert torch.equal(indices, torch.cat([parts[0][1], parts[1][1]], -1))
    assert losses.shape == (4,)
    assert torch.equal(layer.encode(x, lens=lens), indices)
    close(layer.get_output_from_indices(indices), quantized, tolerance=TOLERANCE)
    close(layer.get_output_from_indices(indices[..., :2]), parts[0][0], tolerance=TOLERANCE)
    fitted = layer.fit([x], iterations=3)
    assert len(fitted) == 4
    assert fitted[1].errors[-1] < fitted[0].errors[-1]
    coarse = layer(x, n_quantizers=3)
    assert (coarse[1][..., 3] == -1).all()
    close(layer.get_output_from_indices(coarse[1][..., :3]), coarse[0], tolerance=TOLERANCE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fastvq.FactorizedResidualVQ(6, 12, 3, (4, 4)), "codebook_dim: must be one number, or 3, got"),
        (lambda: fastvq.FactorizedVQ(6, 12, 4, commitment_weight=-1.0), "commitment_weight: must not be negative"),
        (lambda: fastvq.StridedResidualVQ(6, 12, ()), "strides: must be a sequence with a number for each"),
        (lambda: fastvq.StridedResidualVQ(6, 12, 2), "strides: must be a sequence with a number for each stage, got 2"),
        (lambda: fastvq.StridedResidualVQ(6, 12, (0, 1)), "strides: must be"),
        (
            lambda: fastvq.StridedResidualVQ(6, 12, (1,)).get_output_from_indices([torch.zeros(3).long()]),
            r"indices: must be \(B, T / stride\) for each stage, got \[\(3,\)\]",
        ),
        (lambda: fastvq.StridedResidualVQ(6, 12, (2, 1))(vectors(1, 5, 6)), r"that the strides \(2, 1\) divide, got 5"),
        (
            lambda: fastvq.StridedResidualVQ(6, 12, (2, 1)).get_output_from_indices(torch.zeros(2, 1, 3).long()),
            r"indices: must be of sequences of one length, got lengths \[3, 6\]",
        ),
        (lambda: fastvq.SplitResidualVQ(dim=6, codebook_size=8, num_semantic=8), r"num_semantic: must lie in \[1, 8\)"),
    ],
)
def test_what_cannot_be_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_stages_with_strides_name_what_does_not_fit():
    layer = fastvq.StridedResidualVQ(6, 8, (2, 1), 2, channel_first=True)
    with pytest.raises(ValueError, match=r"^indices: must be of one batch size, got \[2, 3\]"):
        layer.get_output_from_indices([torch.zeros(2, 2, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)])
    message = r"^x: must have shape \(B, dim, N\) with dim=6, got \(2, 6, 4, 4\)$"
    with pytest.raises(ValueError, match=message):  # no option accepts images
        layer(torch.randn(2, 6, 4, 4))


def test_a_vector_whose_latents_overflow_puts_out_zeros():
    layer, x = fastvq.FactorizedVQ(6, 12, 4), vectors(1, 5, 6)
    layer.project_in.weight.data.fill_(2)
    x[0, 2] = 3e38
    quantized, indices, _ = layer(x)
    assert indices[0, 2] == -1
    assert not quantized[0, 2].any()
