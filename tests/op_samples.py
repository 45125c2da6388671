"""Small calls of every op: each dtype, with and without heads, masks and rows."""

from __future__ import annotations

import torch

from fastvq.backends import reference

from .cases import DTYPES, generator


def sample_inputs():
    """Yield (op, arguments, keyword arguments)."""
    g = generator()

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=g).to(dtype)

    for dtype in DTYPES:
        yield "search", (normal(7, 5, dtype=dtype), normal(4, 5)), {}
    yield "search", (normal(7, 5), normal(4, 5)), {"metric": "dot"}
    yield "search", (normal(2, 7, 5), normal(2, 4, 5, dtype=torch.float16)), {"metric": "l2"}
    yield "search", (normal(5, 7).T, normal(1, 5).expand(3, 5)), {}
    yield "search", (normal(0, 5), normal(4, 5)), {}
    mask = torch.tensor([True, False, True, True, False, True, True])
    yield "search", (normal(7, 5), normal(4, 5)), {"mask": mask}
    yield "search", (normal(2, 7, 5), normal(2, 4, 5)), {"mask": torch.stack([mask, ~mask])}
    yield "residual_search", (normal(7, 5), [normal(3, 4, 5)]), {"mask": mask}
    yield "residual_search", (normal(7, 5), [normal(4, 5), normal(2, 3, 5)]), {"metric": "dot", "mask": mask}
    for dtype in DTYPES:
        yield "topk_search", (normal(7, 5, dtype=dtype), normal(4, 5), 3), {"mask": mask}
    yield "topk_search", (normal(2, 7, 5), normal(2, 4, 5), 4), {"metric": "dot", "mask": torch.stack([mask, ~mask])}
    yield "topk_search", (normal(0, 5), normal(4, 5), 1), {}
    for dtype in DTYPES:
        yield "sample", (normal(7, 5, dtype=dtype), normal(4, 5)), {"temperature": 0.5, "seed": torch.tensor(1 << 40)}
    options = {"temperature": 2.0, "seed": torch.tensor(-3), "metric": "dot"}
    yield "sample", (normal(2, 7, 5), normal(2, 4, 5)), options
    yield "residual_search", (normal(7, 5), [normal(3, 4, 5)]), {}
    yield "residual_search", (normal(7, 5, dtype=torch.bfloat16), [normal(1, 1, 5)]), {}
    indices = torch.tensor([0, 1, -1, 3, 3, 3, 0])
    for dtype in DTYPES:
        x, codebook = normal(7, 5, dtype=dtype), normal(4, 5)
        yield "quantize_forward", (x, codebook, indices, True), {}
        codes = codebook[indices.clamp_min(0)].to(torch.promote_types(dtype, torch.float32))
        grads = (normal(7, 5, dtype=dtype), torch.ones((), dtype=codes.dtype))
        options = {"gradient": "rotation", "commitment_weight": 0.25}
        yield "quantize_backward", (x, codes, indices, *grads), options
    for dtype in DTYPES:
        x, chosen = normal(7, 5, dtype=dtype), torch.stack([indices, indices.flip(0)], 1)
        codebooks = [normal(4, 5), normal(6, 5)] if dtype is torch.float32 else [normal(2, 4, 5)]
        yield "residual_quantize_forward", (x, codebooks, chosen, True), {}
        grads = (normal(7, 5, dtype=dtype), torch.ones(2, dtype=torch.promote_types(dtype, torch.float32)))
        options = {"gradient": "rotation", "commitment_weight": 0.25}
        yield "residual_quantize_backward", (x, codebooks, chosen, *grads), options
    for dtype in DTYPES:
        yield "accumulate", (normal(7, 5, dtype=dtype), torch.tensor([0, 1, -1, 3, 3, 3, 0]), 4), {}
    yield "accumulate", (normal(0, 5), torch.empty(0, dtype=torch.int64), 2), {}
    for dtype in (torch.float32, torch.float64):
        x, kept, settings = normal(2, 7, 5, dtype=dtype), torch.stack([mask, ~mask]), {"scale": 2.0, "floor": 1e-5}
        yield "binary_assign_forward", (x, kept), settings
        grads = (normal(2, 7, dtype=dtype), normal(2, 32, dtype=dtype))
        yield "binary_assign_backward", (x, None, *grads), settings
        yield "binary_assign_backward", (x, kept, None, grads[1]), settings
    for dtype in (torch.float32, torch.float64):
        x, codebook = normal(2, 7, 5, dtype=dtype), normal(4, 5)
        settings = {"metric": "distance", "scale": 2.0, "floor": 1e-5}
        yield "soft_assign_forward", (x, codebook, kept), {**settings, "statistics": True}
        chosen = torch.stack([indices, indices.flip(0)])
        yield "soft_assign_forward", (x, codebook, None, chosen), {**settings, "metric": "dot", "statistics": False}
        sums = reference.soft_assign_forward(x, codebook, kept, **settings, statistics=False)[:2]
        grads = [normal(*shape, dtype=dtype) for shape in ((2, 7), (2, 7), (2, 4), (2, 7, 5))]
        needs = {"need_x": True, "need_codebook": True}
        yield "soft_assign_backward", (x, codebook, kept, *sums, chosen, *grads), settings | needs
        needs = {"need_x": False, "need_codebook": True}
        yield "soft_assign_backward", (x, codebook, kept, *sums, None, *grads[:2], None, None), settings | needs
    for dtype in DTYPES:
        yield "min_distance_", (normal(7).abs(), normal(7, 5, dtype=dtype), normal(2, 5)), {}
    yield "min_distance_", (normal(14).abs()[::2], normal(5, 7).T, normal(1, 5, dtype=torch.float16)), {}
    yield "min_distance_", (normal(0), normal(0, 5), normal(1, 5)), {}
    for shape in [(6, 5), (1, 1)]:
        state = [normal(*shape), normal(shape[0]).abs(), normal(*shape), normal(shape[0]).abs(), normal(*shape)]
        yield "ema_update_", tuple(state), {"decay": 0.9, "eps": 1e-5}
    yield "ema_update_", tuple(state), {"decay": 0.9, "eps": 1e-5, "weight": normal(1).abs()}
