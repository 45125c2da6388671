"""Codebooks that a caller keeps packed: the indices of the tensors that they stand for, after every visible write."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest
import torch

import fastvq
from fastvq import PackedCodebook
from fastvq.backends import native

from ..cases import ADVERSARIAL, DTYPES, generator

built = pytest.mark.skipif(not native.build_record()["built"], reason="no native library was built")


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("data", sorted(ADVERSARIAL))
def test_has_the_indices_of_its_tensor(data, metric):
    x, codes = ADVERSARIAL[data](300, 180, 20, generator())
    packed, stages = PackedCodebook(codes), list(codes.split((100, 80)))
    stack = PackedCodebook(stages, metric=metric)
    for rows in (slice(0, 1), slice(3, 19), slice(0, 75), slice(300)):
        mask = torch.arange(len(x[rows])) % 4 > 0
        for options in ({}, {"mask": mask}):
            found = fastvq.search(x[rows], packed, metric=metric, **options)
            assert torch.equal(found, fastvq.search(x[rows], codes, metric=metric, **options))
            found = fastvq.residual_search(x[rows], stack, metric=metric, **options)
            assert torch.equal(found, fastvq.residual_search(x[rows], stages, metric=metric, **options))
        found = fastvq.topk_search(x[rows], packed, 5, metric=metric)
        assert torch.equal(found, fastvq.topk_search(x[rows], codes, 5, metric=metric))


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("data", sorted(ADVERSARIAL))
def test_a_few_rows_among_many_codes(data, metric):
    """Here the scan of int8 codes begins: for K x D large enough beside N."""
    x, codes = ADVERSARIAL[data](9, 1200, 129, generator())
    packed = PackedCodebook(codes, metric=metric)
    expected = fastvq.search(x, codes, metric=metric)
    for rows in range(1, 10):
        assert torch.equal(fastvq.search(x[:rows], packed, metric=metric), expected[:rows])


def test_codes_that_int8_cannot_tell_apart():
    """Rows that int8 leaves to other arithmetic, until it is given up, and after that."""
    g = generator()
    codes = torch.randn(8, 64, generator=g).repeat_interleave(100, 0) + 1e-4 * torch.randn(800, 64, generator=g)
    x = codes[::97] + 1e-5 * torch.randn(9, 64, generator=g)
    packed, expected = PackedCodebook(codes), fastvq.search(x, codes)
    for _ in range(3):
        assert torch.equal(torch.cat([fastvq.search(row, packed) for row in x.split(1)]), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_strides_and_heads(dtype):
    g = generator()
    x, codes = torch.randn(2, 30, 7, generator=g).to(dtype), torch.randn(2, 7, 12, generator=g).to(dtype).mT
    packed = PackedCodebook(codes)
    assert torch.equal(fastvq.search(x, packed), fastvq.search(x, codes))
    assert torch.equal(fastvq.topk_search(x.mT.contiguous().mT, packed, 12), fastvq.topk_search(x, codes, 12))
    assert torch.equal(fastvq.residual_search(x[0], packed), fastvq.residual_search(x[0], codes))
    for rows in (x[:, :0], x.float().requires_grad_()):
        assert torch.equal(fastvq.search(rows, packed), fastvq.search(rows, codes))


WRITES = {
    "in place": lambda codes: codes.mul_(-1),
    "a view": lambda codes: codes[3:].view(-1).add_(1),
    "an optimizer": lambda codes: torch._foreach_add_([codes], 1.5),
    "fastvq": lambda codes: fastvq.ema_update_(
        codes, torch.ones(40), codes.flip(0) * 2, torch.zeros(40), torch.zeros_like(codes), decay=1.0, eps=1e-5
    ),
    "in inference mode": lambda codes: torch.inference_mode()(codes.neg_)(),
    "another memory": lambda codes: setattr(codes, "data", codes.detach().flip(0)),
    "other strides": lambda codes: setattr(codes, "data", codes.detach().reshape(6, 40).mT),
    "memory that is freed": lambda codes: codes.resize_(0).resize_(40, 6).normal_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_are_seen(write):
    torch.manual_seed(0)
    codes, x = torch.randn(40, 6), torch.randn(50, 6)
    packed, stack = PackedCodebook(codes), PackedCodebook([codes, codes.clone()])
    for _ in range(3):
        write(codes)
        assert torch.equal(fastvq.search(x, packed), fastvq.search(x, codes))
        assert torch.equal(fastvq.residual_search(x, stack), fastvq.residual_search(x, stack.codebook))


@built
def test_writes_past_the_version_counter_are_seen_after_repacking():
    torch.manual_seed(0)
    codes, x = torch.randn(40, 6), torch.randn(50, 6)
    packed, before = PackedCodebook(codes), fastvq.search(x, codes)
    codes.data.mul_(-1)
    codes.numpy()[0] = 9
    assert torch.equal(fastvq.search(x, packed), before)  # the codes as they were packed, never a mixture
    packed.repack()
    assert torch.equal(fastvq.search(x, packed), fastvq.search(x, codes))


def test_other_backends_read_the_tensor(backend):
    codes, x = torch.randn(40, 6), torch.randn(50, 6)
    packed, stack = PackedCodebook(codes), PackedCodebook([codes, codes[:9]])
    codes.data.neg_()
    packed.repack()
    stack.repack()
    with fastvq.use_backend(backend):
        assert torch.equal(fastvq.search(x, packed), fastvq.search(x, codes))
        assert torch.equal(fastvq.topk_search(x, packed, 2), fastvq.topk_search(x, codes, 2))
        assert torch.equal(fastvq.residual_search(x, stack), fastvq.residual_search(x, stack.codebook))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda packed: pickle.loads(pickle.dumps(packed))])
def test_copies(copied):
    codes, x = torch.randn(40, 6), torch.randn(50, 6)
    packed = PackedCodebook(codes, metric="dot")
    other = copied(packed)
    assert other.metric == "dot"
    other.codebook.neg_()
    assert torch.equal(fastvq.search(x, other), fastvq.search(x, other.codebook))
    assert torch.equal(fastvq.search(x, packed), fastvq.search(x, codes))


def test_in_a_compiled_program():
    codes, x = torch.randn(40, 6), torch.randn(50, 6)
    packed = PackedCodebook(codes)

    @torch.compile(fullgraph=True, backend="eager")
    def find(x):
        return fastvq.search(x, packed), fastvq.residual_search(x, PACKED_STACK)

    for _ in range(2):
        expected = fastvq.search(x, codes), fastvq.residual_search(x, PACKED_STACK.codebook)
        assert all(map(torch.equal, find(x), expected))
        codes.data.neg_()  # it reads the tensor


PACKED_STACK = PackedCodebook([torch.eye(6), torch.eye(6)[:2] / 2])


def test_threads_share_one():
    codes, x = torch.randn(200, 16), torch.randn(400, 16)
    packed, expected, wrong = PackedCodebook(codes), fastvq.search(x, codes, metric="dot"), []

    def run():
        for _ in range(20):
            if not torch.equal(fastvq.search(x, packed, metric="dot"), expected):
                wrong.append(1)
            codes.add_(0)  # a new version: somebody packs again while others search

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@built
def test_is_freed_with_its_object():
    x = torch.randn(3, 6)
    packed = PackedCodebook(torch.randn(40, 6))
    number, held = packed.number_for(x)
    assert torch.ops.fastvq.packed_search(x, number).shape == (3,)
    packed.codebook.neg_()
    later = packed.number_for(x)[0]
    assert later != number
    del held
    gc.collect()
    with pytest.raises(RuntimeError, match="no packed codebook has the number"):
        torch.ops.fastvq.packed_search(x, number)
    del packed
    gc.collect()
    with pytest.raises(RuntimeError, match="no packed codebook has the number"):
        torch.ops.fastvq.packed_search(x, later)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, c: PackedCodebook(c, metric="cosine"), ValueError, "metric: must be 'l2' or 'dot', got 'cosine'"),
        (lambda x, c: PackedCodebook([]), ValueError, "codebook: must hold at least one stage"),
        (lambda x, c: PackedCodebook(c[0]), ValueError, r"codebook: must have shape \(K, D\)"),
        (lambda x, c: PackedCodebook(c.long()), TypeError, "codebook: must be float32"),
        (lambda x, c: PackedCodebook(c.tolist()), TypeError, "codebook: must be a tensor or a sequence of tensors"),
        (lambda x, c: PackedCodebook(c[:0]), ValueError, "codebook: must hold at least one code"),
        (lambda x, c: PackedCodebook([c, c[:, :2]]), ValueError, "codebook: must have one dimension D"),
        (lambda x, c: PackedCodebook([c, c.double()]), TypeError, "codebook: must have one dtype"),
        (lambda x, c: fastvq.search(x[:, :2], PackedCodebook(c)), ValueError, "codebook: must have the dimension of x"),
        (lambda x, c: fastvq.search(x.long(), PackedCodebook(c)), TypeError, "x: must be float32"),
        (lambda x, c: fastvq.search(x, PackedCodebook(c), metric="cos"), ValueError, "metric: must be 'l2' or 'dot'"),
        (lambda x, c: fastvq.search(x, PackedCodebook([c, c])), ValueError, "codebook: must be packed from one tensor"),
        (lambda x, c: fastvq.search(x, PackedCodebook(c[None])), ValueError, r"codebook: must have shape \(K, D\)"),
        (lambda x, c: fastvq.topk_search(x, PackedCodebook(c), 99), ValueError, r"k: must lie in \[1, 40\]"),
        (lambda x, c: fastvq.residual_search(x, PackedCodebook(c)), ValueError, r"codebooks: must have shape"),
        (lambda x, c: fastvq.residual_search(x[0], PackedCodebook([c])), ValueError, r"x: must have shape \(N, D\)"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(torch.randn(5, 6), torch.randn(40, 6))


def test_an_inference_tensor_counts_no_versions():
    with torch.inference_mode():
        codes = torch.randn(40, 6)
    with pytest.raises(ValueError, match=r"^codebook: must count its versions"):
        PackedCodebook(codes)
