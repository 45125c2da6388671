"""SQ-VAE: stochastic quantization with a learned variance, which anneals itself."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.functional.quantize import check_some_code, lookup
from fastvq.functional.soft_assign import soft_assign
from fastvq.ops import search
from fastvq.parts.arguments import check_not_negative
from fastvq.parts.gumbel import gumbel_lookup
from fastvq.parts.losses import mean_squared_errors
from fastvq.parts.schedules import Annealed
from fastvq.precision import at_least_float32, full_precision

from .learned_table import LearnedTable, TableRows


class StochasticVQ(Annealed, LearnedTable):
    """Quantizer of SQ-VAE, which samples codes with a variance that it learns.

        p_nk = softmax_k(-|x_n - e_k|^2 / (2 v)),   v = exp(log_variance)
        training:  y_n = softmax_k((ln p_nk + g_nk) / temperature),   quantized = sum_k y_nk e_k,
                   index = argmax_k y_nk
        eval:      index = argmin_k |x_n - e_k|^2,   quantized = e_index
        loss = loss_weight mean_n (|x_n - quantized_n|^2 / (2 v) - H(p_n))     (zero in eval mode)

    with Gumbel noise g. Codes, variance and x learn by gradient descent; no stop of gradients is needed. Beside the
    loss of a decoder, which suffers from the noise of samples, the variance falls by itself as training goes on, and
    samples become nearest codes. Vectors that are not finite or masked out get index -1 and a zero output, and take no
    part.

    Args:
        dim: dimension of the vectors and of the codes.
        codebook_size: K.
        channel_first: vectors are (B, dim, ...), else (B, ..., dim), with any number of spatial axes.
        variance: the first v.
        loss_weight: of the loss, in units of a likelihood in nats per vector.
        temperature, final_temperature: of the samples at the beginning and at the end of a schedule; None: constant.
        annealing: share of the training in which the temperature moves, linearly; see `anneal_`, which `Trainer` calls.

    State: embed (K, dim), log_variance () and temperature (), float32 in modules of any dtype.

    Raises:
        ValueError: an invalid argument, by name.

    Numerics: the index in eval is exact (`fastvq.search`). No N x K matrix is kept (`fastvq.parts.gumbel_lookup`,
    `fastvq.soft_assign`). In training, indices are those of float32 logits.

    Source: Takida et al., SQ-VAE: Variational Bayes on Discrete Representation with Self-annealed Stochastic
    Quantization, 2022 (arXiv 2205.07547), section 4.2, Gaussian SQ-VAE (I), with one variance for all vectors.
    """

    temperature: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        channel_first: bool = False,
        variance: float = 1.0,
        loss_weight: float = 1.0,
        temperature: float = 1.0,
        final_temperature: float | None = None,
        annealing: float = 1.0,
    ) -> None:
        check_not_negative(loss_weight=loss_weight)
        for name, value in (
            ("variance", variance),
            ("temperature", temperature),
            ("final_temperature", final_temperature),
        ):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: must be positive and finite, got {value}")
        super().__init__(dim, codebook_size, channel_first=channel_first)
        self.variance, self.loss_weight = variance, loss_weight
        self.log_variance = nn.Parameter(torch.tensor(math.log(variance), dtype=torch.float32))
        self._set_schedules(annealing, {"temperature": (temperature, final_temperature)})

    @torch.no_grad()
    def reinitialize_(self) -> None:
        """Draw a new codebook, and reset the variance and the health; with several ranks all must call this."""
        super().reinitialize_()
        self.log_variance.fill_(math.log(self.variance))

    def nearest_rows(self, rows: Tensor, mask: Tensor) -> Tensor:
        found = search(rows.detach().flatten(0, -2), self.embed.detach(), mask=mask.flatten())
        check_some_code("embed", found, self.embed)
        return found.view(mask.shape)

    def quantize_rows(self, rows: Tensor, mask: Tensor) -> TableRows:
        if not self.training:
            indices = self.nearest_rows(rows, mask)
            quantized = lookup(self.embed.detach(), indices)
            error = self._error(rows.detach(), quantized, indices)
            return TableRows(quantized, indices, torch.zeros_like(error), error)
        with full_precision(rows):
            return self._sample(at_least_float32(rows), mask)

    def _sample(self, rows: Tensor, mask: Tensor) -> TableRows:
        """Return the samples of training. |x|^2 is the same for all codes, and left out of the logits."""
        own, own_mask = rows.flatten(0, -2), mask.flatten()
        precision = (0.5 * (-self.log_variance).exp()).to(own.dtype)
        codes = self.embed.to(own.dtype)
        keys = precision * torch.cat([2 * codes, -codes.square().sum(1, keepdim=True)], 1)
        quantized, indices = gumbel_lookup(
            F.pad(own, (0, 1), value=1.0),
            keys,
            self.embed,
            temperature=self.temperature,
            seed=torch.randint(2**62, (), device="cpu"),
        )
        check_some_code("embed", indices, keys)
        quantized = quantized.masked_fill(~own_mask[:, None], 0)
        indices = indices.masked_fill(~own_mask, -1)
        scale = precision.sqrt()
        entropy = soft_assign(own * scale, codes * scale, metric="l2", mask=own_mask).entropy
        square = (own - quantized).square().sum(1) * precision
        loss = torch.where(own_mask, square - entropy, 0).sum() / own_mask.sum().clamp_min(1)
        error = self._error(own.detach(), quantized.detach(), indices)
        return TableRows(quantized.view(rows.shape), indices.view(mask.shape), self.loss_weight * loss, error)

    @staticmethod
    def _error(rows: Tensor, quantized: Tensor, indices: Tensor) -> Tensor:
        return mean_squared_errors(rows, quantized, indices).sum() / (indices >= 0).sum().clamp_min(1)
