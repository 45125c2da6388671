"""BinaryMapper compared with its peer; its gradient is contracted without the table of probabilities."""

from __future__ import annotations

import pytest
import torch
import vector_quantize_pytorch as vqp
from torch.nn import functional as F

import fastvq

from .. import contract
from ..cases import HALF, close
from ..contract import vectors


def pair(bits=5, **options):
    return fastvq.BinaryMapper(bits, **options), vqp.BinaryMapper(bits, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 6), (2, 3, 4), ()], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"straight_through": True},
        {"straight_through": False, "calc_aux_loss": True},
        {"calc_aux_loss": False},
        {"deterministic": True},
        {"return_indices": True},
        {"return_indices": True, "calc_aux_loss": True, "reduce_aux_kl_loss": False},
    ],
    ids=str,
)
def test_equals_the_peer(options, shape, training):
    ours, theirs = (module.train(training) for module in pair())
    assert not ours.state_dict()
    x = vectors(*shape, 5, scale=3.0)
    if not (training or options.get("straight_through") or options.get("calc_aux_loss")):
        torch.manual_seed(3)
        results = ours(x, **options)
        torch.manual_seed(3)
        expected = theirs(x, **options)
        for one, other in zip(results, expected, strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
    else:
        contract.assert_steps_agree(ours, theirs, x, **options)


@pytest.mark.parametrize("bits", [1, 2, 7])
def test_gradient_is_that_of_all_probabilities(bits):
    layer = fastvq.BinaryMapper(bits).double()
    logits = vectors(6, bits).double().requires_grad_()
    one_hot, _ = layer(logits)
    weight = vectors(6, 2**bits, seed=1).double()
    (grad,) = torch.autograd.grad((one_hot * weight).sum(), logits)
    p = logits.sigmoid()[:, None]
    probabilities = torch.where(layer.codes, p, 1 - p).prod(-1)
    (expected,) = torch.autograd.grad((probabilities * weight).sum(), logits)
    close(grad, expected)
    assert torch.equal(one_hot.detach().sum(-1), torch.ones(6).double())


def test_extreme_logits_have_finite_gradients():
    logits = torch.tensor([[80.0, -80.0, 0.0]], requires_grad=True)
    one_hot, loss = fastvq.BinaryMapper(3)(logits)
    (one_hot[0, 1] + loss).backward()
    assert logits.grad.isfinite().all()
    assert one_hot.argmax() in (1, 5)


def test_methods_equal_the_peers():
    ours, theirs = pair()
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.power_two, theirs.power_two)
    logits, indices = vectors(2, 6, 5), torch.randint(32, (2, 6))
    for options in ({"indices": indices}, {"one_hot": F.one_hot(indices, 32)}):
        for sum_bits in (True, False):
            expected = theirs.log_prob(logits.flatten(0, 1), indices=indices.flatten(), sum_bits=sum_bits)
            close(ours.log_prob(logits, **options, sum_bits=sum_bits), expected.unflatten(0, (2, 6)))
    close(ours.binary_entropy(logits), theirs.binary_entropy(logits))
    for reduce in (True, False):
        close(ours.calc_aux_loss(logits, reduce), theirs.calc_aux_loss(logits, reduce))
    assert ours.num_codes == theirs.num_codes


def test_samples_have_their_probabilities():
    logits = torch.tensor([0.0, 1.0, -2.0])
    indices = fastvq.BinaryMapper(3).sample(logits.expand(40000, 3))
    frequency = torch.bincount(indices, minlength=8) / 40000
    expected = fastvq.BinaryMapper(3).log_prob(logits.expand(8, 3), indices=torch.arange(8)).exp()
    assert (frequency - expected).abs().max() < 0.01


def test_deterministic_on_eval():
    layer = fastvq.BinaryMapper(3, deterministic_on_eval=True).eval()
    logits = torch.tensor([[0.1, -0.1, 0.0], [1e-9, -1.0, 5.0]])
    for _ in range(3):
        assert layer(logits, return_indices=True)[1].tolist() == [1, 1 + 4]


def test_many_bits_without_a_table():
    layer = fastvq.BinaryMapper(40)
    indices = layer.sample(vectors(50, 40, scale=3.0))
    assert indices.max() > 2**32
    assert layer.log_prob(vectors(50, 40), indices=indices).shape == (50,)


def test_non_finite_rows():
    layer = fastvq.BinaryMapper(3)
    logits = vectors(2, 4, 3)
    logits[0, 1, 0], logits[1, 2, 2] = torch.nan, torch.inf
    excluded = ~logits.isfinite().all(-1)
    logits.requires_grad_()
    one_hot, indices, loss = layer(logits, return_indices=True)
    assert torch.equal(indices < 0, excluded)
    assert not one_hot[excluded].any()
    expected = layer.calc_aux_loss(logits[~excluded].detach())
    close(loss.detach(), expected)
    (one_hot.square().sum() + loss).backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[excluded].any()
    assert layer.code_counts.sum() == 6
    assert torch.equal(layer.log_prob(logits, one_hot=one_hot)[excluded].detach(), torch.zeros(2))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(dtype):
    logits = vectors(9, 4).to(dtype).requires_grad_()
    one_hot, loss = fastvq.BinaryMapper(4).to(dtype)(logits)
    (one_hot.square().sum() + loss).backward()
    assert (one_hot.dtype, logits.grad.dtype, loss.dtype) == (dtype, dtype, torch.float32)


def test_shapes_and_copies():
    layer = fastvq.BinaryMapper(3)
    assert layer(torch.randn(0, 3))[0].shape == (0, 8)
    contract.assert_copies_go_on_alike(layer, vectors(2, 9, 3))
    layer.deterministic_on_eval = True
    contract.assert_inference_mode_works(layer, vectors(2, 9, 3))


def test_checkpointing():
    contract.assert_checkpointing_changes_nothing(fastvq.BinaryMapper(3), vectors(2, 9, 3))


def test_exported():
    contract.assert_exports(fastvq.BinaryMapper(3, deterministic_on_eval=True), vectors(2, 9, 3))
    contract.assert_traces_are_saved(fastvq.BinaryMapper(3, deterministic_on_eval=True), vectors(2, 9, 3))


def test_compiled():
    contract.assert_compiles(fastvq.BinaryMapper(3), vectors(2, 9, 3), deterministic=True, straight_through=True)


@pytest.mark.parametrize(("bits", "message"), [(0, "be an integer of at least 1"), (63, r"lie in \[1, 62\], got 63")])
def test_invalid_bits(bits, message):
    with pytest.raises(ValueError, match=f"^bits: must {message}"):
        fastvq.BinaryMapper(bits)


def test_invalid_input():
    layer = fastvq.BinaryMapper(3)
    with pytest.raises(ValueError, match=r"^logits: must have shape \(\.\.\., 3\)"):
        layer(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"^temperature: must be positive"):
        layer(torch.randn(2, 3), temperature=0.0)
    with pytest.raises(ValueError, match="exactly one of them"):
        layer.log_prob(torch.randn(2, 3))


def test_encodes_with_a_mask():
    """The indices are those of the more likely bits; rows outside the mask are excluded."""
    mapper, logits = fastvq.BinaryMapper(3), torch.randn(2, 5, 3)
    found = mapper.encode(logits)
    assert torch.equal(found, ((logits > 0).long() * torch.tensor([1, 2, 4])).sum(-1))
    assert torch.equal(mapper.encode(logits[0, 0]), found[0, 0])
    mask = torch.rand(2, 5) < 0.5
    masks = ({"mask": mask}, mask), ({"lens": torch.tensor([5, 2])}, torch.tensor([[1] * 5, [1, 1, 0, 0, 0]]).bool())
    for options, here in masks:
        expected = found.masked_fill(~here, -1)
        assert torch.equal(mapper.encode(logits, **options), expected)
        x = logits.clone().requires_grad_()
        one_hot, indices, loss = mapper(x, deterministic=True, return_indices=True, **options)
        assert torch.equal(indices, expected)
        assert not one_hot[~here].any()
        (one_hot.square().sum() + loss).backward()
        assert x.grad.isfinite().all()
        assert not x.grad[~here].any()
    with pytest.raises(ValueError, match=r"^mask: must have shape \(2, 5\), got \(2, 4\)"):
        mapper.encode(logits, mask=mask[:, :4])
