"""The prior over text and indices: what each part sees, sampling, and the weights of the loss."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastvq import coding
from fastvq.errors import CodingError
from fastvq.models import TextPrior
from fastvq.models.priors.draw import draw

from ..cases import close, generator

TEXT = torch.tensor([[1, 5, 6, 2, 0, 0], [1, 9, 2, 0, 0, 0]])


def make(size=7, grid=(3, 4), **options):
    """Return a prior whose heads are random instead of zero."""
    settings = {"vocabulary": 20, "text_length": 6, "dim": 16, "depth": 2, "heads": 2} | options
    prior = TextPrior(size, grid, **settings).eval()
    heads = prior.head.layers if isinstance(size, tuple) else [prior.head]
    for layer in (*heads, prior.text_head):
        torch.nn.init.normal_(layer.weight, generator=generator())
    for module in prior.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, generator=generator(1))
    return prior


def indices_for(prior, count=2):
    return torch.randint(0, 7, (count, *prior.grid), generator=generator(2))


def test_an_index_sees_the_whole_text_and_what_comes_before_it():
    prior = make()
    indices = indices_for(prior)
    logits = prior(indices, TEXT)
    other = indices.clone()
    other.view(2, -1)[:, 4] = (other.view(2, -1)[:, 4] + 1) % 7
    changed = (prior(other, TEXT) - logits).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False] * 5 + [True] * 7
    for place in range(6):
        text = TEXT.clone()
        text[:, place] = 11
        assert ((prior(indices, text) - logits).abs().amax(2) > 1e-6).all()


@pytest.mark.parametrize(
    ("size", "guidance", "summed"), [(7, 1.0, False), (7, 2.5, True), ((7, 9, 8), 1.0, True), ((7, 9, 8), 2.5, False)]
)
def test_cached_sampling_has_the_logits_of_the_full_forward(size, guidance, summed, monkeypatch):
    prior = make(size, grid=(2, 2, 3) if isinstance(size, tuple) else (3, 4), summed=summed)
    seen = []
    monkeypatch.setattr(
        "fastvq.models.priors.base.draw", lambda logits, *rest: (seen.append(logits), draw(logits, *rest))[1]
    )
    indices = prior.sample(2, TEXT, guidance=guidance, generator=generator())
    full = guidance * prior(indices, TEXT) + (1 - guidance) * prior(indices)
    for place, logits in enumerate(seen):
        close(logits, full[:, place, : logits.shape[1]])
    assert len(seen) == prior.places


def test_every_place_gets_the_sum_of_the_words_without_special_indices():
    plain, summed = make(), make(summed=True)
    assert set(summed.state_dict()) - set(plain.state_dict()) == {"summed.weight"}
    assert "summed" not in plain.settings
    summed.load_state_dict(plain.state_dict(), strict=False)
    torch.nn.init.zeros_(summed.summed.weight)
    indices = indices_for(plain)
    close(summed(indices, TEXT), plain(indices, TEXT))
    torch.nn.init.normal_(summed.summed.weight, generator=generator(3))
    close(summed(indices), plain(indices))  # no caption has no words
    vectors = summed.summed.weight
    own = torch.stack([vectors[5] + vectors[6], vectors[9]])
    inputs = plain.inputs.forward
    plain.inputs.forward = lambda *given: inputs(*given) + own[:, None]
    close(summed(indices, TEXT), plain(indices, TEXT))


def test_the_loss_weighs_text_and_indices():
    prior = make(text_weight=0.25)
    indices = indices_for(prior)
    loss, nats = prior.losses(indices, TEXT)
    close(nats, prior.loss(indices, TEXT))
    _, text_logits, _ = prior._logits(indices, TEXT)
    # Five places have a successor, three and two of which are words or the end.
    own = [
        F.cross_entropy(text_logits[row, :known], TEXT[row, 1 : known + 1], reduction="sum")
        for row, known in ((0, 3), (1, 2))
    ]
    close(loss, 0.75 * nats + 0.25 * sum(own) / 5)
    plain, nats = prior.losses(indices)
    close(plain, 0.75 * nats)


def test_training_takes_one_caption_of_several_and_leaves_some_out():
    prior = make(label_dropout=0.5).train()
    several = TEXT[[0, 1, 1]].expand(1000, 3, 6)
    rows = prior.rows_to_learn(several, 1000, torch.device("cpu"))
    kinds = {
        tuple(row): count
        for row, count in zip(*(part.tolist() for part in rows.unique(dim=0, return_counts=True)), strict=True)
    }
    blank = (1, 2, 0, 0, 0, 0)
    assert set(kinds) == {blank, *map(tuple, TEXT.tolist())}
    assert kinds[blank] == pytest.approx(500, abs=80)
    assert kinds[tuple(TEXT[1].tolist())] == pytest.approx(1000 / 3, abs=80)
    assert (prior.eval().rows_to_learn(several, 1000, torch.device("cpu")) == TEXT[0]).all()


def test_an_untrained_prior_is_uniform_with_and_without_text():
    prior = TextPrior(512, (4, 4), vocabulary=20, text_length=6).eval()
    zeros = torch.zeros(2, 4, 4, dtype=torch.int64)
    for text in (None, TEXT):
        close(prior.bits(zeros, text), torch.full((2,), 16 * 9.0, dtype=torch.float64))
    loss, _ = prior.losses(zeros, TEXT)
    close(loss.detach(), torch.tensor(7 / 8 * math.log(512) + math.log(20) / 8))


@pytest.mark.parametrize("summed", [False, True])
def test_files_are_coded_without_captions(summed):
    prior = make(summed=summed)
    indices = indices_for(prior, 5)
    content = coding.encode(indices, 7, model="prior", prior=prior)
    assert torch.equal(torch.as_tensor(coding.decode(content, prior=prior)), indices)
    with pytest.raises(CodingError, match="labels: files have none of captions"):
        coding.encode(indices[:2], 7, model="prior", prior=prior, labels=TEXT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocabulary": 2}, "vocabulary: must be at least 3, got 2"),
        ({"text_length": 1}, "text_length: must be at least 2, got 1"),
        ({"text_weight": 1.0}, r"text_weight: must lie in \[0, 1\), got 1.0"),
        ({"classes": 3}, "classes: must be 0, since captions take their place, got 3"),
    ],
)
def test_invalid_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    "text", [TEXT[:, :5], TEXT.float(), TEXT[0], TEXT[:1], torch.zeros(2, 0, 6, dtype=torch.int64)]
)
def test_captions_of_another_shape_or_type(text):
    prior = make()
    with pytest.raises(ValueError, match=r"labels: must be captions as text indices, int64 of shape \(2, 6\), got"):
        prior.bits(indices_for(prior), text)
    with pytest.raises(ValueError, match=r"labels: must lie in \[0, 20\), got 0 to 20"):
        prior.bits(indices_for(prior), TEXT.masked_fill(TEXT == 9, 20))
