"""Matrix units, modeled: what replaces `tl.dot` in the interpreter, so that the kernels meet their arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from triton.runtime import interpreter

from fastvq.backends.triton import interpreted


def tensor_core(a, b, c, *, block, guard):
    """Return a b + c as NVIDIA's tensor cores compute it from float16.

    `block` exact products and the sum so far are aligned to the largest of them, truncated `guard` bits below
    float32's last, and added; the sum is truncated to float32. Source: Khattak and Mikaitis, arXiv 2512.07004.
    """
    a, b, total = a.astype(np.float64), b.astype(np.float64), c.astype(np.float64)
    for first in range(0, a.shape[1], block):
        products = a[:, None, first : first + block] * b.T[None, :, first : first + block]
        terms = np.concatenate([products, total[:, :, None]], 2)
        quantum = np.ldexp(1.0, exponent(np.abs(terms).max(2)) - 23 - guard)[:, :, None]
        total = cut((np.trunc(terms / quantum) * quantum).sum(2))
    return total.astype(np.float32)


def exponent(values):
    """Return the exponent of the leading bit; a small one for zero."""
    return np.maximum(np.frexp(values)[1] - 1, -133)


def cut(values):
    """Round to float32 towards zero."""
    quantum = np.ldexp(1.0, exponent(np.abs(values)) - 23)
    return np.trunc(values / quantum) * quantum


def at_the_limit(a, b, c, *, share):
    """Return a b + c with an error of `share` of the bound, up or down by turns of the column.

    Every unit of the bound is used up; products with zero are exact.
    """
    products = ((a != 0).any(0) & (b != 0).any(1)).sum()
    a, b = a.astype(np.float64), b.astype(np.float64)
    exact, size = a @ b, np.abs(a) @ np.abs(b)
    sign = np.where(np.arange(b.shape[1]) % 3 == 0, 1.0, -1.0)
    return (exact + c + share * 2.0**-22 * products * size * sign).astype(np.float32)


def flushing(a, b, c):
    """Replace float16 subnormals by zero, as some AMD units do."""
    a, b = (np.where(np.abs(t.astype(np.float32)) < 2.0**-14, 0, t).astype(np.float64) for t in (a, b))
    return (a @ b + c).astype(np.float32)


MODELS = {
    "A100": lambda a, b, c: tensor_core(a, b, c, block=8, guard=1),
    "H100": lambda a, b, c: tensor_core(a, b, c, block=16, guard=2),
    "at the limit": lambda a, b, c: at_the_limit(a, b, c, share=0.9),
    "flushing": flushing,
}


def use(monkeypatch, model):
    """Replace the interpreter's product by `model` for this test; returns a list that counts its calls."""
    calls = []

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        assert a.data.dtype == b.data.dtype == np.float16, "the scans multiply float16"
        calls.append(a.data.shape)
        return interpreter.TensorHandle(model(a.data, b.data, d.data), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    return calls


needs_interpreter = pytest.mark.skipif(not interpreted(), reason="a model of the matrix unit needs the interpreter")
