"""Recognition by `accelerate`, its refusals, and its report."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastvq
from fastvq.clients import Replaced
from fastvq.clients.adapter import is_accelerated
from fastvq.errors import FastvqError, UnknownQuantizerError

from .stand_ins import rosinality, taming, wavtokenizer
from .table import CLIENTS


def codebook() -> nn.Module:
    torch.manual_seed(0)
    return wavtokenizer.EuclideanCodebook(8, 32)


def fork(base: type, **methods) -> type:
    """Return a class of the same name as its base, with other methods: the base is not among its bases."""
    return type(base.__name__, (nn.Module,), {**vars(base), **methods})


def made(kind: type, *arguments) -> nn.Module:
    """Return a module of a class made by `fork`."""
    module = kind.__new__(kind)
    source = wavtokenizer.EuclideanCodebook(*arguments)
    module.__dict__ = source.__dict__
    return module


def reason(module: nn.Module) -> str:
    with pytest.raises(UnknownQuantizerError) as caught:
        fastvq.accelerate(module)
    return str(caught.value)


def test_the_report_names_modules_and_methods():
    model = nn.ModuleDict({"codec": codebook(), "other": nn.Linear(2, 2)})
    report = fastvq.accelerate(model)
    assert report.replaced == (Replaced("codec", "EuclideanCodebook", "encodec 0.1.1", ("quantize", "forward")),)
    assert report.skipped == ()
    assert str(report).splitlines() == [
        "1 module replaced",
        "codec  EuclideanCodebook  quantize, forward  encodec 0.1.1",
    ]


def test_what_looks_like_a_quantizer_is_named():
    class MyCodebook(nn.Module):
        pass

    model = nn.ModuleDict({"a": MyCodebook(), "b": fastvq.VectorQuantize(8, 32), "c": nn.Linear(2, 2)})
    message = reason(model)
    assert "a (MyCodebook): unknown class" in message
    assert "b (VectorQuantize): is fastvq's own" in message
    assert "Linear" not in message
    assert issubclass(UnknownQuantizerError, FastvqError)
    model["d"] = codebook()
    assert [one.name for one in fastvq.accelerate(model).skipped] == ["a", "b"]


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("quantize", lambda self, x: (x @ self.embed.T).argmax(-1), "quantize gives another result"),
        ("quantize", lambda self, x: torch.cdist(x, self.embed).argmin(-1).int(), "torch.int32"),
        ("quantize", lambda self, x, mask: None, "quantize takes other arguments"),
        ("forward", lambda self, x: (x, self.encode(x)), "forward gives another result"),
        (
            "forward",
            lambda self, x: (torch.distributed.all_reduce(x), self.encode(x)),
            "forward calls all_reduce",
        ),
    ],
    ids=["dot product", "int32", "arguments", "no lookup", "collective"],
)
def test_a_fork_that_computes_something_else_is_skipped(method, change, words):
    module = made(fork(wavtokenizer.EuclideanCodebook, **{method: change}), 8, 32)
    assert words in reason(module)
    assert not is_accelerated(module)


def synchronized(tensor):
    torch.distributed.all_reduce(tensor)
    return tensor


def test_a_collective_within_a_function_of_the_fork_is_seen():
    def forward(self, x):
        return (synchronized(x), self.encode(x)) if x is None else wavtokenizer.EuclideanCodebook.forward(self, x)

    assert "forward calls all_reduce" in reason(made(fork(wavtokenizer.EuclideanCodebook, forward=forward), 8, 32))


def test_a_fork_that_learns_otherwise_is_skipped():
    def forward(self, x):
        result = wavtokenizer.EuclideanCodebook.forward(self, x)
        if self.training:
            self.cluster_size.mul_(0.5)
        return result

    assert "state cluster_size" in reason(made(fork(wavtokenizer.EuclideanCodebook, forward=forward), 8, 32))


def test_a_fork_that_draws_other_random_numbers_is_skipped():
    def forward(self, x):
        torch.rand(())
        return wavtokenizer.EuclideanCodebook.forward(self, x)

    assert "draws" in reason(made(fork(wavtokenizer.EuclideanCodebook, forward=forward), 8, 32))


def test_a_gradient_that_differs_is_noticed():
    class VectorQuantizer2(taming.VectorQuantizer2):
        pass

    def forward(self, z, temp=None, rescale_logits=False, return_logits=False):
        quantized, loss, info = taming.VectorQuantizer2.forward(self, z)
        return quantized.detach() * 0.5 + quantized * 0.5, loss, info

    known = type("VectorQuantizer2", (taming.VectorQuantizer2,), {"forward": forward})
    assert "gradient" in reason(known(32, 4, 0.25))
    assert fastvq.accelerate(VectorQuantizer2(32, 4, 0.25)).replaced


def test_a_subclass_is_accelerated_unless_it_overrides_a_replaced_method():
    class Mine(wavtokenizer.EuclideanCodebook):
        def encode(self, x):
            return super().encode(x)

    class Other(wavtokenizer.EuclideanCodebook):
        def quantize(self, x):
            return super().quantize(x)

    assert fastvq.accelerate(Mine(8, 32)).replaced[0].kind == "Mine"
    assert "Other overrides quantize" in reason(Other(8, 32))
    patched = codebook()
    patched.quantize = lambda x: torch.zeros(len(x), dtype=torch.int64)
    assert "quantize is replaced on the module itself" in reason(patched)


def test_missing_attributes_values_and_devices_are_reasons():
    incomplete = codebook()
    del incomplete.embed_avg
    assert "has no embed_avg" in reason(incomplete)
    with torch.device("meta"):
        assert "its device is meta" in reason(wavtokenizer.EuclideanCodebook(8, 32))
    with pytest.raises(TypeError, match="model: must be a torch"):
        fastvq.accelerate({"model": codebook()})


def test_stages_need_known_codebooks():
    stack = wavtokenizer.ResidualVectorQuantization(num_quantizers=2, dim=8, codebook_size=32)
    stack.layers[1]._codebook.quantize = lambda x: torch.zeros(len(x), dtype=torch.int64)
    report = fastvq.accelerate(stack)
    assert [one.name for one in report.replaced] == ["layers.0._codebook"]
    assert {one.name for one in report.skipped} == {"", "layers.1._codebook"}


def test_a_trial_changes_nothing_and_draws_no_random_number():
    module = codebook().train()
    before, state = copy.deepcopy(module.state_dict()), torch.random.get_rng_state()
    fastvq.accelerate(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert module.training


@pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)
def test_modules_are_recognized_in_any_dtype_and_under_any_mode(client):
    assert len(fastvq.accelerate(client.make().double()).replaced) == client.replaced
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert len(fastvq.accelerate(client.make().bfloat16()).replaced) == client.replaced


def test_a_buffer_that_is_a_parameter_is_no_obstacle():
    """LlamaGen's codebook_used; in training mode its own writes fail as long as it is a leaf."""
    module = CLIENTS["LlamaGen"].make()
    module._buffers["codebook_used"] = nn.Parameter(torch.zeros(1000))
    assert fastvq.accelerate(module).replaced
    assert module.codebook_used.requires_grad


def test_parametrized_modules_are_recognized():
    class Scale(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module = taming.VectorQuantizer2(32, 4, 0.25)
    x = torch.randn(2, 4, 5, 5)
    parametrize.register_parametrization(module.embedding, "weight", Scale())
    expected = module(x)[2][2]
    fastvq.accelerate(module)
    assert torch.equal(module(x)[2][2], expected)


def test_a_class_that_was_changed_since_is_not_restored():
    model = nn.ModuleDict({"codec": codebook()})
    fastvq.accelerate(model)
    parametrize.register_parametrization(model["codec"], "embed", nn.Identity())
    assert is_accelerated(model["codec"])
    with pytest.raises(ValueError, match="class of codec has been changed"):
        fastvq.restore(model)


def test_non_finite_rows_take_no_part_in_moving_averages():
    for module in (codebook(), rosinality.Quantize(8, 32)):
        fastvq.accelerate(module.train())
        x = torch.randn(1, 40, 8)
        x[0, 0, 0] = torch.nan
        module(x)
        assert all(bool(tensor.isfinite().all()) for tensor in module.buffers())


def test_ranks_reduce_as_the_client_does(monkeypatch):
    reduced = []
    monkeypatch.setattr(rosinality.dist_fn, "all_reduce", lambda tensor: reduced.append(tuple(tensor.shape)))
    module = rosinality.Quantize(8, 32).train()
    fastvq.accelerate(module)
    del reduced[:]
    module(torch.randn(1, 40, 8))
    assert reduced == [(32,), (8, 32)]


def test_pickles_need_no_fastvq():
    module = codebook()
    fastvq.accelerate(module)
    function, arguments, *_ = module.__reduce_ex__(2)
    assert function is object.__new__
    assert arguments == (wavtokenizer.EuclideanCodebook,)


def test_a_layer_of_fastvq_is_named_as_such():
    layer = fastvq.VectorQuantize(4, 8)
    with pytest.raises(fastvq.errors.UnknownQuantizerError, match=r"\(model\) \(VectorQuantize\): is fastvq's own"):
        fastvq.accelerate(layer)
