"""Layers with the codebooks of other projects' checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastvq.clients import from_dac, from_encodec, from_mimi, from_snac, from_vqgan

from .stand_ins import llamagen, taming, wavtokenizer
from .table import CLIENTS


@pytest.mark.parametrize("name", ["transformers EnCodec", "encodec", "WavTokenizer", "moshi"])
@torch.no_grad()
def test_residual_layers_have_the_indices_and_outputs_of_the_project(name):
    client = CLIENTS[name]
    theirs, x = client.make(), client.input()
    for buffer in theirs.buffers():
        if buffer.numel() == 1:
            buffer.fill_(1)
    model = nn.ModuleDict({"quantizer": theirs})
    ours = from_encodec(model.state_dict()).eval()
    quantized, indices, _ = ours(x)
    expected = theirs.encode(x)
    assert torch.equal(indices.movedim(-1, 0)[: len(expected)], expected)
    if hasattr(theirs, "decode"):
        torch.testing.assert_close(quantized, theirs.decode(indices.movedim(-1, 0)))


@torch.no_grad()
def test_averages_go_on_as_the_project_takes_them():
    torch.manual_seed(0)
    theirs = wavtokenizer.ResidualVectorQuantization(num_quantizers=2, dim=8, codebook_size=16)
    for layer in theirs.layers:
        layer._codebook.cluster_size.fill_(2)
    ours = from_encodec(theirs.state_dict(), decay=0.9)
    for _ in range(3):
        x = torch.randn(2, 8, 30)
        theirs.train()(x)
        ours(x)
    for mine, their in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(mine.codebook, their._codebook.embed, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mimi():
    client = CLIENTS["transformers Mimi"]
    theirs, x = client.make(), client.input()
    layer = from_mimi(nn.ModuleDict({"quantizer": theirs}).state_dict(), stage_axis=0).eval()
    quantized, indices, _ = layer(x)
    assert torch.equal(indices, theirs.encode(x))
    torch.testing.assert_close(quantized, theirs.decode(indices.movedim(0, 1)))
    exact = client.make().double().encode(x.double())
    assert torch.equal(indices, exact)


@pytest.mark.parametrize("name", ["moshi", "encodec"])
def test_gradients_are_those_of_the_project(name):
    """Moshi passes the gradient of the output once and those of all losses; encodec 0.1.1 those of the first loss."""
    client = CLIENTS[name]
    theirs = client.make()
    for buffer in theirs.buffers():
        if buffer.numel() == 1:
            buffer.fill_(1)
    ours = from_encodec(theirs.state_dict())
    grads = []
    for layer in (theirs.train(), ours.train()):
        x = client.input().requires_grad_()
        result = layer(x)
        quantized, losses = result[0], result[2]
        (quantized.square().sum() + 10 * losses.sum()).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["transformers DAC", "descript-audio-codec"])
def test_dac(name):
    """Every index is that of float64; outputs, losses and gradients are the project's."""
    client = CLIENTS[name]
    theirs, x = client.make(), client.input()
    ours = from_dac(nn.ModuleDict({"quantizer": theirs}).state_dict(), stage_axis=1).eval()
    with torch.no_grad():
        quantized, indices, _ = ours(x)
        assert torch.equal(indices, client.make().double()(x.double())[1])
        torch.testing.assert_close(quantized, theirs(x)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.get_output_from_indices(indices), theirs.from_codes(indices)[0])
    results = []
    for layer in (theirs.train(), ours.train()):
        own = x.clone().requires_grad_()
        if layer is theirs:
            layer.quantizer_dropout = 0.0
            quantized, _, _, commitment, codebook = layer(own)
            loss = (0.25 * commitment + codebook).mean()
        else:
            quantized, _, losses = layer(own)
            loss = losses.sum()
        (quantized.square().mean() + loss).backward()
        results.append((quantized, loss, own.grad))
    for mine, their in zip(*reversed(results), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-3, atol=1e-5)


def test_snac():
    client = CLIENTS["snac"]
    theirs, x = client.make(), client.input()
    ours = from_snac(nn.ModuleDict({"quantizer": theirs}).state_dict()).eval()
    with torch.no_grad():
        quantized, indices, _ = ours(x)
        exact = client.make().double()(x.double())[1]
        assert all(map(torch.equal, indices, exact))
        torch.testing.assert_close(quantized, theirs(x)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.get_output_from_indices(indices), theirs.from_codes(list(indices)))
    grads = []
    for layer in (theirs.train(), ours.train()):
        own = x.clone().requires_grad_()
        layer(own)[0].square().mean().backward()
        grads.append(own.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match=r"strides: must be 3, one for each stage, got \(2, 1\)"):
        from_snac(theirs.state_dict(), strides=(2, 1))


@torch.no_grad()
def test_tables_of_image_tokenizers():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5)
    theirs = taming.VectorQuantizer2(32, 4, 0.25, sane_index_shape=True)
    ours = from_vqgan(nn.ModuleDict({"quantize": theirs}).state_dict()).eval()
    assert torch.equal(ours(x)[1], theirs(x)[2][2])
    assert any(parameter.requires_grad for parameter in ours.parameters())
    theirs = llamagen.VectorQuantizer(32, 4, 0.25, 0.0, True, False).eval()
    ours = from_vqgan(theirs.state_dict(), cosine=True).eval()
    quantized, indices, _ = ours(x)
    assert torch.equal(indices.flatten(), theirs(x)[2][2])
    torch.testing.assert_close(quantized, theirs(x)[0])


def test_what_is_missing_or_ambiguous_is_named():
    with pytest.raises(ValueError, match="needs the codebooks of one residual quantizer, got weight, bias"):
        from_encodec(nn.Linear(2, 2).state_dict())
    stack = wavtokenizer.ResidualVectorQuantization(num_quantizers=2, dim=8, codebook_size=16)
    two = nn.ModuleDict({"a": stack, "b": stack}).state_dict()
    with pytest.raises(ValueError, match=r"got 2: a\., b\.; choose by prefix"):
        from_encodec(two)
    assert from_encodec(two, prefix="b.").num_quantizers == 2
    with pytest.raises(ValueError, match="from_dac needs the stages of one quantizer"):
        from_dac(two)
    with pytest.raises(ValueError, match="must have the codebooks of Mimi"):
        from_mimi(two)
    with pytest.raises(ValueError, match=r"must have one embedding\.weight, got none in"):
        from_vqgan(two)
    projected = CLIENTS["encodec with projections"].make().state_dict()
    with pytest.raises(ValueError, match="no projections within stages"):
        from_encodec(projected)


def factorized_state() -> dict[str, torch.Tensor]:
    into, back = nn.Conv1d(8, 4, 1), nn.Conv1d(4, 8, 1)
    layer = nn.ModuleDict({"in_proj": into, "codebook": nn.Embedding(16, 4), "out_proj": back})
    return nn.ModuleDict({"quantizers": nn.ModuleList([layer] * 3)}).state_dict()


@pytest.mark.parametrize("load", [from_encodec, from_mimi, from_dac, from_snac])
def test_a_state_that_lacks_a_tensor_of_a_stage_is_not_taken_for_a_shorter_stack(load):
    stack = wavtokenizer.ResidualVectorQuantization(num_quantizers=3, dim=8, codebook_size=16)
    state = stack.state_dict() if load is from_encodec else factorized_state()
    if load is from_mimi:
        state = nn.ModuleDict({"rvq_first": stack, "rvq_rest": stack}).state_dict()
    load(state)
    for name in state:
        if "inited" not in name and "rvq_first" not in name:
            with pytest.raises(ValueError, match=r"^state_dict: must have "):
                load({key: tensor for key, tensor in state.items() if key != name})
    gap = {key: tensor for key, tensor in state.items() if "layers.1." not in key and "quantizers.1." not in key}
    with pytest.raises(ValueError, match=r"^state_dict: must have stages 0 to 2 of .*, got 0, 2$"):
        load(gap)


@pytest.mark.parametrize("load", [from_encodec, from_mimi, from_dac, from_snac, from_vqgan])
def test_a_model_in_place_of_its_state_is_named(load):
    with pytest.raises(TypeError, match=r"^state_dict: must be a mapping of names to tensors, got Linear: pass its"):
        load(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"^state_dict: must be a mapping of names to tensors, got str$"):
        load("vqgan.pt")


def test_codebooks_of_another_shape_are_named():
    message = r"^state_dict: embedding\.weight must have shape \(K, D\), got \(1, 8, 4\)"
    with pytest.raises(ValueError, match=message):
        from_vqgan({"embedding.weight": torch.zeros(1, 8, 4)})
    stack = wavtokenizer.ResidualVectorQuantization(num_quantizers=2, dim=8, codebook_size=16).state_dict()
    stack["layers.1._codebook.cluster_size"] = torch.zeros(15)
    message = r"^state_dict: layers\.1\._codebook must have codes and averages \(K, D\) and sizes \(K,\), got"
    with pytest.raises(ValueError, match=message):
        from_encodec(stack)
