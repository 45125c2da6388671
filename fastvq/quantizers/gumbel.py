"""Gumbel-softmax quantizer: the bottleneck of a discrete VAE."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastvq.codebook.health import Health, Monitored
from fastvq.distributed import common_seed
from fastvq.functional.quantize import check_some_code, lookup
from fastvq.functional.soft_assign import soft_assign
from fastvq.ops import search
from fastvq.parts.arguments import check_not_negative, check_sizes
from fastvq.parts.gumbel import gumbel_lookup
from fastvq.parts.indices import checked_indices
from fastvq.parts.losses import mean_squared_errors
from fastvq.parts.masking import exclude_non_finite
from fastvq.parts.schedules import Annealed
from fastvq.parts.shapes import CHANNEL_FIRST, Layout, codes_in_layout
from fastvq.precision import KeepsBuffers, at_least_float32, full_precision

LOGITS = {"linear": "dot", "distance": "distance"}
"""Kinds of logits, with the metric that `soft_assign` has for them."""


class GumbelQuantize(Annealed, Monitored, KeepsBuffers, nn.Module):
    """Quantizer of a discrete VAE, which samples codes by the Gumbel-softmax relaxation in training.

        l_nk = <x_n, w_k> ("linear") or -|x_n - e_k| ("distance"),   q_n = softmax_k(l_nk)
        training:  y_n = softmax_k((l_nk + g_nk) / temperature),   quantized = sum_k y_nk e_k,   index = argmax_k y_nk
        eval:      index = argmax_k l_nk,   quantized = e_index
        loss = kl_weight mean_n KL(q_n | uniform) = kl_weight mean_n (ln K - H(q_n))     (zero in eval mode)

    with Gumbel noise g. Everything learns by gradient descent: codes, weights w and x. Vectors that are not finite or
    masked out get index -1 and a zero output, and take no part in the loss and in gradients.

    Args:
        dim: dimension of the vectors.
        codebook_size: K.
        logits: "linear", with weights w (K, dim) of their own, as the last layer of DALL-E's encoder; "distance", the
            negative distance to each code.
        hard: training outputs the code of the sampled index, with the straight-through gradient of the soft sample.
        temperature, final_temperature: of the samples at the beginning and at the end of a schedule; None: constant.
        kl_weight, final_kl_weight: of the loss, likewise. The KL is in nats per vector.
        annealing: share of the training in which both move, linearly; see `anneal_`, which `Trainer` calls.
        channel_first: vectors are (B, dim, ...), else (B, ..., dim), with any number of spatial axes.

    State: codebook (K, dim); logit_weight (K, dim) for linear logits; temperature, kl_weight (), float32 in modules of
    any dtype, which a schedule of one's own may write to as well: a compiled program is not compiled anew.

    Raises:
        ValueError: an invalid argument, by name.

    Numerics: the index in eval is exact (`fastvq.search`). The KL is streamed over tiles (`fastvq.soft_assign`), the
    samples over parts of the rows (`fastvq.parts.gumbel_lookup`): no N x K matrix is kept, and the noise is drawn anew
    in the backward pass. In training, indices are those of float32 logits.

    Source: Ramesh et al., Zero-Shot Text-to-Image Generation, 2021, section 2.1 and appendix A; Jang et al. 2017.
    """

    temperature: Tensor
    kl_weight: Tensor
    _kept_buffers = ("temperature", "kl_weight")

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        logits: str = "linear",
        hard: bool = False,
        temperature: float = 1.0,
        final_temperature: float | None = None,
        kl_weight: float = 5e-4,
        final_kl_weight: float | None = None,
        annealing: float = 1.0,
        channel_first: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, codebook_size=codebook_size)
        if logits not in LOGITS:
            raise ValueError(f"logits: must be one of {', '.join(LOGITS)}, got {logits!r}")
        for name, value in (("temperature", temperature), ("final_temperature", final_temperature)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: must be positive and finite, got {value}")
        check_not_negative(kl_weight=kl_weight, final_kl_weight=final_kl_weight or 0.0)
        self.dim, self.codebook_dim, self.codebook_size = dim, dim, codebook_size
        self.logits, self.hard = logits, hard
        self.channel_first = channel_first
        self._set_schedules(
            annealing, {"temperature": (temperature, final_temperature), "kl_weight": (kl_weight, final_kl_weight)}
        )
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim))
        if logits == "linear":
            self.logit_weight = nn.Parameter(torch.randn(codebook_size, dim) * dim**-0.5)
        self._health = Health(codebook_size)

    @torch.no_grad()
    def reinitialize_(self) -> None:
        """Draw new codes and weights and reset the health.

        With several ranks all of them must call this, which gives them the same values.
        """
        generator = torch.Generator("cpu").manual_seed(common_seed(2**63 - 1))
        for name, parameter in self.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, device="cpu")
            parameter.copy_(noise * (self.dim**-0.5 if name == "logit_weight" else 1.0))
        self.reset_health()

    @property
    def keys(self) -> Tensor:
        """The vectors (K, dim) that x is compared with, NaN for codes that are not finite."""
        if self.logits == "distance":
            return self.codebook
        return torch.where(self.codebook.isfinite().all(-1, keepdim=True), self.logit_weight, torch.nan)

    @torch.no_grad()
    def _non_finite(self) -> Tensor:
        return 1 - self.keys.isfinite().all(-1).float().mean()

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, lens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (quantized, indices, loss) of x.

        Args:
            x: (B, ..., dim), or (B, dim, ...) if channel_first; any floating dtype.
            mask: bool (B, ...), True for the vectors that take part; the others get index -1 and zeros.
            lens: int (B,), a mask for sequences: the first lens[b] vectors take part.

        Returns:
            quantized, shaped and typed as x; indices int64 (B, ...); loss () float32.

        Raises:
            ValueError, TypeError: x of another shape or dtype. CodebookError: no code is finite.
        """
        layout = Layout.of(x, self.dim, channel_first=self.channel_first, options=CHANNEL_FIRST)
        rows, rows_mask = layout.to_rows(x), layout.rows_mask(mask, lens)
        with full_precision(x):
            quantized, indices, loss = self._quantize(rows, rows_mask)
        return layout.from_rows(quantized.to(x.dtype)), layout.indices(indices), loss

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def encode(self, x: Tensor, *, mask: Tensor | None = None, lens: Tensor | None = None) -> Tensor:
        """Return the indices of `forward` in eval mode, without changing any state."""
        layout = Layout.of(x, self.dim, channel_first=self.channel_first, options=CHANNEL_FIRST)
        rows, rows_mask = exclude_non_finite(layout.to_rows(x), layout.rows_mask(mask, lens))
        found = self._search(at_least_float32(rows).flatten(0, 1), self.keys, rows_mask.flatten())
        return layout.indices(found.view(layout.batch, layout.rows))

    def _search(self, rows: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Return the indices (N,) of the most probable codes of rows (N, dim)."""
        metric = "dot" if self.logits == "linear" else "l2"
        found = search(rows.detach(), keys.detach(), metric=metric, mask=mask)
        check_some_code("codebook", found, keys)
        return found

    def _quantize(self, rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return `forward` of rows (B, N, dim)."""
        shape = rows.shape
        own, mask = exclude_non_finite(at_least_float32(rows).flatten(0, 1), None if mask is None else mask.flatten())
        keys = self.keys
        if self.training:
            seed = torch.randint(2**62, (), device="cpu")
            quantized, indices = gumbel_lookup(
                own,
                keys,
                self.codebook,
                temperature=self.temperature,
                seed=seed,
                metric=LOGITS[self.logits],
                hard=self.hard,
            )
            quantized, indices = torch.where(mask[:, None], quantized, 0), torch.where(mask, indices, -1)
            entropy = soft_assign(own, keys, metric=LOGITS[self.logits], mask=mask).entropy
            divergence = torch.where(mask, math.log(self.codebook_size) - entropy, 0).sum() / mask.sum().clamp_min(1)
            loss = divergence.to(entropy.dtype) * self.kl_weight
        else:
            indices = self._search(own, keys, mask)
            quantized, loss = lookup(self.codebook, indices), own.new_zeros(())
        check_some_code("codebook", indices, keys)
        if self.training or self._measures:
            error = mean_squared_errors(own.detach(), quantized.detach(), indices).sum()
            self._health.observe_(indices, error / (indices >= 0).sum().clamp_min(1))
        return quantized.unflatten(0, shape[:2]), indices.unflatten(0, shape[:2]), loss

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return the codes of indices (B, ...), zeros for -1; differentiable in the codebook.

        They are (B, ..., dim), or (B, dim, ...) if channel_first.
        """
        return codes_in_layout(lookup(self.codebook, checked_indices(indices, self.codebook_size)), self.channel_first)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Return `indices_to_codes`: the output of `forward` in eval mode for these indices."""
        return self.indices_to_codes(indices)
