"""Options of `ResidualVQ` for codecs: gradients once, ranges of stages, other axes of indices, k-means by stage."""

from __future__ import annotations

import pytest
import torch

import fastvq

from ..cases import close, generator

DIM, STAGES = 6, 3


def stack(**options):
    torch.manual_seed(0)
    return fastvq.ResidualVQ(**{"dim": DIM, "num_quantizers": STAGES, "codebook_size": 12, **options})


def vectors(*shape, seed=1):
    return torch.randn(*(shape or (2, 10, DIM)), generator=generator(seed))


# `cross entropy` takes the path that runs the stages one after another.
PATHS = {
    "one pass": {},
    "by stage": {"commitment_use_cross_entropy_loss": True},
    "rotation": {"rotation_trick": True},
    "projections": {"codebook_dim": 4},
    "beams": {"beam_size": 2},
}


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
def test_the_gradient_of_the_output_passes_once(options):
    options = {"rotation_trick": False, "commitment_weight": 0.0, **options}
    g = vectors(seed=2)
    grads, results = [], []
    for gradient in ("stages", "once"):
        layer, x = stack(gradient=gradient, **options), vectors().requires_grad_()
        quantized, indices, losses = layer(x)
        (quantized * g).sum().backward()
        grads.append(x.grad)
        results.append((quantized, indices, losses))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    if options["rotation_trick"]:
        layer, x = stack(gradient="once", **options), vectors().requires_grad_()
        (fastvq.parts.rotate_to(x, results[0][0]) * g).sum().backward()
        close(grads[1], x.grad)
    else:
        close(grads[0], STAGES * grads[1], tolerance={"rtol": 1e-4, "atol": 1e-5})
    if not options["rotation_trick"] and "codebook_dim" not in options:
        close(grads[1], g)


def test_losses_of_all_stages_reach_the_input_beside_a_gradient_that_passes_once():
    grads = []
    for gradient in ("stages", "once"):
        layer, x = stack(gradient=gradient, rotation_trick=False), vectors().requires_grad_()
        layer(x)[2].sum().backward()
        grads.append(x.grad)
    close(grads[1], grads[0])


def test_masked_vectors_get_no_gradient_that_passes_once():
    layer, x = stack(gradient="once"), vectors().requires_grad_()
    layer(x, lens=torch.tensor([10, 4]))[0].sum().backward()
    assert not x.grad[1, 4:].any()
    assert x.grad[1, :4].all()


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
def test_later_stages_quantize_a_residual_as_within_the_stack(options):
    layer, x = stack(**options).eval(), vectors()
    if "codebook_dim" in options or "beam_size" in options:
        found = layer(x, start=1)[1]
    else:
        _, indices, _ = layer(x)
        rest = x - layer.get_output_from_indices(indices[..., :1])
        _, found, _ = layer(rest, start=1)
        assert torch.equal(found[..., 1:], indices[..., 1:])
    quantized, found, _ = layer(x, start=1, n_quantizers=2)
    assert (found[..., [0, 2]] == -1).all()
    assert (found[..., 1] >= 0).all()
    assert torch.equal(layer.encode(x, start=1, n_quantizers=2), found)
    close(layer.get_output_from_indices(found), quantized)
    full = layer.encode(x)
    close(
        layer.get_output_from_indices(full, start=1, n_quantizers=2),
        layer.get_output_from_indices(torch.where(torch.arange(STAGES) == 1, full, -1)),
    )


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
def test_stages_before_the_start_learn_nothing(options):
    layer = stack(**options)
    before = [stage.codebook.clone() for stage in layer.layers]
    layer(vectors(), start=1)[2].sum()
    assert [torch.equal(stage.codebook, b) for stage, b in zip(layer.layers, before, strict=True)] == [
        True,
        False,
        False,
    ]


def test_a_number_for_each_item_starts_at_a_stage():
    layer = stack().eval()
    found = layer(vectors(), start=1, n_quantizers=torch.tensor([2, 3]))[1]
    assert (found[:, :, 0] == -1).all()
    assert (found[:, :, 1] >= 0).all()
    assert (found[0, :, 2] == -1).all()
    assert (found[1, :, 2] >= 0).all()
    assert torch.equal(layer.encode(vectors(), start=1, n_quantizers=torch.tensor([2, 3])), found)


def test_dropout_leaves_stages_after_the_start():
    layer = stack(quantize_dropout=True)
    for _ in range(10):
        assert (layer(vectors(), start=1)[1][..., 1] >= 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 3}, r"start: must be an integer in \[0, 3\), got 3"),
        ({"start": 2, "n_quantizers": 2}, r"n_quantizers: must lie in \[3, 3\] beside start=2, got 2"),
        ({"codes_gradient": True}, "codes_gradient: must be False without return_all_codes"),
        ({"start": 1, "indices": torch.zeros(2, 10, 3, dtype=torch.int64)}, "start: must be 0 beside indices"),
    ],
)
def test_arguments_of_a_call_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stack()(vectors(), **options)


def test_stages_whose_codes_depend_on_earlier_ones_have_no_start():
    layer = stack(implicit_neural_codebook=True)
    for call in (layer, layer.encode):
        with pytest.raises(ValueError, match="start: must be 0 where codes depend on those of earlier stages, got 1"):
            call(vectors(), start=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "twice"}, "gradient: must be one of stages, once, got 'twice'"),
        ({"gradient": "once", "diveq": True, "threshold_ema_dead_code": 1}, "gradient: must be 'stages' beside diveq"),
        ({"stage_axis": 2}, "stage_axis: must be -1, 0 or 1, got 2"),
        ({"preselect": 4}, "preselect: must be None without implicit_neural_codebook=True, got 4"),
        ({"kmeans_one_stage": True}, "kmeans_one_stage: kmeans_init must be True"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stack(**options)


@pytest.mark.parametrize("axis", [0, 1])
@torch.no_grad()
def test_stages_stand_at_the_axis(axis):
    plain, moved = stack(channel_last=False).eval(), stack(channel_last=False, stage_axis=axis).eval()
    x = vectors(2, DIM, 10)
    quantized, indices, _, codes = plain(x, return_all_codes=True)
    found = moved(x, return_all_codes=True)
    assert torch.equal(found[1], indices.movedim(-1, axis))
    assert torch.equal(found[3], codes)
    assert torch.equal(moved.encode(x), found[1])
    assert torch.equal(moved.get_output_from_indices(found[1]), quantized)
    assert torch.equal(moved.get_codes_from_indices(found[1]), codes)
    assert torch.equal(moved(x, indices=found[1])[1], plain(x, indices=indices)[1])
    masked = moved(x, lens=torch.tensor([10, 4]))[1]
    assert torch.equal(masked, plain(x, lens=torch.tensor([10, 4]))[1].movedim(-1, axis))


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4}, {"implicit_neural_codebook": True}], ids=str)
def test_codes_may_have_the_gradient_of_their_stage(options):
    layer, x = stack(rotation_trick=False, **options), vectors().requires_grad_()
    asked = {"return_all_codes": True, "freeze_codebook": True}
    _, indices, _, codes = layer(x, codes_gradient=True, **asked)
    plain = layer(x, **asked)
    assert torch.equal(plain[1], indices)
    close(codes, plain[3])
    (grad,) = torch.autograd.grad(codes[0].sum(), x)
    assert grad.any()
    if not options:
        close(grad, torch.ones_like(grad))
    start = 0 if "implicit_neural_codebook" in options else 1
    codes = layer(x, start=start, n_quantizers=start + 1, codes_gradient=True, **asked)[3]
    assert [bool(one.any()) for one in codes] == [place == start for place in range(STAGES)]


def test_k_means_goes_one_stage_a_step():
    layer = stack(kmeans_init=True, kmeans_one_stage=True)
    for step in range(STAGES):
        x = vectors(4, 50, DIM, seed=step)
        quantized, indices, _ = layer(x)
        ready = [stage._codebook.ready() for stage in layer.layers]
        assert ready == [place <= step for place in range(STAGES)]
        assert [bool(stage.codebook.any()) for stage in layer.layers] == ready
        close(quantized, layer.get_output_from_indices(indices), tolerance={"rtol": 1, "atol": 5})
    before = [stage.codebook.clone() for stage in layer.layers]
    layer(vectors(4, 50, DIM, seed=9))
    assert not any(torch.equal(stage.codebook, b) for stage, b in zip(layer.layers, before, strict=True))


@pytest.mark.parametrize("beam_size", [None, 2])
def test_a_network_transforms_the_codes_with_the_nearest_guides(beam_size):
    options = {"implicit_neural_codebook": True, "beam_size": beam_size}
    everything, layer = stack(**options).eval(), stack(preselect=12, **options).eval()
    x = vectors()
    assert torch.equal(layer(x)[1], everything(x)[1])
    layer.preselect = 3
    _, indices, _ = layer(x)
    assert not torch.equal(indices, everything(x)[1])
    if beam_size is None:
        residual = (x - layer.get_output_from_indices(indices[..., :1])).flatten(0, 1)
        nearest = fastvq.topk_search(residual, layer.guides[0].detach(), 3)
        assert (nearest == indices[..., 1].flatten()[:, None]).any(1).all()
    assert torch.equal(layer.encode(x), indices)


def test_guides_learn_from_the_residuals_of_their_indices():
    layer = stack(implicit_neural_codebook=True, preselect=4)
    optimizer = torch.optim.Adam([*layer.guides], lr=0.05)
    x, errors = vectors(4, 50, DIM), []
    for _ in range(10):
        optimizer.zero_grad()
        losses = layer(x)[2]
        losses.sum().backward()
        optimizer.step()
        errors.append(losses.sum().item())
    assert errors[-1] < errors[0]
    assert all(guides.grad.any() for guides in layer.guides)


def test_k_means_sets_the_guides_too():
    layer = stack(implicit_neural_codebook=True, preselect=4, kmeans_init=True)
    layer(vectors(4, 30, DIM))
    for stage, guides in zip(layer.layers[1:], layer.guides, strict=True):
        assert len(guides.unique(dim=0)) == 12
        close(guides, stage.codebook)
    with pytest.raises(ValueError, match="preselect: must be None to change the number of codes"):
        layer.resize_(24)


def test_ranges_of_stages_to_decode_that_cannot_be():
    layer = stack().eval()
    indices = layer.encode(vectors())
    with pytest.raises(ValueError, match=r"n_quantizers: must lie in \[1, 2\], got 3"):
        layer.get_output_from_indices(indices[..., :2], n_quantizers=3)
    layer = stack(implicit_neural_codebook=True).eval()
    with pytest.raises(ValueError, match="start: must be 0 where codes depend on those of earlier stages, got 1"):
        layer.get_output_from_indices(indices, start=1)
