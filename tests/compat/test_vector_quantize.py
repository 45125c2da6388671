"""The layer beside vector_quantize_pytorch's own: outputs, losses, state over training steps, and checkpoints."""

from __future__ import annotations

import pytest
import torch

import fastvq

from ..cases import close, flags_as_numbers, generator

vqp = pytest.importorskip("vector_quantize_pytorch", reason="vector_quantize_pytorch isn't installed")

DIM, SIZE = 8, 20


def pair(**options):
    """Return fastvq's layer and its peer, in the same state."""
    theirs = vqp.VectorQuantize(DIM, SIZE, **options)
    ours = fastvq.VectorQuantize(DIM, SIZE, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def batch(shape=(3, 15, DIM), seed=0):
    return torch.randn(shape, generator=generator(seed))


def assert_same(ours, theirs):
    """(quantized, indices, loss) of both."""
    close(ours[0].detach(), theirs[0].detach())
    assert torch.equal(ours[1], theirs[1])
    close(ours[2].detach(), theirs[2].detach())


LAYERS = {
    "plain": {},
    "projected": {"codebook_dim": 4},
    "straight through": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True},
    "cosine, projected": {"use_cosine_sim": True, "codebook_dim": 4},
    "commitment": {"commitment_weight": 0.25},
    "no commitment": {"commitment_weight": 0.0},
    "decay and eps": {"decay": 0.99, "eps": 1e-2},
    "frozen": {"freeze_codebook": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "neither": {"ema_update": False},
    "channels first": {"channel_last": False},
    "images": {"accept_image_fmap": True},
}
SHAPES = {"channels first": (3, DIM, 15), "images": (3, DIM, 3, 5)}


@pytest.mark.parametrize("kind", LAYERS)
def test_training(kind):
    ours, theirs = pair(**LAYERS[kind])
    for seed in range(4):
        x = batch(SHAPES.get(kind, (3, 15, DIM)), seed)
        ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours_out, theirs_out = ours(ours_x), theirs(theirs_x)
        assert_same(ours_out, theirs_out)
        for module_x, (quantized, _, loss) in ((ours_x, ours_out), (theirs_x, theirs_out)):
            (quantized.square().sum() + loss).backward()
            assert module_x.grad is not None
        close(ours_x.grad, theirs_x.grad)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
        for name, tensor in flags_as_numbers(theirs.state_dict()).items():
            close(ours.state_dict()[name].float(), tensor.float())


@pytest.mark.parametrize("kind", LAYERS)
def test_eval(kind):
    ours, theirs = (module.eval() for module in pair(**LAYERS[kind]))
    x = batch(SHAPES.get(kind, (3, 15, DIM)))
    ours_out = ours(x)
    assert_same(ours_out, theirs(x))
    close(ours.get_output_from_indices(ours_out[1]), theirs.get_output_from_indices(ours_out[1]))
    close(ours.get_codes_from_indices(ours_out[1]), theirs.get_codes_from_indices(ours_out[1]))
    close(ours.codebook, theirs.codebook)


@pytest.mark.parametrize(
    "masking", [{"mask": torch.rand(3, 15) < 0.6}, {"lens": torch.tensor([4, 15, 9])}], ids=["mask", "lens"]
)
def test_masks(masking):
    ours, theirs = pair()
    for seed in range(3):
        assert_same(ours(batch(seed=seed), **masking), theirs(batch(seed=seed), **masking))
    for name, tensor in flags_as_numbers(theirs.state_dict()).items():
        close(ours.state_dict()[name].float(), tensor.float())


@pytest.mark.parametrize("training", [True, False])
def test_single_vectors(training):
    ours, theirs = (module.train(training) for module in pair())
    assert_same(ours(batch((9, DIM))), theirs(batch((9, DIM))))


@pytest.mark.parametrize("kind", LAYERS)
def test_checkpoints_load_both_ways(kind):
    ours, theirs = pair(**LAYERS[kind])
    x = batch(SHAPES.get(kind, (3, 15, DIM)))
    ours(x)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in flags_as_numbers(theirs.state_dict()).items():
        assert (ours.state_dict()[name].shape, ours.state_dict()[name].dtype) == (tensor.shape, tensor.dtype)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(ours.eval()(x)[1], theirs.eval()(x)[1])


def test_a_checkpoint_after_their_kmeans_is_not_initialized_again():
    theirs = vqp.VectorQuantize(DIM, SIZE, kmeans_init=True)
    theirs(batch())
    ours = fastvq.VectorQuantize(DIM, SIZE, kmeans_init=True)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.codebook, theirs.codebook)
    assert_same(ours(batch(seed=1)), theirs(batch(seed=1)))
