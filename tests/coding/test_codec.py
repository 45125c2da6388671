"""Encoding and decoding of indices: round trips, damaged and hostile files, sizes as the models predict."""

from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc

import numpy as np
import pytest
import torch

import fastvq
from fastvq import coding
from fastvq.coding import codec, container, models, tree
from fastvq.coding.codec import LARGEST_BATCH, _batches, _neighbors
from fastvq.coding.huffman import huffman_bits
from fastvq.errors import CodingError

from ..cases import generator

MODELS = ("static", "adaptive")


def correlated(n, height, width, size, seed=0):
    """Return indices in patches, as in images: equal to the left or upper neighbor, or new."""
    random = np.random.default_rng(seed)
    indices = random.zipf(1.5, (n, height, width)) % size
    choice = random.random((n, height, width))
    for y in range(height):
        for x in range(width):
            if x:
                indices[:, y, x] = np.where(choice[:, y, x] < 0.4, indices[:, y, x - 1], indices[:, y, x])
            if y:
                indices[:, y, x] = np.where(choice[:, y, x] > 0.7, indices[:, y - 1, x], indices[:, y, x])
    return torch.from_numpy(indices)


SHAPES = [(0,), (1,), (50,), (3, 0), (0, 4, 4), (1, 1), (7, 20), (5, 4, 6), (200, 3, 3), (2, 3, 4, 5), (2, 1, 3, 1, 2)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 37, 512, 1000])
def test_round_trip(size, model):
    for shape in SHAPES:
        indices = torch.randint(0, size, shape, generator=generator())
        data = coding.encode(indices, size, model=model)
        back = coding.decode(data)
        assert back.dtype == torch.int64
        assert torch.equal(back, indices)
        header = coding.read_header(data)
        assert (header.model, header.codebook_size, header.shape) == (model, size, shape)


@pytest.mark.parametrize("model", MODELS)
def test_excluded_rows_and_large_codebooks(model):
    for size in (1, 6, 8, 100_003, 1 << 24):
        indices = torch.randint(-1, size, (4, 5, 6), generator=generator())
        assert torch.equal(coding.decode(coding.encode(indices, size, model=model)), indices)


def test_a_thousand_images():
    indices = correlated(1000, 7, 7, 512)
    sizes = {}
    for model in MODELS:
        data = coding.encode(indices, 512, model=model)
        sizes[model] = len(data)
        assert torch.equal(coding.decode(data), indices)
    assert sizes["adaptive"] < 0.9 * sizes["static"] < 0.8 * indices.numel() * 9 / 8


@pytest.mark.parametrize("model", MODELS)
def test_the_file_is_as_long_as_the_model_predicts(model):
    """Within half a per cent and 64 bytes, including the static model's frequencies."""
    for indices, size in (
        (correlated(300, 7, 7, 512), 512),
        (correlated(1, 1, 30, 64), 64),
        (correlated(2, 40, 40, 9), 9),
    ):
        measured = coding.measure(indices, size)
        ideal = measured[model]["bits_per_index"] * indices.numel() / 8
        assert ideal <= measured[model]["bytes"] <= 1.005 * ideal + 64
        assert measured["uniform"]["bits_per_index"] == np.log2(size)


def test_static_bits_are_the_entropy_of_the_file_and_its_table():
    indices = correlated(400, 7, 7, 64)
    frequencies = torch.bincount(indices.flatten(), minlength=64).double() / indices.numel()
    entropy = -(frequencies * frequencies.clamp_min(1e-300).log2()).sum().item()
    bits = coding.measure(indices, 64)["static"]["bits_per_index"]
    table = 63 * np.log2(indices.numel()) / indices.numel()
    assert entropy < bits < entropy + table + 1e-3


def test_the_adaptive_model_learns_a_rule_that_the_static_one_cannot_see():
    indices = torch.arange(64).repeat(40)[None]
    measured = coding.measure(indices, 64)
    assert measured["static"]["bits_per_index"] > 6.0
    assert measured["adaptive"]["bits_per_index"] < 1.5


def test_the_same_bytes_from_any_dtype_and_layout():
    indices = correlated(20, 7, 7, 200)
    expected = coding.encode(indices, 200)
    assert coding.encode(indices.int(), 200) == expected
    assert coding.encode(indices.to(torch.uint8), 200) == expected
    assert coding.encode(indices.transpose(1, 2).contiguous().transpose(1, 2), 200) == expected


def test_equal_latents_give_the_same_file_on_every_backend_and_batch_split(backend):
    """The files equal those of the specification's indices, with 1 and 2 threads and in batches of any size."""
    g = generator()
    codebook, latents = torch.randn(64, 16, generator=g), torch.randn(30, 49, 16, generator=g)
    expected = coding.encode(fastvq.backends.reference.search(latents.flatten(0, 1), codebook).reshape(30, 7, 7), 64)
    with fastvq.use_backend(backend):
        for threads, split in ((1, 30), (2, 30), (2, 1), (1, 7)):
            torch.set_num_threads(threads)
            parts = [fastvq.search(part.flatten(0, 1), codebook) for part in latents.split(split)]
            assert coding.encode(torch.cat(parts).reshape(30, 7, 7), 64) == expected


FILES_OF_VERSION_1 = {
    "static": "4656511a010001023132333435363738050000000200000004000000878f9a611dc93a410d4a2acc",
    "adaptive": "4656511a0101010231323334353637380500000002000000040000000b5ed63678b4b8d7067ec65a",
}


def test_the_format_stays_readable():
    """Files as version 1 writes them: the indices decoded from old files must never change."""
    indices = torch.tensor([[0, 1, 2, 3], [3, 3, -1, 0]])
    for model, data in FILES_OF_VERSION_1.items():
        assert coding.encode(indices, 5, model=model, fingerprint=b"12345678").hex() == data
        assert torch.equal(coding.decode(bytes.fromhex(data)), indices)


def mutated(data, choose):
    """Damage a file at random: bits, bytes, length, or a piece from another place."""
    spoilt = bytearray(data)
    kind = choose.randrange(6)
    if kind == 0:
        spoilt[choose.randrange(len(spoilt))] ^= 1 << choose.randrange(8)
    elif kind == 1:
        del spoilt[choose.randrange(len(spoilt)) :]
    elif kind == 2:
        spoilt += bytes(choose.randrange(256) for _ in range(choose.randrange(1, 20)))
    elif kind == 3:
        spoilt[choose.randrange(min(32, len(spoilt)))] = choose.randrange(256)
    elif kind == 4:
        at, other = choose.randrange(len(spoilt)), choose.randrange(len(spoilt))
        spoilt[at : at + 8] = data[other : other + 8]
    else:
        del spoilt[choose.randrange(len(spoilt))]
    return bytes(spoilt)


def resealed(data):
    """Return data with a matching digest, as an attacker would write them."""
    return data[: -container._DIGEST] + container.digest(data[: -container._DIGEST])


@pytest.mark.parametrize("model", MODELS)
def test_mutated_files_are_refused_or_decode_to_the_same(model):
    indices = correlated(20, 5, 5, 40)
    data = coding.encode(indices, 40, model=model)
    choose = random.Random(0)
    refused = 0
    for _ in range(1000):
        spoilt = mutated(data, choose)
        try:
            assert torch.equal(coding.decode(spoilt), indices)
        except CodingError:
            refused += 1
    assert refused > 950


@pytest.mark.parametrize("model", MODELS)
def test_hostile_files_are_bounded(model):
    """Nonsense with matching digests gives an error or other indices, in bounded memory."""
    data = coding.encode(correlated(20, 5, 5, 40), 40, model=model)
    choose = random.Random(1)

    def decode_one() -> None:
        with contextlib.suppress(CodingError):
            indices = coding.decode(resealed(mutated(data, choose)), max_indices=1 << 13)
            assert indices.numel() <= 1 << 13

    for _ in range(270):
        decode_one()
    tracemalloc.start()  # which makes Python ten times slower
    try:
        for _ in range(30):
            decode_one()
        for shape in [(1 << 31,), (1 << 16, 1 << 16), (2, 1 << 30), (0, 1 << 31), (1 << 31, 0), (1 << 31, 1 << 31, 0)]:
            for size in (1, 2, 512, 1 << 24):
                header = container.Header(model, False, size, shape, bytes(8))
                hostile = container.pack(header, b"\xff" * 64)
                if 0 in shape and len(shape) == 2:
                    assert coding.decode(hostile).shape == shape
                else:
                    with pytest.raises(CodingError, match=r"codes|indices|shape"):
                        coding.decode(hostile)
        assert tracemalloc.get_traced_memory()[1] < 700e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: b"PK" + d[2:], "not a file of fastvq indices"),
        (lambda d: b"", "not a file of fastvq indices"),
        (lambda d: d[:20], "truncated: 20 bytes"),
        (lambda d: d[:-1], "damaged or truncated"),
        (
            lambda d: resealed(d[:4] + b"\x03" + d[5:]),
            "written in version 3 of the format; this fastvq reads",
        ),
        (lambda d: resealed(d[:5] + b"\x07" + d[6:]), "invalid header: model 7"),
        (lambda d: resealed(d[:7] + b"\x00" + d[8:]), "0 axes"),
        (lambda d: resealed(d[:16] + struct.pack("<I", 0) + d[20:]), "a codebook of 0 codes"),
        (lambda d: resealed(d[:20] + struct.pack("<I", 1 << 30) + d[24:]), "more than .* bytes of coded data can hold"),
        (lambda d: resealed(d[:-10] + d[-8:]), "whole 32-bit words"),
    ],
)
def test_errors_of_damaged_files(change, message):
    data = coding.encode(correlated(20, 5, 5, 40), 40)
    with pytest.raises(CodingError, match=message):
        coding.decode(change(data))


@pytest.mark.parametrize(
    ("indices", "options", "message"),
    [
        (torch.tensor([0.5]), {}, "indices: must be integers, got torch.float32"),
        (torch.tensor([True]), {}, "indices: must be integers, got torch.bool"),
        (torch.tensor(3), {}, "indices: must have 1 to 8 axes"),
        (torch.tensor([8]), {}, r"indices: must lie in \[-1, 8\), got 8 to 8"),
        (torch.tensor([-2, 1]), {}, r"indices: must lie in \[-1, 8\), got -2 to 1"),
        (torch.tensor([1]), {"codebook_size": 0}, r"codebook_size: must lie in \[1, 16777216\], got 0"),
        (torch.tensor([1]), {"model": "zip"}, "model: must be one of static, adaptive, prior, got 'zip'"),
        (torch.tensor([1]), {"fingerprint": b"123"}, "fingerprint: must be 8 bytes, got 3"),
    ],
)
def test_encode_refuses_by_name(indices, options, message):
    with pytest.raises(CodingError, match=message):
        coding.encode(indices, **{"codebook_size": 8} | options)


def test_indices_of_another_model_are_refused():
    one, other = (fastvq.VectorQuantize(4, 8) for _ in range(2))
    data = coding.encode(torch.tensor([1, 2]), 8, fingerprint=coding.fingerprint(one))
    assert coding.decode(data, fingerprint=coding.fingerprint(one)).tolist() == [1, 2]
    assert coding.decode(data).tolist() == [1, 2]
    with pytest.raises(CodingError, match="indices of another model"):
        coding.decode(data, fingerprint=coding.fingerprint(other))
    before = coding.fingerprint(one)
    one.codebook[0, 0] += 1
    assert coding.fingerprint(one) != before


def test_no_more_indices_than_allowed():
    data = coding.encode(torch.zeros(100, dtype=torch.int64), 8)
    with pytest.raises(CodingError, match="100 indices, more than max_indices=99"):
        coding.decode(data, max_indices=99)


def test_files(tmp_path):
    path = tmp_path / "new" / "indices.fvq"
    data = coding.encode(torch.tensor([1, 2]), 8)
    coding.save(path, data)
    assert coding.load(path) == data
    assert [p.name for p in path.parent.iterdir()] == ["indices.fvq"]
    path.write_bytes(b"GIF89a")
    with pytest.raises(CodingError, match="not a file of fastvq indices"):
        coding.load(path)


def test_tree_of_an_alphabet():
    symbols = np.array([0, 1, 1, 4, 2, 4, 4])
    passing, right = tree.node_counts(symbols, 5)
    assert passing[1] == 7
    assert right[1] == 3  # 4 alone lies in the right half of 0 ... 7
    assert right[2] == 1
    assert right[4] == 2
    assert tree.branching_mask(np.array([0, 1]), 1, 5).tolist() == [True, False]
    assert [tree.depths(size) for size in (1, 2, 3, 512, 513)] == [0, 1, 2, 9, 10]


def test_probabilities_leave_every_decision_possible():
    model = models.Adaptive(4)
    nodes, none = np.array([1]), np.array([4])
    for _ in range(40_000):
        model.learn(nodes, none, none, np.array([1]))
    assert model.predict(nodes, none, none).tolist() == [models.ONE - models.LEAST]
    assert -np.log2(1 - models.LEAST / models.ONE) > models.LEAST_BITS


@pytest.mark.parametrize("alphabet", [4, 5000], ids=["forgets", "hashes"])
def test_one_at_a_time_equals_many_at_once(alphabet, monkeypatch):
    """The model is the same with Python integers and with arrays, in turn."""
    decisions = 3000
    monkeypatch.setattr(models, "_FORGET", 100)
    mixed, arrays = models.Adaptive(alphabet), models.Adaptive(alphabet)
    rng = np.random.default_rng(0)
    nodes = rng.integers(1, 1 << tree.depths(alphabet), decisions)
    symbols = rng.integers(0, min(alphabet, 3) + 1, (2, decisions))
    for step, (node, left, above, right) in enumerate(
        zip(nodes, *symbols, (rng.random(decisions) < 0.9).astype(np.int64), strict=True)
    ):
        at = [np.array([value]) for value in (node, left, above)]
        expected = arrays.predict(*at)
        arrays.learn(*at, np.array([right]))
        if step % 3:
            assert mixed.predict_one(int(node), int(left), int(above)) == expected[0]
            mixed.learn_few([(int(node), int(left), int(above))], [int(right)])
        else:
            assert mixed.predict(*at) == expected
            mixed.learn(*at, np.array([right]))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [(1, 40), (7, 30, 2), (12, 9), (40, 3, 3)], ids=str)
def test_a_few_side_by_side_equal_many(model, shape, monkeypatch):
    monkeypatch.setattr(models, "_FORGET", 20)
    indices = torch.randint(-1, 5, shape, generator=generator()).square() - 1
    expected = []
    for few in (0, codec.FEW_SAMPLES, 64):
        monkeypatch.setattr(codec, "FEW_SAMPLES", few)
        expected.append(coding.encode(indices, 16, model=model))
        assert torch.equal(coding.decode(expected[-1]), indices)
    assert expected[0] == expected[1] == expected[2]


def test_a_codebook_size_of_any_integer_type(tmp_path):
    indices = torch.tensor([[3, 0, 4]])
    expected = coding.encode(indices, 5)
    for size in (np.int64(5), indices.max() + 1):
        assert coding.encode(indices, size) == expected
    coding.save(str(tmp_path / "c.fvq"), expected)
    assert coding.load(str(tmp_path / "c.fvq")) == expected


def test_neighbors_and_batches():
    assert list(_neighbors((5, 2, 3))) == [(-1, -1), (0, -1), (1, -1), (-1, 0), (3, 1), (4, 2)]
    assert list(_neighbors((4,))) == [(-1, -1), (0, -1), (1, 0), (2, 1)]
    # Frames of 1 x 2: above lies the frame before.
    assert list(_neighbors((9, 2, 1, 2))) == [(-1, -1), (0, -1), (-1, 0), (2, 1)]
    sizes = [b.stop - b.start for b in _batches(300)]
    assert sizes[:5] == [1, 1, 2, 4, 8]
    assert max(sizes) == LARGEST_BATCH
    assert sum(sizes) == 300


def test_huffman_is_between_the_entropy_and_a_bit_more():
    assert huffman_bits(np.array([0] * 4 + [1] * 2 + [2, 3])) == 4 * 1 + 2 * 2 + 2 * 3
    assert huffman_bits(np.array([7, 7])) == 0
    assert huffman_bits(np.array([], np.int64)) == 0
    indices = correlated(100, 5, 5, 40)
    shares = torch.bincount(indices.flatten()).double() / indices.numel()
    entropy = -(shares * shares.clamp_min(1e-300).log2()).sum().item()
    assert entropy <= coding.measure(indices, 40)["huffman"]["bits_per_index"] < entropy + 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 512])
def test_the_most_extreme_honest_file_is_decoded(size, model):
    """Constant indices take the fewest bytes; a large file of a small codebook is padded up to the default limit."""
    count = (1 << 22) if size == 1 else (1 << 17) // max(1, (size - 1).bit_length())
    indices = torch.full((64, count // 64), size - 1)
    data = coding.encode(indices, size, model=model)
    assert torch.equal(coding.decode(data), indices)
    assert indices.numel() - codec.FREE_INDICES <= coding.MAX_INDICES_PER_BYTE * len(data)


@pytest.mark.parametrize("model", MODELS)
def test_padding_is_what_the_default_needs(model, monkeypatch):
    monkeypatch.setattr(codec, "FREE_INDICES", 1 << 8)
    indices = torch.zeros(64, 1 << 9, dtype=torch.int64)
    data = coding.encode(indices, 2, model=model)
    assert torch.equal(coding.decode(data), indices)
    monkeypatch.setattr(codec, "MAX_INDICES_PER_BYTE", 1 << 60)
    shorter = coding.encode(indices, 2, model=model)
    assert torch.equal(coding.decode(shorter), indices)
    monkeypatch.setattr(codec, "MAX_INDICES_PER_BYTE", 64)
    padded = coding.encode(indices, 2, model=model)
    assert len(padded) > len(shorter)
    assert 0 <= 64 * len(padded) + codec.FREE_INDICES - indices.numel() < 64 * 4
    assert torch.equal(coding.decode(padded, max_indices_per_byte=64), indices)
    with pytest.raises(CodingError, match=r"32768 indices in \d+ bytes, more than max_indices_per_byte=64"):
        coding.decode(shorter, max_indices_per_byte=64)
    assert torch.equal(coding.decode(shorter, max_indices_per_byte=1 << 12), indices)


@pytest.mark.parametrize(
    ("shape", "size", "limit"),
    [
        ((1 << 23,), 1, "max_indices"),
        ((1 << 22,), 512, "max_decisions"),
        ((1 << 22,), 1, "max_indices_per_byte"),
        ((1 << 21,), 2, "max_indices_per_byte"),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_a_hostile_file_is_refused_before_it_is_decoded(shape, size, limit, model, monkeypatch):
    monkeypatch.setattr(codec, "SymbolDecoder", lambda words: pytest.fail("it was decoded"))
    words = {"max_indices": 1 << 12, "max_decisions": 1 << 12, "max_indices_per_byte": 1 << 6}[limit]
    header = container.Header(model, False, size, shape, bytes(8))
    with pytest.raises(CodingError, match=rf"more than {limit}=\d+$"):
        coding.decode(container.pack(header, b"\xff" * 4 * words))


def test_limits_are_raised_by_options():
    indices = torch.zeros(100, dtype=torch.int64)
    data = coding.encode(indices, 4)
    for limit, least in (("max_indices", 100), ("max_decisions", 200)):
        assert torch.equal(coding.decode(data, **{limit: least}), indices)
        with pytest.raises(CodingError, match=f"more than {limit}={least - 1}"):
            coding.decode(data, **{limit: least - 1})


STAGES = [(4,), (1,), (3, 5), (16, 1, 7), (40,) * 4]
"""Sizes of several codebooks along the last axis."""


def staged(sizes, *shape, least=0):
    """Return indices (*shape, Q) of several codebooks."""
    return torch.stack([torch.randint(least, size, shape, generator=generator(size)) for size in sizes], -1)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sizes", STAGES, ids=str)
def test_several_codebooks_are_restored(sizes, model):
    for shape in ((0, 3), (1,), (30,), (70, 4), (3, 2, 3)):
        for least in (0, -1):
            indices = staged(sizes, *shape, least=least)
            data = coding.encode(indices, sizes, model=model)
            assert torch.equal(coding.decode(data), indices)
            header = coding.read_header(data)
            assert (header.codebook_size, header.shape, data[4]) == (sizes, (*shape, len(sizes)), 2)
            assert data == coding.encode(indices, [*sizes], model=model)


@pytest.mark.parametrize("model", MODELS)
def test_each_codebook_has_probabilities_of_its_own(model):
    """As one codebook, indices of four stages with a few codes each look like sixteen codes."""
    indices = torch.stack([torch.randint(4 * q, 4 * q + 4, (60, 8), generator=generator(q)) for q in range(4)], -1)
    apart, together = (len(coding.encode(indices, sizes, model=model)) for sizes in ((16,) * 4, 16))
    assert apart < 1.3 * indices.numel() * 2 / 8
    if model == "static":  # the adaptive one tells the codebooks by the index before
        assert together > 1.5 * apart


def test_the_adaptive_model_sees_the_codebook_before():
    first = torch.randint(0, 32, (100, 6), generator=generator())
    indices = torch.stack([first, (first * 5 + 3) % 32], -1)
    assert len(coding.encode(indices, (32, 32))) < 0.8 * len(coding.encode(indices, (32, 32), model="static"))


@pytest.mark.parametrize("model", MODELS)
def test_sizes_of_several_codebooks_are_measured(model):
    indices = staged((3, 40), 50, 4)
    measured = coding.measure(indices, (3, 40))
    assert measured["uniform"]["bits_per_index"] == pytest.approx((np.log2(3) + np.log2(40)) / 2)
    assert measured[model]["bytes"] == len(coding.encode(indices, (3, 40), model=model))
    assert measured["huffman"]["bits_per_index"] < measured["uniform"]["bits_per_index"] + 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [(7, 9), (40, 3)], ids=str)
def test_a_few_of_several_codebooks_equal_many(model, shape, monkeypatch):
    indices = staged((5, 1, 9), *shape, least=-1)
    expected = []
    for few in (0, 64):
        monkeypatch.setattr(codec, "FEW_SAMPLES", few)
        expected.append(coding.encode(indices, (5, 1, 9), model=model))
        assert torch.equal(coding.decode(expected[-1]), indices)
    assert expected[0] == expected[1]


FILES_OF_VERSION_2 = {
    "static": "4656511a020001033132333435363738050000000200000002000000020000000500000002000000"
    "57615e86852467e74f9f6ed7",
    "adaptive": "4656511a020101033132333435363738050000000200000002000000020000000500000002000000"
    "8cbbf13b19d4818c42f633b0",
}


def test_the_format_of_several_codebooks_stays_readable():
    indices = torch.tensor([[[0, 1], [2, 0]], [[3, 1], [4, -1]]])
    for model, data in FILES_OF_VERSION_2.items():
        assert coding.encode(indices, (5, 2), model=model, fingerprint=b"12345678").hex() == data
        assert torch.equal(coding.decode(bytes.fromhex(data)), indices)


@pytest.mark.parametrize("model", MODELS)
def test_mutated_files_of_several_codebooks_are_refused(model):
    indices = staged((40, 3), 20, 5)
    data = coding.encode(indices, (40, 3), model=model)
    choose = random.Random(0)
    for number in range(400):
        spoilt = mutated(data, choose)
        with contextlib.suppress(CodingError):
            decoded = coding.decode(spoilt if number % 2 else resealed(spoilt), max_indices=10_000)
            assert number % 2 == 0 or torch.equal(decoded, indices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:28] + struct.pack("<I", 1 << 20) + d[32:], "invalid header: 1048576 codebooks, at most 1024"),
        (lambda d: d[:28] + struct.pack("<I", 0) + d[32:], "invalid header: 0 codebooks"),
        (lambda d: d[:32] + struct.pack("<I", 0) + d[36:], r"invalid header: codebooks of \(0, 3\) codes"),
        (lambda d: d[:32] + struct.pack("<I", 41) + d[36:], r"codebooks of \(41, 3\) codes, the largest of 40"),
        (
            lambda d: d[:16] + struct.pack("<I", 1 << 25) + d[20:32] + struct.pack("<I", 1 << 25) + d[36:],
            "a codebook of",
        ),
        (lambda d: d[:7] + b"\x01" + d[8:], "invalid header"),
    ],
)
def test_errors_of_damaged_files_of_several_codebooks(change, message):
    with pytest.raises(CodingError, match=message):
        coding.decode(resealed(change(coding.encode(staged((40, 3), 20, 5), (40, 3)))))


@pytest.mark.parametrize(
    ("indices", "sizes", "message"),
    [
        (torch.zeros(3, 2), (4, 4), "indices: must be integers"),
        (
            torch.zeros(3, 2).long(),
            (4, 4, 4),
            r"codebook_size: must be one for each of the last .*\(3, 2\).* got 3",
        ),
        (torch.zeros(2).long(), (4, 4), "codebook_size: must be one for each of the last axis"),
        (torch.zeros(3, 2).long(), (4, 0), r"codebook_size: must lie in \[1, 16777216\], all together as well"),
        (torch.zeros(3, 2).long(), (1 << 24, 1), r"codebook_size: must lie in \[1, 16777216\], all together as well"),
        (torch.zeros(3, 2).long(), (4, "x"), "codebook_size: must be an integer, or several"),
        (torch.full((3, 2), 5), (8, 4), r"indices: must lie in \[-1, 4\) at 1 of the last axis, got 5 to 5"),
    ],
)
def test_several_codebooks_are_validated(indices, sizes, message):
    with pytest.raises(CodingError, match=message):
        coding.encode(indices, sizes)
