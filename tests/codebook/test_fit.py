"""Fitting of codebooks to data sets: k-means over many batches."""

from __future__ import annotations

import pytest
import torch

import fastvq

from ..cases import close, generator


def clusters(count=12, rows=40, dim=6):
    """Return rows of well separated clusters, in batches of uneven sizes."""
    centers = 20 * torch.randn(count, dim, generator=generator())
    x = (centers[:, None] + torch.randn(count, rows, dim, generator=generator(1))).flatten(0, 1)
    x = x[torch.randperm(len(x), generator=generator(2))]
    return centers, x, list(x.split([7, 1, 200, *[len(x) - 208]]))


def test_a_fit_is_kmeans_over_all_batches():
    """It ends where each code is the mean of its rows in all batches, and nearly each cluster has one."""
    centers, x, batches = clusters()
    vq = fastvq.VectorQuantize(6, 18)
    torch.manual_seed(0)
    fitted = vq.fit(batches, iterations=15)
    assert fitted.rows == len(x)
    assert (fitted.errors.diff() <= 1e-6).all()
    assert ((centers - vq.codebook[fastvq.search(centers, vq.codebook)]).norm(dim=1) < 3).sum() >= 10
    counts, sums = fastvq.accumulate(x, fastvq.search(x, vq.codebook), 18)
    close(vq.codebook, sums / counts[:, None])  # converged: each code is the mean of its rows
    close(fitted.errors[-1], (x - vq.codebook[fastvq.search(x, vq.codebook)]).square().mean())
    close(vq._codebook.cluster_size[0], counts / len(batches))
    close(vq._codebook.embed_avg[0], vq.codebook * vq._codebook.cluster_size[0, :, None])


def test_a_fit_takes_an_encoder_masks_out_non_finite_rows_and_normalizes():
    _, x, batches = clusters()
    x[3] = torch.nan
    encoder = torch.nn.Linear(6, 4)
    vq = fastvq.VectorQuantize(4, 12, use_cosine_sim=True, learnable_codebook=True, kmeans_init=True)
    fitted = vq.fit([(b[None], 0) for b in batches], inputs=lambda batch: encoder(batch[0]), iterations=3)
    assert fitted.rows == len(x) - 1
    assert bool(vq._codebook.initted)
    close(vq.codebook.norm(dim=1), torch.ones(12))
    assert vq.codebook.requires_grad


def test_stages_are_fitted_to_what_is_left():
    _, x, batches = clusters(count=30)
    torch.manual_seed(0)
    rvq = fastvq.ResidualVQ(dim=6, num_quantizers=3, codebook_size=8, codebook_dim=5)
    fitted = rvq.fit(batches, iterations=4)
    errors = [stage.errors[-1].item() for stage in fitted]
    assert errors[0] > errors[1] > errors[2]
    rvq.eval()
    codes = rvq(x, return_all_codes=True)[3]
    error = (rvq.project_in(x) - codes.sum(0)).square().mean().item()  # the last means move after the last error
    assert 0.5 * errors[-1] < error <= errors[-1]


def test_images_are_fitted_as_forward_takes_them():
    images = torch.randn(3, 4, 5, 5)
    vq = fastvq.VectorQuantize(4, 8, heads=2, codebook_dim=2, separate_codebook_per_head=True, accept_image_fmap=True)
    fitted = vq.fit([images], iterations=2)
    assert fitted.rows == 2 * 3 * 25
    assert (
        fastvq.GroupedResidualVQ(dim=4, groups=2, num_quantizers=1, codebook_size=4, accept_image_fmap=True)
        .fit([images], iterations=1)[1][0]
        .rows
        == 75
    )


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ((x for x in ()), {}, TypeError, "batches: must start anew"),
        ([1.0], {}, TypeError, "batches: must hold tensors"),
        ([torch.full((4, 6), torch.nan)], {}, ValueError, "batches: have no vector"),
        ([torch.zeros(4, 6)], {"affine_param": True}, ValueError, "affine_param: its codes"),
        ([torch.zeros(4, 6)], {"iterations": 0}, ValueError, "iterations: must be an integer of at least 1"),
    ],
)
def test_refuses_by_name(data, options, error, message):
    iterations = options.pop("iterations", 2)
    with pytest.raises(error, match=f"^{message}"):
        fastvq.VectorQuantize(6, 8, **options).fit(data, iterations=iterations)


def test_data_that_end_with_the_first_pass_are_named():
    """As a DataLoader of a stream does, which is no iterator itself."""

    class Stream:
        def __init__(self):
            self.batches = iter([torch.randn(5, 4)])

        def __iter__(self):
            return self.batches

    with pytest.raises(ValueError, match=r"^batches: must start anew at each pass, got no vector after the first one"):
        fastvq.VectorQuantize(4, 8).fit(Stream())


def test_stages_that_share_cannot_be_fitted():
    rvq = fastvq.ResidualVQ(dim=6, num_quantizers=2, codebook_size=8, shared_codebook=True)
    with pytest.raises(ValueError, match=r"^shared_codebook: must be False"):
        rvq.fit([torch.zeros(4, 6)])
