"""No layer waits for the device or mixes devices, shown on the meta device.

Meta tensors have no values, so that reading one raises an error where a GPU would be waited for. A mode ensures that no
operation takes a tensor of the CPU as well.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastvq
from fastvq import codebook, precision
from fastvq.backends import devices, reference
from fastvq.backends.support import GRADIENTS
from fastvq.backends.torch import search
from fastvq.data import Examples
from fastvq.modalities import AudioConfig, ImageConfig, VideoConfig
from fastvq.models.priors import PRIORS
from fastvq.quantizers import VectorQuantize
from fastvq.training import Trainer
from fastvq.training.config import PriorConfig
from fastvq.training.prior import IndexData, PriorTrainer, bits_per_index

READS = (RuntimeError, NotImplementedError)


class MetaOnly(TorchDispatchMode):
    """Mode that rejects mixed devices, except for scalars (0-dimensional tensors) of the CPU, as a GPU does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.dim():
                assert tensor.device.type == "meta", f"{func} meets a tensor of the {tensor.device}"
        return result


@pytest.fixture
def meta(monkeypatch):
    monkeypatch.setattr(precision, "home_device", lambda: torch.device("meta"))  # as if it were a device with values
    with torch.device("meta"), MetaOnly():
        yield


def test_the_mode_sees_other_devices(meta):
    for operation in (
        lambda: torch.empty(3, device="cpu"),
        lambda: torch.empty(3).cpu(),
        lambda: torch.empty(3).copy_(torch.empty(3, device="cpu")),
    ):
        with pytest.raises((AssertionError, *READS)):
            operation()


@pytest.mark.parametrize(
    "read", [Tensor.item, Tensor.tolist, Tensor.nonzero, lambda x: bool(x > 0), lambda x: x[x > 0]]
)
def test_reading_a_value_is_an_error(meta, read):
    with pytest.raises(READS):
        read(torch.empty(1))


LAYERS = [
    {},
    {"codebook_dim": 8},
    {"threshold_ema_dead_code": 2},
    {"threshold_ema_dead_code": 2, "use_cosine_sim": True, "codebook_dim": 8},
    {"rotation_trick": False, "threshold_ema_dead_code": 2, "ema_update": False},
    {"learnable_codebook": True, "threshold_ema_dead_code": 2},
    {"freeze_codebook": True},
    {"kmeans_init": True, "threshold_ema_dead_code": 2},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_training_step(meta, options, dtype):
    layer = fastvq.VectorQuantize(16, 32, **options).to(dtype)
    layer._codebook._ready = True  # what may wait in the first steps of a model's life: k-means has run
    x = torch.empty(4, 10, 16, dtype=dtype, requires_grad=True)
    for masking in ({}, {"mask": torch.empty(4, 10, dtype=torch.bool)}, {"lens": torch.empty(4, dtype=torch.int64)}):
        quantized, indices, loss = layer(x, **masking)
        (quantized.float().sum() + loss).backward()
        assert (quantized.dtype, indices.shape, loss.dtype) == (dtype, (4, 10), torch.float32)
    assert x.grad.dtype == dtype
    assert layer.usage().shape == layer.perplexity().shape == ()


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_eval(meta, options):
    layer = fastvq.VectorQuantize(16, 32, **options).eval()
    x = torch.empty(4, 10, 16)
    quantized, indices, _ = layer(x)
    assert quantized.shape == layer.get_output_from_indices(indices).shape == x.shape
    assert layer.encode(x).shape == indices.shape


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_kmeans(meta, metric):
    x = torch.empty(50, 8)
    means, counts = codebook.kmeans(x, 9, iterations=2, mask=x.isfinite().all(1), metric=metric)
    assert (means.shape, counts.shape) == ((9, 8), (9,))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_quantize(meta, gradient):
    x, codes = torch.empty(5, 8, requires_grad=True), torch.empty(9, 8, requires_grad=True)
    quantized, _, loss = fastvq.quantize(x, codes, gradient=gradient, codebook_weight=1.0)
    (quantized.sum() + loss).backward()
    assert (x.grad.shape, codes.grad.shape) == (x.shape, codes.shape)


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_the_specification(meta, metric):
    assert reference.search(torch.empty(50, 8), torch.empty(20, 8), metric=metric).shape == (50,)
    state = [torch.empty(9, 8), torch.empty(9), torch.empty(9, 8)]
    reference.ema_update_(*state, torch.empty(9), torch.empty(9, 8), decay=0.8, eps=1e-5)


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_the_torch_backend(meta, metric, monkeypatch):
    """Up to the candidates, whose number must be read; then on with two of them."""
    row, code = torch.empty(2, 2, dtype=torch.int64)
    with pytest.raises(READS, match="nonzero"):
        search.search(torch.empty(50, 8), torch.empty(20, 8), metric=metric)
    frame = search.make_frame(torch.empty(20, 8), metric)
    near, bound = frame.rows(torch.empty(50, 8, dtype=torch.float64))
    assert search._limit(torch.empty(50), bound, torch.empty(50, dtype=torch.bool)).shape == (50,)
    assert search.scores_by_definition(near.double(), row, frame.exact, code, metric).shape == (2,)


class Fed(TorchDispatchMode):
    """Mode in which batches move from the CPU to the device by asynchronous copies; devices are not mixed otherwise."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor) and x.dim()}
        copies = func is torch.ops.aten._to_copy.default and kwargs.get("non_blocking")
        assert len(devices) < 2 or copies, f"{func} meets tensors of {sorted(devices)}"
        return result


def test_the_other_mode_sees_two_devices_and_what_waits():
    cpu, elsewhere = torch.zeros(3, dtype=torch.int64), torch.empty(5, 4, device="meta")
    with Fed():
        torch.nn.functional.embedding(cpu.to("meta", non_blocking=True), elsewhere)
        for mistake in (lambda: torch.nn.functional.embedding(cpu, elsewhere), lambda: cpu.to("meta")):
            with pytest.raises(AssertionError, match=r"meets tensors of \['cpu', 'meta'\]"):
                mistake()


_AUDIO = {"clip_length": 2048, "crop_length": 1024, "strides": "4,8", "width": 4, "sample_rate": 8000}
MODALITIES = {
    "image": ImageConfig(data="some", image_size=16, width=8, device="meta", dim=8, codebook_size=24, batch_size=8),
    "video": VideoConfig(
        data="some", frame_size=16, frames=5, width=8, device="meta", dim=8, codebook_size=24, batch_size=8
    ),
    "audio": AudioConfig(data="some", device="meta", dim=8, codebook_size=24, batch_size=8, **_AUDIO),
    "audio, transform": AudioConfig(
        data="some", device="meta", dim=8, codebook_size=24, batch_size=8, network="transform", **_AUDIO
    ),
    "audio, scales": AudioConfig(
        data="some", device="meta", dim=8, codebook_size=24, batch_size=8, bottleneck="vq", scale_strides="2", **_AUDIO
    ),
}


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_vqvaes_training_step(modality, tmp_path, monkeypatch):
    """K-means may wait once, nothing else."""
    monkeypatch.setattr(devices, "usable_device", torch.device)  # as if it were a device with values
    config = MODALITIES[modality]
    dtype = torch.int16 if isinstance(config, AudioConfig) else torch.uint8
    stored = torch.zeros(16, *config.example_format.shape, dtype=dtype)
    trainer = Trainer(config, Examples("some", stored, stored, ("some",) * 16), tmp_path)
    for part in trainer.model.modules():
        if isinstance(part, VectorQuantize):
            part._codebook._ready = True
    with Fed():
        for _ in range(2):
            trainer.train_step()


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("kind", PRIORS)
def test_a_priors_training(kind, classes, tmp_path, monkeypatch):
    """Indices and labels on the CPU move to the model's device; a step reads nothing back, an evaluation its result."""
    monkeypatch.setattr(devices, "usable_device", torch.device)  # as if it were a device with values
    scales = ((2, 2), (4, 4)) if PRIORS[kind].in_scales else None
    shape = (20,) if scales else (4, 4)
    size = (24,) * 4 if PRIORS[kind].in_stages else 24
    train, test = (torch.randint(0, 24, (count, *shape), dtype=torch.int32) for count in (16, 300))
    labels = [torch.arange(len(codes)) % classes if classes else None for codes in (train, test)]
    codes = IndexData(train, test, *labels, scales=scales)
    config = PriorConfig(kind=kind, dim=16, depth=2, batch_size=8, device="meta")
    trainer = PriorTrainer(
        config, codes, size, tmp_path, identity="", vectors=None if size != 24 else torch.randn(24, 8)
    )
    assert {tensor.device.type for tensor in trainer.model.state_dict().values()} == {"meta"}
    trainer.model.train()
    with Fed():
        for _ in range(2):
            trainer.train_step()
        with pytest.raises(READS, match=r"item\(\)"):
            bits_per_index(trainer.model.eval(), codes.test, codes.test_labels)
