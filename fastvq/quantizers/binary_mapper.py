"""Binary mapper: bits sampled from logits, as a one-hot vector that passes gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastvq.codebook.health import LevelUse
from fastvq.parts.arguments import check_positive, check_sizes, check_tensors
from fastvq.parts.masking import finite_mask
from fastvq.parts.shapes import Layout
from fastvq.precision import Unsaved, at_least_float32, constant

NAT = math.log(2)
"""One bit in nats."""


def binary_entropy(logits: Tensor) -> Tensor:
    """Return the entropy in nats of independent bits with logits (..., bits), summed to (...)."""
    p = logits.sigmoid()
    return -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits)).sum(-1)


class BinaryMapper(LevelUse, Unsaved, nn.Module):
    """Binary mapper with the API of vector_quantize_pytorch.

    A bit is sampled from each logit; the number that the bits form is returned as a one-hot vector.

        bit_b ~ Bernoulli(sigmoid(logit_b / temperature)),   index = sum_b bit_b 2^b,   one_hot_k = [k = index]
        G_k = prod_b p_b^{k_b} (1 - p_b)^{1 - k_b},   p = sigmoid(logit),   d one_hot / d logit = d G / d logit
        loss = mean max(0, bits ln 2 - H(p) - kl_loss_threshold)

    Args:
        bits: number of logits per vector; there are 2^bits codes.
        kl_loss_threshold: free bits, in nats: the entropy H may be below its maximum by this much without a loss.
        deterministic_on_eval: in eval mode take the more likely value of each bit instead of sampling.

    Raises:
        ValueError: an invalid argument, by name.

    Numerics: float32, or float64 for logits in float64. The gradient is that of G, contracted bit by bit: G itself,
    (N, 2^bits), is never materialized. A row with NaN or infinity has index -1, a one-hot vector of zeros, and no part
    in the loss.

    Source: Fleuret, The Free Transformer, 2025, section 3.4.
    """

    _constants = ("power_two",)

    power_two: Tensor

    def __init__(self, bits: int = 1, kl_loss_threshold: float = NAT, deterministic_on_eval: bool = False) -> None:
        super().__init__()
        check_sizes(bits=bits)
        if bits > 62:
            raise ValueError(f"bits: must lie in [1, 62], got {bits}")
        self.bits, self.num_codes = bits, 2**bits
        self.kl_loss_threshold, self.deterministic_on_eval = kl_loss_threshold, deterministic_on_eval
        self.power_two = constant([2**bit for bit in range(bits)], torch.int64)
        self._count_levels([2] * bits)

    @property
    def codes(self) -> Tensor:
        """The bits of all codes, bool (2^bits, bits), lowest bit first; computed on access."""
        return self._bits_of(torch.arange(self.num_codes, device=self.power_two.device))

    def binary_entropy(self, logits: Tensor) -> Tensor:
        return binary_entropy(logits)

    def calc_aux_loss(self, logits: Tensor, reduce_aux_kl_loss: bool = True) -> Tensor:
        """Return the loss of logits (..., bits): (), or (...) without reduction. Non-finite rows are excluded."""
        mask = finite_mask(logits)
        divergence = self.bits * NAT - binary_entropy(at_least_float32(torch.where(mask[..., None], logits, 0)))
        loss = torch.where(mask, F.relu(divergence - self.kl_loss_threshold), 0)
        return loss.sum() / mask.sum().clamp_min(1) if reduce_aux_kl_loss else loss

    def log_prob(
        self, logits: Tensor, *, indices: Tensor | None = None, one_hot: Tensor | None = None, sum_bits: bool = True
    ) -> Tensor:
        """Return the log-probability in nats of codes under logits (..., bits): (...), or (..., bits) unsummed.

        The codes are given as indices (...) or as one-hot vectors (..., 2^bits). 0 for index -1 and for zeros.
        """
        if (indices is None) == (one_hot is None):
            raise ValueError("indices, one_hot: exactly one of them must be given")
        if indices is None:
            assert one_hot is not None
            indices = torch.where(one_hot.detach().amax(-1) > 0, one_hot.detach().argmax(-1), -1)
        logits = at_least_float32(logits)
        signed = torch.where(self._bits_of(indices), logits, -logits)
        log_probs = F.logsigmoid(signed).masked_fill((indices < 0).unsqueeze(-1), 0)
        return log_probs.sum(-1) if sum_bits else log_probs

    def sample(self, logits: Tensor, temperature: float = 1.0, deterministic: bool = False) -> Tensor:
        """Return the indices (...) int64 of logits (..., bits), without a vector of 2^bits.

        deterministic: take the more likely value of each bit, 0 if both are equally likely.
        """
        check_tensors(logits=logits)
        check_positive(temperature=temperature)
        if not logits.is_floating_point():
            raise TypeError(f"logits: must be floating point, got {logits.dtype}")
        if logits.shape[-1:] != (self.bits,):
            raise ValueError(f"logits: must have shape (..., {self.bits}), got {tuple(logits.shape)}")
        self.follow_(logits.device)
        mask = finite_mask(logits)
        logits = at_least_float32(torch.where(mask[..., None], logits, 0)).detach()
        bits = logits > 0 if deterministic else (logits / temperature).sigmoid().bernoulli()
        return (bits.long() * self.power_two).sum(-1).masked_fill(~mask, -1)

    if TYPE_CHECKING:  # nn.Module declares that calls return Any

        @overload
        def __call__(
            self,
            logits: Tensor,
            temperature: float = 1.0,
            straight_through: bool | None = None,
            calc_aux_loss: bool | None = None,
            deterministic: bool | None = None,
            return_indices: Literal[False] = False,
            reduce_aux_kl_loss: bool = True,
            *,
            mask: Tensor | None = None,
            lens: Tensor | None = None,
        ) -> tuple[Tensor, Tensor]: ...
        @overload
        def __call__(
            self, logits: Tensor, *, return_indices: Literal[True], **options: Any
        ) -> tuple[Tensor, Tensor, Tensor]: ...
        @overload
        def __call__(self, logits: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, ...]: ...
        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def forward(
        self,
        logits: Tensor,
        temperature: float = 1.0,
        straight_through: bool | None = None,
        calc_aux_loss: bool | None = None,
        deterministic: bool | None = None,
        return_indices: bool = False,
        reduce_aux_kl_loss: bool = True,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return (one_hot, loss) of logits, or (one_hot, indices, loss).

        Args:
            logits: (..., bits), any floating dtype.
            temperature: of the sampling.
            straight_through: whether one_hot passes the gradient of G; by default in training.
            calc_aux_loss: whether the loss is computed, else 0; by default in training.
            deterministic: take the more likely value of each bit; by default in eval mode if deterministic_on_eval.
            return_indices: also return the indices.
            reduce_aux_kl_loss: return the mean loss, else that of each row.
            mask: bool (...), True for the rows that take part; the others are treated as rows that are not finite.
            lens: int (B,), a mask for logits (B, N, bits): the first lens[b] rows take part.

        Returns:
            one_hot (..., 2^bits), typed as logits; indices (...) int64; loss () or (...) float32.

        Raises:
            ValueError: logits of another shape, or a temperature that is not positive.
        """
        if deterministic is None:
            deterministic = self.deterministic_on_eval and not self.training
        logits = self._masked(logits, mask, lens)
        indices = self.sample(logits, temperature, deterministic)
        if self.training or self._measures:
            self._observe(indices, self._bits_of(indices), indices >= 0, None)
        one_hot = logits.new_zeros(*indices.shape, self.num_codes)
        one_hot.scatter_(-1, indices.clamp_min(0).unsqueeze(-1), (indices >= 0).unsqueeze(-1).to(one_hot.dtype))
        if self.training if straight_through is None else straight_through:
            mask = (indices >= 0).unsqueeze(-1)
            one_hot = _Soft.apply(torch.where(mask, logits, 0), one_hot)
        loss = at_least_float32(logits.new_zeros(()))
        if self.training if calc_aux_loss is None else calc_aux_loss:
            loss = self.calc_aux_loss(logits, reduce_aux_kl_loss)
        return (one_hot, indices, loss) if return_indices else (one_hot, loss)

    @torch.no_grad()
    def encode(self, logits: Tensor, *, mask: Tensor | None = None, lens: Tensor | None = None) -> Tensor:
        """Return the indices (...) of the more likely value of each bit of logits (..., bits). No state changes.

        They are those of `forward` with deterministic=True. mask, lens: as for `forward`.
        """
        return self.sample(self._masked(logits, mask, lens), deterministic=True)

    def _masked(self, logits: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor:
        """Return logits that are NaN in the rows outside the mask."""
        if mask is None and lens is None:
            return logits
        layout = Layout.of(logits, self.bits)
        rows_mask = layout.rows_mask(mask, lens)
        assert rows_mask is not None
        return torch.where(layout.indices(rows_mask)[..., None], logits, torch.nan)

    def _bits_of(self, indices: Tensor) -> Tensor:
        self.follow_(indices.device)
        return indices.unsqueeze(-1).bitwise_and(self.power_two) != 0


class _Soft(torch.autograd.Function):
    """One-hot vectors with the gradient of the probabilities G of all codes."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, one_hot: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return one_hot.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the logits.

        sum_k grad_k G_k is linear in each p_b: the codes are folded bit by bit from the highest, and that is
        differentiated.
        """
        (logits,) = ctx.saved_tensors
        p = at_least_float32(logits).sigmoid()
        halves, table = [], grad.to(p.dtype)
        for b in reversed(range(p.shape[-1])):
            low, high = table.chunk(2, -1)
            halves.append((low, high))
            table = torch.lerp(low, high, p[..., b : b + 1])
        weight, slopes = torch.ones_like(table), []
        for b, (low, high) in enumerate(reversed(halves)):
            slopes.append((weight * (high - low)).sum(-1))
            weight = torch.cat([weight * (1 - p[..., b : b + 1]), weight * p[..., b : b + 1]], -1)
        return (torch.stack(slopes, -1) * p * (1 - p)).to(logits.dtype), None
