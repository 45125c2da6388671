"""Every public method of vector_quantize_pytorch's quantizers can be called here in the same words."""

from __future__ import annotations

import inspect
from inspect import Parameter

import pytest

import fastvq

from ..peers import vqp

CLASSES = sorted(name for name, cls in vars(vqp).items() if inspect.isclass(cls))
# Steps of their forward passes, public by name alone.
STEPS = {
    ("HierarchicalVQ", "pool_residual"),
    ("HierarchicalVQ", "sample_nested_cutoff"),
    ("HierarchicalVQ", "upsample_to_full"),
    ("LatentQuantize", "quantize_and_project"),
    ("VectorQuantize", "maybe_split_heads_from_input"),
}
# Theirs are an nn.Identity(), a function that returns its argument, and an empty dict.
OTHER_DEFAULTS = {
    ("LFQ", "straight_through_activation"),
    ("SimVQ", "init_fn"),
    ("ResidualVQ", "mlp_kwargs"),
    ("ResidualVQ", "freeze_codebook"),
    ("GroupedResidualVQ", "freeze_codebook"),
}
# Theirs takes it among **kwargs.
NAMED_HERE = {("ResidualLFQ", "channel_first")}
REST = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def methods(name):
    """Return the methods of a class, inherited ones of its package included."""
    bases = [base for base in getattr(vqp, name).__mro__ if base.__module__.startswith("vector_quantize_pytorch")]
    found = {n for base in bases for n, f in vars(base).items() if inspect.isfunction(f) and not n.startswith("_")}
    return sorted({"__init__", *found})


def parameters(package, name, method):
    return inspect.signature(getattr(getattr(package, name), method)).parameters


@pytest.mark.parametrize(("name", "method"), [(c, m) for c in CLASSES for m in methods(c) if (c, m) not in STEPS])
def test_same_words(name, method):
    ours, theirs = parameters(fastvq, name, method), parameters(vqp, name, method)
    assert [p.kind for p in ours.values() if p.kind in REST] == [p.kind for p in theirs.values() if p.kind in REST]
    named = {n: p for n, p in theirs.items() if p.kind not in REST}
    for n, parameter in named.items():
        assert n in ours
        assert ours[n].kind == parameter.kind, n
        if (name, n) not in OTHER_DEFAULTS:
            assert ours[n].default == parameter.default, n
    by_place = [n for n, p in named.items() if p.kind != Parameter.KEYWORD_ONLY]
    assert list(ours)[: len(by_place)] == by_place
    for n, parameter in ours.items():
        if n not in theirs and (name, n) not in NAMED_HERE:
            assert parameter.kind in (Parameter.KEYWORD_ONLY, *REST), f"{n} may be given by place, but not there"
