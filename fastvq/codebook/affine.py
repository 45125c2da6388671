"""Affine reparametrization: codes follow the mean and variance of the vectors faster than by learning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvq import distributed

LEAST_VARIANCE = 1e-5
STARTS = {"batch_mean": 0.0, "batch_variance": 1.0, "codebook_mean": 0.0, "codebook_variance": 1.0}


class Affine:
    """Statistics of a codebook's affine reparametrization, kept as buffers of that codebook.

        e' = (e - m_e) s_x / s_e + m_x

    with moving means m and standard deviations s of the codes (e) and of the vectors (x), per head and dimension.
    Vectors are compared with e', and the codebook learns from the vectors mapped back.

    Args:
        codebook: receives the buffers batch_mean, batch_variance, codebook_mean, codebook_variance, (H, 1, D), and
            codebook_mean_needs_init, codebook_variance_needs_init (), 1 until the first training step. All are
            float32. The names are those of vector_quantize_pytorch, which lacks the first two until then.
        batch_decay, codebook_decay: decays of the moving statistics.
        sync: take the statistics of the vectors over all ranks.

    Source: Huh et al., Straightening Out the Straight-Through Estimator, 2023, section 4.1.
    """

    def __init__(
        self, codebook: nn.Module, heads: int, dim: int, *, batch_decay: float, codebook_decay: float, sync: bool
    ) -> None:
        self.batch_decay, self.codebook_decay, self.sync = batch_decay, codebook_decay, sync
        for name, start in STARTS.items():
            if name.startswith("codebook"):
                codebook.register_buffer(f"{name}_needs_init", torch.ones((), dtype=torch.float32))
            codebook.register_buffer(name, torch.full((heads, 1, dim), start, dtype=torch.float32))

    def reset_(self, codebook: nn.Module) -> None:
        """Return to the statistics of a new codebook, with which the map is the identity."""
        for name, start in STARTS.items():
            codebook.get_buffer(name).fill_(start)
            if name.startswith("codebook"):
                getattr(codebook, f"{name}_needs_init").fill_(1)

    def complete(self, codebook: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Add to a state without the statistics of a batch those of a new codebook.

        vector_quantize_pytorch saves such a state before the first training step, with arbitrary codebook_mean and
        codebook_variance.
        """
        if f"{prefix}embed" in state_dict and f"{prefix}batch_mean" not in state_dict:
            like = state_dict[f"{prefix}embed"]
            for name, start in STARTS.items():
                state_dict[prefix + name] = torch.full_like(like[:, :1], start, dtype=torch.float32)

    @torch.no_grad()
    def observe_(self, codebook: nn.Module, embed: Tensor, x: Tensor, mask: Tensor) -> None:
        """Update the statistics of the codes embed (H, K, D) and of the rows of x (H, N, D) in the mask (H, N)."""
        first_step = codebook.get_buffer("codebook_mean_needs_init") != 0
        for name, value in (
            ("codebook_mean", embed.mean(1, keepdim=True)),
            ("codebook_variance", embed.var(1, keepdim=True, unbiased=False)),
        ):
            old, first = getattr(codebook, name), getattr(codebook, f"{name}_needs_init")
            moved = old * self.codebook_decay + value * (1 - self.codebook_decay)
            old.copy_(torch.where(first != 0, value, moved))
            first.fill_(0)

        rows = torch.where(mask[..., None], x, 0).double()
        count = mask.sum(1).double()[:, None, None].expand(-1, 1, rows.shape[2]).clone()
        first_moment, second_moment = rows.sum(1, keepdim=True), rows.square().sum(1, keepdim=True)
        if self.sync and distributed.active():
            distributed.sum_(count, first_moment, second_moment)
        mean = first_moment / count.clamp_min(1)
        variance = (second_moment / count.clamp_min(1) - mean.square()).clamp_min(0)
        for name, value in (("batch_mean", mean.float()), ("batch_variance", variance.float())):
            old = getattr(codebook, name)
            # Without a row, the statistics of the codebook: the map is the identity.
            start = getattr(codebook, name.replace("batch", "codebook"))
            moved = torch.where(first_step, value, old * self.batch_decay + value * (1 - self.batch_decay))
            old.copy_(torch.where(count > 0, moved, torch.where(first_step, start, old)))

    def of_codes(self, codebook: nn.Module, codes: Tensor) -> Tensor:
        """Return e' of codes (H, K, D)."""
        scale = _deviation(codebook.batch_variance) / _deviation(codebook.codebook_variance)
        return (codes - codebook.codebook_mean) * scale + codebook.batch_mean  # type: ignore[operator]

    def of_rows(self, codebook: nn.Module, x: Tensor) -> Tensor:
        """Return the rows x (H, N, D) mapped back to the space of the codes e."""
        scale = _deviation(codebook.codebook_variance) / _deviation(codebook.batch_variance)
        return (x - codebook.batch_mean) * scale + codebook.codebook_mean  # type: ignore[operator]


def _deviation(variance: Tensor | nn.Module) -> Tensor:
    assert isinstance(variance, Tensor)
    return variance.clamp_min(LEAST_VARIANCE).sqrt()
