"""The x-vector network, held against itself alone, a slow copy written frame by frame, and SUPERB's sizes."""

import pytest
import torch
from torch import nn

from pipeline.tasks.xvector import CONTEXTS, FIELD_FRAMES, VARIANCE_FLOOR, VoiceHead, XVector, lengthen, statistics

L, D, COUNTS = 3, 6, [40, 15, 3, 23, 1, 16]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def head() -> VoiceHead:
    made = VoiceHead(L, D, 8, 8, 12, 10, seeded())
    with torch.no_grad():
        made.layer_scores.copy_(torch.linspace(-1, 1, L))
    return made


@pytest.fixture
def utterances() -> list[torch.Tensor]:
    return [torch.randn(L, 1, count, D, generator=seeded(number)) for number, count in enumerate(COUNTS)]


def padded(utterances, fill: float, extra: int = 0):
    layers = torch.full((L, len(utterances), max(COUNTS) + extra, D), fill)
    for number, own in enumerate(utterances):
        layers[:, number, : own.shape[2]] = own[:, 0]
    return layers, torch.tensor(COUNTS)


@pytest.mark.parametrize("fill", [0.0, 1e4, torch.nan])
@pytest.mark.parametrize("extra", [0, 9])
def test_an_utterance_has_the_embedding_that_it_has_alone_whatever_stands_behind_it(head, utterances, fill, extra):
    together = head(*padded(utterances, fill, extra))
    for row, own in zip(together, utterances, strict=True):
        torch.testing.assert_close(row, head(own, torch.tensor([own.shape[2]]))[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fill", [0.0, 1e4])
def test_gradients_do_not_see_the_padding_either(head, utterances, fill):
    def gradients(batches):
        head.zero_grad()
        for layers, counts in batches:
            head.xvector.training_vectors(head(layers, counts)).square().sum().backward()
        return [parameter.grad.clone() for parameter in head.parameters()]

    alone = gradients([(own, torch.tensor([own.shape[2]])) for own in utterances])
    for one, other in zip(alone, gradients([padded(utterances, fill)]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_network_is_the_one_written_out_frame_by_frame():
    net = XVector(D, 5, 7, 4, seeded()).double()
    frames = torch.randn(1, 21, D, generator=seeded(1)).double()
    rows = list(frames[0])
    for layer, (size, apart) in zip(net.delays, CONTEXTS, strict=True):
        reach = (size - 1) * apart
        rows = [
            sum(layer.weight[:, :, k] @ rows[t + k * apart] for k in range(size)).add(layer.bias).clamp(min=0)
            for t in range(len(rows) - reach)
        ]
    assert len(rows) == 21 - 14 == 21 - (FIELD_FRAMES - 1)
    stacked = torch.stack(rows)
    spread = ((stacked - stacked.mean(0)) ** 2).mean(0)
    pooled = torch.cat([stacked.mean(0), (spread + VARIANCE_FLOOR).sqrt()])
    expected = (net.embed.weight @ pooled + net.embed.bias).clamp(min=0)
    torch.testing.assert_close(net(frames, torch.tensor([21]))[0], expected)


def test_a_short_utterance_is_said_again_until_it_fills_the_context():
    frames = torch.arange(5.0).reshape(1, 5, 1)
    longer, counts = lengthen(frames, torch.tensor([4]))
    assert longer[0, :, 0].tolist() == [0, 1, 2, 3] * 3 + [0, 1, 2]
    assert counts.tolist() == [FIELD_FRAMES]
    same, counts = lengthen(torch.ones(1, 20, 2), torch.tensor([15]))
    assert (same.shape, counts.tolist()) == ((1, 20, 2), [15])


def test_a_frame_alone_has_a_mean_and_finite_gradients():
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    found = statistics(hidden, torch.tensor([1]))
    torch.testing.assert_close(found[0, :3], hidden[0, :, 0])
    found.sum().backward()
    assert hidden.grad.isfinite().all()


def test_the_head_of_superb_has_the_size_it_has_there():
    """s3prl on HuBERT Base: connector, five TDNN layers, two linear layers, 13 layer weights."""
    made = VoiceHead(13, 768, 512, 512, 1500, 512, seeded())
    connector, tdnn = 768 * 512 + 512, [(5 * 512 + 1) * 512, *[(3 * 512 + 1) * 512] * 2, 513 * 512, 513 * 1500]
    utterance = (3000 + 1) * 512 + 513 * 512
    assert sum(p.numel() for p in made.parameters()) == 13 + connector + sum(tdnn) + utterance


def test_a_new_head_starts_where_its_seed_says_and_lets_sizes_through():
    first, again, other = (VoiceHead(L, 64, 64, 64, 64, 64, seeded(seed)) for seed in (0, 0, 1))
    for one, two in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.project.weight, other.project.weight)
    assert first.layer_weights.tolist() == pytest.approx([1 / L] * L)
    torch.manual_seed(0)
    reference = nn.init.kaiming_uniform_(torch.empty(64, 64, 5), nonlinearity="relu")
    assert float(first.xvector.delays[0].weight.detach().std()) == pytest.approx(float(reference.std()), rel=0.03)
    hidden = torch.randn(8, 64, 200, generator=seeded())
    for delay in first.xvector.delays:
        hidden = delay(hidden).relu().detach()
    assert 0.5 < float(hidden.square().mean()) < 2
