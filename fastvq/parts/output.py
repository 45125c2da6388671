"""The output of a quantizer whose indices are known: codes, with a gradient, and their distance from the vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.functional.quantize import quantize
from fastvq.functional.soft_assign import soft_lookup

from .estimators import directional_reparam, rotate_to, straight_through, synchronous
from .heads import behind_each_other
from .losses import squared_errors
from .tables import Shared, Table


class Output(NamedTuple):
    """What `Estimator.output` returns."""

    quantized: Tensor  # (C, R, D), or (C, R, k, D), dtype of x
    error: Tensor  # (), or (C, R, k)


class Estimator(NamedTuple):
    """How gradients pass a codebook.

    Args:
        kind: "ste", "rotation" or "directional", see `fastvq.parts.estimators`.
        noise_variance: of "directional".
        sync_update_v: share of the output's gradient for codes that are learned, beside x's.
        route: whether x gets the output's gradient at all; if not, codes that are learned do.
        soft_temperature: where x isn't routed to, it gets the gradient of the soft assignment with this temperature
            instead (`fastvq.soft_lookup`): straight-through Gumbel-softmax, for indices that were sampled.
    """

    kind: str = "rotation"
    noise_variance: float = 5e-3
    sync_update_v: float = 0.0
    route: bool = True
    soft_temperature: float | None = None

    def output(self, x: Tensor, table: Table, indices: Tensor, *, pulled: bool) -> Output:
        """The codes of rows x (C, R, D), and the mean squared error of the rows with a code.

        Args:
            x: differentiated through the estimator and the error.
            table: of the codes.
            indices: (C, R), or (C, R, k) for top-k, whose errors are those of every code, (C, R, k).
            pulled: whether the codes learn by gradient: from the error, and from the output where x doesn't ask for
                its gradient or by sync_update_v.
        """
        routed = self.route and x.requires_grad
        if isinstance(table, Shared) and indices.dim() == 2 and self.kind != "directional":
            quantized, error = self._fused(x, table, indices, pulled)
            if not routed and self.soft_temperature is not None:
                quantized = self._soft(x, table, indices)
            elif not routed:
                quantized = table.lookup(indices).to(x.dtype) if pulled else quantized.detach()
        else:
            quantized, error = self._composed(x, table, indices, pulled, routed)
        if routed and pulled and self.sync_update_v > 0:
            quantized = synchronous(quantized, table.lookup(indices), self.sync_update_v)
        return Output(quantized, error)

    def _soft(self, x: Tensor, table: Shared, indices: Tensor) -> Tensor:
        assert self.soft_temperature is not None
        heads = zip(x, table.codes, indices, strict=True)
        scale = 1 / self.soft_temperature
        return torch.stack([soft_lookup(*head, metric=table.soft_metric, scale=scale) for head in heads])

    def _fused(self, x: Tensor, table: Shared, indices: Tensor, pulled: bool) -> Output:
        codes = table.codes.flatten(0, 1)
        quantized, _, error = quantize(
            x.flatten(0, 1),
            codes if pulled else codes.detach(),
            gradient=self.kind,
            commitment_weight=1.0,
            codebook_weight=1.0 if pulled else 0.0,
            indices=behind_each_other(indices, table.size),
        )
        # Pulled, both losses are one mean with both sides free: its value is counted once.
        return Output(quantized.view(x.shape), error - error.detach() / 2 if pulled else error)

    def _composed(self, x: Tensor, table: Table, indices: Tensor, pulled: bool, routed: bool) -> Output:
        codes = table.lookup(indices)
        codes = codes if pulled else codes.detach()
        rows = x if indices.dim() == 2 else x.unsqueeze(2).expand(*indices.shape, x.shape[-1])
        errors = squared_errors(rows, codes, indices)
        if indices.dim() == 2:
            errors = errors.sum() / (indices >= 0).sum().clamp_min(1)
        if not routed:
            return Output(codes.to(x.dtype), errors)
        if self.kind == "directional":
            absent = (indices < 0).unsqueeze(-1)
            # Filled on both sides: what isn't finite would pass the backward as 0 * inf.
            quantized = directional_reparam(rows.masked_fill(absent, 0), codes, self.noise_variance)
            return Output(quantized.masked_fill(absent, 0), errors)
        estimate = rotate_to if self.kind == "rotation" else straight_through
        return Output(estimate(rows, codes, indices), errors)
