"""Gaussian bottleneck: that of a variational autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastvq.parts import Annealed
from fastvq.parts.arguments import check_not_negative, check_sizes
from fastvq.precision import KeepsBuffers

from .vqvae import Continuous

LARGEST_LOG_VARIANCE = 20.0


class GaussianBottleneck(Annealed, KeepsBuffers, Continuous):
    """Bottleneck of a variational autoencoder: a normal distribution with independent coordinates.

        mean, log_variance = to_moments(x),   z = mean + exp(log_variance / 2) noise (training), z = mean (eval)
        KL = sum_d (mean_d^2 + variance_d - log_variance_d - 1) / 2,   loss = kl_weight mean KL     (zero in eval mode)

    Args:
        dim: dimension of the features.
        latent_dim: dimension of z, which a linear map brings to `dim` again; `dim` by default.
        kl_weight, final_kl_weight: of the loss at the beginning and at the end of a schedule; None: constant. The KL
            is in nats per vector, averaged over the vectors.
        annealing: share of the training in which the weight moves, see `fastvq.parts.Annealed`.

    Shapes: x (B, N, dim) -> (codes (B, N, dim), indices (B, N, 0), loss ()).

    Source: Kingma, Welling, Auto-Encoding Variational Bayes, 2014, appendix B; Higgins et al., beta-VAE, 2017.
    """

    kl_weight: Tensor
    _kept_buffers = ("kl_weight",)

    def __init__(
        self,
        dim: int,
        *,
        latent_dim: int | None = None,
        kl_weight: float = 5e-4,
        final_kl_weight: float | None = None,
        annealing: float = 1.0,
    ) -> None:
        super().__init__()
        latent_dim = dim if latent_dim is None else latent_dim
        check_sizes(dim=dim, latent_dim=latent_dim)
        check_not_negative(kl_weight=kl_weight, final_kl_weight=final_kl_weight or 0.0)
        self.dim, self.latent_dim = dim, latent_dim
        self.to_moments = nn.Linear(dim, 2 * latent_dim)
        self.project_out = nn.Identity() if latent_dim == dim else nn.Linear(latent_dim, dim)
        self._set_schedules(annealing, {"kl_weight": (kl_weight, final_kl_weight)})

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means and log-variances (..., latent_dim) of features (..., dim), in float32 at least."""
        moments = self.to_moments(x)
        mean, log_variance = (moments if moments.dtype == torch.float64 else moments.float()).chunk(2, -1)
        return mean, log_variance.clamp(-LARGEST_LOG_VARIANCE, LARGEST_LOG_VARIANCE)

    def latents(self, x: Tensor) -> Tensor:
        """Return the means (..., latent_dim) of features (..., dim)."""
        return self.moments(x)[0]

    def divergences(self, x: Tensor) -> Tensor:
        """Return the KL of each coordinate from the standard normal distribution in nats, (..., latent_dim)."""
        mean, log_variance = self.moments(x)
        return (mean.square() + log_variance.exp() - log_variance - 1) / 2

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (codes, empty indices, loss) of x (B, N, dim)."""
        if self.training:
            mean, log_variance = self.moments(x)
            z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
            divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(-1) / 2
            loss = divergence.mean() * self.kl_weight if divergence.numel() else divergence.sum()
        else:
            z, loss = self.moments(x)[0], x.new_zeros(())
        return self.project_out(z.to(x.dtype)), self.no_indices(x), loss

    if TYPE_CHECKING:
        __call__ = forward
