"""Index backpropagation: the nearest code, with a gradient for all codes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastvq.functional.quantize import rows_of_mask
from fastvq.functional.soft_assign import soft_lookup
from fastvq.ops import search


class Looked(NamedTuple):
    """What `index_backpropagation` returns."""

    quantized: Tensor  # (..., D), dtype of x
    indices: Tensor  # (...) int64


def index_backpropagation(
    x: Tensor, codebook: Tensor, *, metric: str = "dot", scale: float = 1.0, mask: Tensor | None = None
) -> Looked:
    """The best code of each vector; its choice is differentiated as if it were soft, so that every code learns.

        p_n = softmax_k(scale s_nk),   index_n = argmax_k s_nk,   s_nk = <x_n, e_k> for "dot", -|x_n - e_k|^2 for "l2"
        quantized_n = e_{index_n},   gradient as if it were  sum_k (onehot_nk + p_nk - sg[p_nk]) e_k

    Args:
        x: (..., D), any floating dtype. codebook: (K, D). Both get gradients.
        metric, scale: of the choice.
        mask: bool (...), the vectors that count. The others, and those that are not finite, have index -1, a zero
            output and no gradient.

    Raises:
        TypeError, ValueError: what doesn't fit, by name.

    Numerics: the choice is exact (`fastvq.search`); memory is O(N D + K D) and a tile, forward and backward.

    Source: Shi et al., Scalable Image Tokenization with Index Backpropagation Quantization, 2024, equations 3 and 4.
    """
    rows = x.reshape(-1, x.shape[-1])
    counted = None if mask is None else rows_of_mask(mask, x.shape[:-1])
    indices = search(rows.detach(), codebook.detach(), metric=metric, mask=counted).reshape(x.shape[:-1])
    return Looked(soft_lookup(x, codebook, indices, metric=metric, scale=scale), indices)
