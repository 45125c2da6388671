"""Extreme magnitudes in every op: what the reference holds in float32 is held by every backend."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastvq
from fastvq.backends import reference, select
from fastvq.functional.quantize import quantize
from fastvq.parts import directional_reparam

from .. import cases
from ..cases import ADVERSARIAL, generator
from ..every import batch_for, make

EXTREME = (
    "values_of_1e18",
    "values_of_1e38",
    "largest_vectors",
    "opposite_extremes",
    "huge_vectors_tiny_codes",
    "tiny_vectors_huge_codes",
    "one_giant_code",
    "one_giant_row",
    "values_of_1e_38",
    "denormals",
)
SHAPES = [(41, 7, 5), (70, 30, 16)]
BACKENDS = ("native", "torch")


def calls(x, codes, g):
    """Yield (op, arguments, options) on this data."""
    (n, dim), size = x.shape, len(codes)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    indices = reference.search(x, codes)
    chosen = codes[indices.clamp_min(0)].masked_fill((indices < 0)[:, None], 0)
    yield "quantize_forward", (x, codes, indices, True), {}
    for gradient, weight in itertools.product(("ste", "rotation"), (0.0, 0.25)):
        options = {"gradient": gradient, "commitment_weight": weight}
        yield "quantize_backward", (x, chosen, indices, normal(n, dim), torch.ones(())), options
        stages, stage_indices = torch.stack([codes, -codes]), torch.stack([indices, indices.flip(0)], 1)
        yield "residual_quantize_backward", (x, stages, stage_indices, normal(n, dim), torch.ones(2)), options
    yield "residual_quantize_forward", (x, stages, stage_indices, True), {}
    yield "accumulate", (x, indices, size), {}
    yield "min_distance_", (torch.full((n,), torch.inf), x, codes), {}
    state = (codes.clone(), torch.rand(size, generator=g) + 0.5, codes.clone())
    for decay in (0.0, 0.3, 0.8, 1.0):
        new = (torch.rand(size, generator=g), -codes)
        yield "ema_update_", (*state, *new), {"decay": decay, "eps": 1e-5}
        yield "ema_update_", (*state, *new), {"decay": decay, "eps": 1e-5, "weight": torch.rand(size, generator=g)}
    for metric in ("l2", "dot"):
        yield "sample", (x, codes), {"temperature": 1.0, "seed": torch.tensor(7), "metric": metric}
    groups = x[None]
    for metric, scale in itertools.product(("distance", "l2", "dot"), (1.0, 1e4)):
        options = {"metric": metric, "scale": scale, "floor": 1e-5}
        yield "soft_assign_forward", (groups, codes, None), {**options, "statistics": True}
        chosen = indices[None]
        yield "soft_assign_forward", (groups, codes, None, chosen), {**options, "statistics": False}
        sums = fastvq.ops.soft_assign_forward(groups, codes, None, **options, statistics=False)[:2]
        grads = (normal(1, n), normal(1, n), normal(1, size), normal(1, n, dim))
        needs = {"need_x": True, "need_codebook": True}
        yield "soft_assign_backward", (groups, codes, None, *sums, chosen, *grads), {**options, **needs}
    for scale in (1.0, 1e4):
        options = {"scale": scale, "floor": 1e-5}
        yield "binary_assign_forward", (groups[..., :6], None), options
        grads = (normal(1, n), normal(1, 1 << min(6, dim)))
        yield "binary_assign_backward", (groups[..., :6], None, *grads), options


TIES = ("largest_vectors", "one_giant_row", "huge_vectors_tiny_codes")
"""Data on which distances tie: the gradient through them is zero times their magnitude, rounding and no more."""


def without_meaning(data, name, options):
    return name == "soft_assign_backward" and data in TIES and options["metric"] != "dot"


def held(actual, expected, close):
    """Return what differs: values that are not finite where the reference's are, or that are not close to them."""
    finite = expected.isfinite()
    if not bool(actual[finite].isfinite().all()):
        return f"{int((~actual[finite].isfinite()).sum())} of {expected.numel()} are not finite"
    if not close or not bool(finite.any()):
        return ""
    scale = max(1e-30, float(expected[finite].abs().max()))
    wrong = (actual[finite] / scale - expected[finite] / scale).abs().max()
    return f"differs by {float(wrong):.1e} of the largest value" if wrong > 1e-3 else ""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("data", EXTREME)
def test_what_the_reference_holds_is_held(data, backend):
    wrong = []
    for shape in SHAPES:
        x, codes = ADVERSARIAL[data](*shape, generator())
        with fastvq.use_backend(backend):  # whose backward takes the sums of its own forward
            made = list(calls(x, codes, generator(1)))
        for name, arguments, options in made:
            if without_meaning(data, name, options) or select.BACKENDS[backend].why_not(
                name, torch.device("cpu"), torch.float32
            ):
                continue
            copies = [[a.clone() if isinstance(a, torch.Tensor) else a for a in arguments] for _ in range(2)]
            expected = getattr(reference, name)(*copies[0], **options)
            with fastvq.use_backend(backend):
                actual = getattr(fastvq.ops, name)(*copies[1], **options)
            if expected is None:
                actual, expected = copies[1][:3], copies[0][:3]
            pairs = [(actual, expected)] if isinstance(expected, torch.Tensor) else zip(actual, expected, strict=True)
            for place, (one, other) in enumerate(pairs):
                if not other.is_floating_point():
                    found = "" if torch.equal(one, other) else "other indices"
                else:
                    found = held(one, other, not name.startswith("soft_assign"))  # its logits keep few digits
                if found:
                    shown = {key: value for key, value in options.items() if not isinstance(value, torch.Tensor)}
                    wrong.append(f"{name} {shown} {shape}, result {place}: {found}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_rotation_gradient_of_giant_codes(backend):
    """The ratio of the lengths overflows float32, its product with the gradient does not."""
    x, codes = torch.randn(20, 6, generator=generator(), requires_grad=True), torch.full((3, 6), 3e38)
    with fastvq.use_backend(backend):
        quantized = quantize(x, codes, gradient="rotation", commitment_weight=0.0)[0]
        (1e-3 * quantized).sum().backward()
    assert bool(x.grad.isfinite().all())
    # The gradient, the same vector in each row, is turned and has the length of 1e-3 ones times the ratio.
    lengths = 1e-3 * 6**0.5 * (3e38 * 6**0.5 / x.detach().double().norm(dim=1))
    torch.testing.assert_close(x.grad.double().norm(dim=1), lengths, rtol=1e-4, atol=0)


OPPOSITE = [(turn, dim) for turn in (0.0, 1e-6, 1e-3) for dim in (1, 3, 64, 257)]


def nearly_opposite(turn, dim):
    """Return rows, codes opposite to them but for a share `turn`, and a gradient."""
    x, grad, noise = (torch.randn(20, dim, generator=generator(seed)) for seed in range(3))
    return x, -2.37 * x * (1 + turn * noise), grad


@pytest.mark.parametrize(("turn", "dim"), OPPOSITE)
def test_rotation_gradient_of_opposite_vectors(turn, dim, backend):
    """The sum of the unit vectors, from whose direction the rotation follows, has few digits left."""
    (x, codes, grad), found = nearly_opposite(turn, dim), []
    for name in ("reference", backend):
        own = x.clone().requires_grad_()
        with fastvq.use_backend(name):
            quantized = quantize(own, codes, gradient="rotation", indices=torch.arange(20)).quantized
            found.append(torch.autograd.grad((quantized * grad).sum(), own)[0])
    assert (found[1] - found[0]).abs().max() <= 1e-4 * found[0].abs().max()


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.25, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("gradient", ["ste", "rotation"])
def test_gradients_of_opposite_extremes(gradient, weights, backend):
    """Zero times an overflow is no number; a gradient that is held must not pass through one."""
    commitment, codebook_weight = weights
    x, codes = torch.full((64, 8), 3e38), torch.full((2, 8), -3e38)
    x.requires_grad_()
    codes.requires_grad_()
    with fastvq.use_backend(backend):
        quantized, _, loss = quantize(
            x, codes, gradient=gradient, commitment_weight=commitment, codebook_weight=codebook_weight
        )
        (quantized.sum() + loss).backward()
    assert bool((quantized == -3e38).all())
    pull = commitment * 2 * 6e38 / 512
    torch.testing.assert_close(x.grad, torch.full_like(x, (-1.0 if gradient == "rotation" else 1.0) + pull))
    expected = torch.zeros(2, 8)
    expected[0] = -codebook_weight * 2 * 6e38 / 512 * 64
    torch.testing.assert_close(codes.grad, expected)


def test_a_mean_of_squares_that_overflow_alone(backend):
    """The loss of 5,000 elements is held though one square is not."""
    x, codes = torch.zeros(50, 100), torch.zeros(3, 100)
    x[3, 7] = 3e19
    with fastvq.use_backend(backend):
        error = fastvq.ops.quantize_forward(x, codes, torch.zeros(50, dtype=torch.int64), False)[2]
        stages = fastvq.ops.residual_quantize_forward(x, codes[None], torch.zeros(50, 1, dtype=torch.int64), False)[1]
    torch.testing.assert_close(error, torch.tensor(9e38 / 5000))
    torch.testing.assert_close(stages[0], torch.tensor(9e38 / 5000))
    cases.close(error, stages[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: fastvq.IBQ(6, 4),
        lambda: fastvq.SimVQ(6, 4),
        lambda: fastvq.VectorQuantize(6, 4, rotation_trick=True),
        lambda: fastvq.VectorQuantize(6, 4, learnable_codebook=True, ema_update=False, sync_update_v=0.5),
        lambda: fastvq.ResidualVQ(dim=6, codebook_size=4, num_quantizers=2),
    ],
    ids=["IBQ", "SimVQ", "rotation", "synchronous", "ResidualVQ"],
)
def test_layers_have_gradients_near_the_largest_numbers(make, backend):
    """The loss is infinite, a mean of squares beyond float32; its gradient is not."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 6).clamp(-1, 1).mul_(3e38).requires_grad_()
    with fastvq.use_backend(backend):
        quantized, _, loss, *_ = make()(x)
        ((1e-3 * quantized).sum() + loss.sum()).backward()
    assert bool(loss.isinf().all())
    assert bool(x.grad.isfinite().all())


DIRECTIONS = ["cosine", "cosine, learnable", "LlamaGen", "spherical groups", "factorized"]


@pytest.mark.parametrize(("kind", "compiled"), [*((kind, False) for kind in DIRECTIONS), ("cosine", True)])
def test_directions_of_giant_rows(kind, compiled):
    """The square of their length overflows; they were directed nowhere, and nearest to the first code."""
    layer, x = make(kind).eval(), batch_for(kind)
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            torch.nn.init.zeros_(parameter)
    run = torch.compile(layer, fullgraph=True, backend="eager") if compiled else layer
    with torch.no_grad():
        assert torch.equal(run(2.0**70 * x)[1], layer(x)[1])
    _, _, loss, *_ = layer.train()(2.0**70 * x)
    assert not bool(loss.isnan().any())


def test_the_direction_of_a_giant_error_with_noise():
    q = directional_reparam(torch.full((3, 6), 1e30), torch.full((3, 6), -1e30), 0.0)
    torch.testing.assert_close(q, torch.full((3, 6), -1e30))
