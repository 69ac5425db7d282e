"""The margin softmax, held against the formula written out, a softmax of cosines, and finite differences."""

import math

import pytest
import torch

from pipeline.tasks.margin import AmSoftmax


def made(scale=30.0, margin=0.4, width=5, speakers=4) -> AmSoftmax:
    return AmSoftmax(width, speakers, scale, margin, torch.Generator().manual_seed(0)).double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, generator=generator).double(), torch.tensor([0, 3, 1, 1, 2, 0])


def test_the_loss_is_the_formula_written_out(batch):
    loss, total = made(), 0.0
    for x, y in zip(*batch, strict=True):
        cosines = [float(x @ w / (x.norm() * w.norm())) for w in loss.weight.detach()]
        true = math.exp(30 * (cosines[y] - 0.4))
        others = sum(math.exp(30 * cosine) for k, cosine in enumerate(cosines) if k != y)
        total -= math.log(true / (true + others))
    assert float(loss(*batch).detach()) == pytest.approx(total / len(batch[1]), rel=1e-9)


def test_without_a_margin_it_is_a_softmax_over_cosines(batch):
    loss = made(margin=0.0, scale=7.0)
    cosines = torch.nn.functional.cosine_similarity(batch[0][:, None], loss.weight[None], dim=-1)
    expected = torch.nn.functional.cross_entropy(7 * cosines, batch[1])
    torch.testing.assert_close(loss(*batch), expected)


def test_a_margin_makes_it_harder_by_exactly_the_handicap_of_a_certain_answer():
    """One speaker's vector met exactly, the other opposite: L = log(1 + exp(-s (2 - m)))."""
    loss = made(scale=3.0, margin=0.4, width=2, speakers=2)
    with torch.no_grad():
        loss.weight.copy_(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))
    found = loss(torch.tensor([[5.0, 0.0]]).double(), torch.tensor([0]))
    assert float(found.detach()) == pytest.approx(math.log1p(math.exp(-3.0 * 1.6)))


def test_gradients_are_those_of_finite_differences(batch):
    loss = made(scale=5.0)
    embeddings = batch[0].requires_grad_()

    def of(x, weight):
        return torch.func.functional_call(loss, {"weight": weight}, (x, batch[1]))

    assert torch.autograd.gradcheck(of, (embeddings, loss.weight))


def test_the_length_of_an_embedding_does_not_count(batch):
    loss = made()
    torch.testing.assert_close(loss(batch[0] * 100, batch[1]), loss(*batch))


def test_a_seed_is_where_the_vectors_start():
    assert torch.equal(made().weight, made().weight)
    assert not torch.equal(AmSoftmax(5, 4, 30.0, 0.4, torch.Generator().manual_seed(9)).double().weight, made().weight)
