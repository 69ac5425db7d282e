"""Heads and the grid that trains them: held against frame-level heads, a loop over torch's own Adam, and a brute force."""

from itertools import cycle

import pytest
import torch
from torch import nn

from pipeline.tasks.grid import HeadGrid, train
from pipeline.tasks.heads import ProbeHead, mean_over_frames, normalise

L, D, P, K = 4, 12, 8, 3


def make_head(seed: int) -> ProbeHead:
    head = ProbeHead(L, D, P, K, torch.Generator().manual_seed(seed))
    with torch.no_grad():  # weights that are not uniform, so that mixing layers shows
        head.layer_scores.copy_(torch.linspace(-1, 1, L))
    return head


def test_pooling_first_is_the_head_over_frames():
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(5, L, 40, D, generator=generator)
    counts = torch.tensor([40, 1, 17, 39, 2])
    valid = torch.arange(40) < counts[:, None]
    head = make_head(1)
    torch.testing.assert_close(head.pooled(mean_over_frames(frames, valid)), head(frames, valid), rtol=0, atol=1e-5)


def test_the_frame_level_head_is_the_one_written_out_by_hand():
    frames = torch.randn(2, L, 7, D, generator=torch.Generator().manual_seed(0)).double()
    head = make_head(1).double()
    weights = head.layer_scores.exp() / head.layer_scores.exp().sum()
    for utterance, count in enumerate((7, 4)):
        hidden = [
            sum(weights[layer] * frames[utterance, layer, t] for layer in range(L)) @ head.project.weight.T
            + head.project.bias
            for t in range(count)
        ]
        by_hand = sum(hidden) / count @ head.classify.weight.T + head.classify.bias
        valid = torch.arange(7)[None] < torch.tensor([[count]])
        torch.testing.assert_close(head(frames[utterance : utterance + 1], valid)[0], by_hand)


def test_padding_is_never_looked_at():
    frames = torch.randn(2, L, 9, D, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(9) < torch.tensor([9, 5])[:, None]
    poisoned = frames.clone()
    poisoned[1, :, 5:] = torch.nan
    assert torch.equal(mean_over_frames(poisoned, valid), mean_over_frames(frames, valid))


def test_normalising_a_layer_is_layer_norm_without_affine():
    frames = torch.randn(2, L, 9, D) * 7 + 3
    torch.testing.assert_close(normalise(frames), nn.LayerNorm(D, elementwise_affine=False)(frames))


def test_a_new_head_counts_every_layer_the_same():
    head = ProbeHead(L, D, P, K, torch.Generator().manual_seed(0))
    assert head.layer_weights.tolist() == pytest.approx([1 / L] * L)


@pytest.mark.parametrize("clip_norm", [None, 0.05, 1.0])
def test_a_run_in_the_grid_is_the_head_trained_alone_with_torch_adam(clip_norm):
    generator = torch.Generator().manual_seed(0)
    means, classes = torch.randn(30, L, D, generator=generator), torch.randint(K, (30,), generator=generator)
    rates, seeds, steps = (1e-3, 1e-1), (3, 4, 5), 25
    batches = [torch.randint(30, (len(seeds), 8), generator=generator) for _ in range(steps)]
    together = HeadGrid([make_head(seed) for seed in seeds], rates, torch.device("cpu"))
    for rows in batches:
        together.step(means[rows], classes[rows], clip_norm)
    for n, seed in enumerate(seeds):
        for r, lr in enumerate(rates):
            alone = make_head(seed)
            adam = torch.optim.Adam(alone.parameters(), lr=lr)
            for rows in batches:
                adam.zero_grad()
                nn.functional.cross_entropy(alone.pooled(means[rows[n]]), classes[rows[n]]).backward()
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(alone.parameters(), clip_norm)
                adam.step()
            for name, value in alone.named_parameters():
                torch.testing.assert_close(together.parameters[name][n, r], value, rtol=1e-4, atol=1e-5)


def test_scores_of_the_grid_are_those_of_each_head():
    generator = torch.Generator().manual_seed(0)
    means, classes = torch.randn(23, L, D, generator=generator), torch.randint(K, (23,), generator=generator)
    heads = [make_head(1).requires_grad_(False), make_head(2).requires_grad_(False)]
    scores = HeadGrid(heads, (1e-3,), torch.device("cpu")).scores(means, classes, at_once=5)
    for n, head in enumerate(heads):
        logits = head.pooled(means)
        assert float(scores.accuracy[n, 0]) == pytest.approx(float((logits.argmax(-1) == classes).float().mean()))
        assert float(scores.loss[n, 0]) == pytest.approx(float(nn.functional.cross_entropy(logits, classes)), rel=1e-5)


def test_the_checkpoint_kept_is_the_best_on_dev_and_not_the_last():
    generator = torch.Generator().manual_seed(0)
    means, classes = torch.randn(30, L, D, generator=generator), torch.randint(K, (30,), generator=generator)
    dev = torch.randn(20, L, D, generator=generator), torch.randint(K, (20,), generator=generator)
    grid = HeadGrid([make_head(1)], (3e-2,), torch.device("cpu"))
    best = train(grid, cycle([torch.arange(30)[None]]), (means, classes), dev, 40, 1, None, None)

    again, seen = HeadGrid([make_head(1)], (3e-2,), torch.device("cpu")), []
    for step in range(1, 41):
        again.step(means[None], classes[None], None)
        scores = again.scores(*dev)
        seen.append((float(scores.accuracy), -float(scores.loss), -step))
    accuracy, loss, step = max(seen)
    assert (float(best.accuracy), -float(best.loss), -int(best.step)) == (accuracy, loss, step)
    assert int(best.step) != 40, "pure noise: the last step should not be the best on dev"


def test_patience_ends_a_run_without_touching_its_checkpoint():
    generator = torch.Generator().manual_seed(0)
    means, classes = torch.randn(30, L, D, generator=generator), torch.randint(K, (30,), generator=generator)
    drawn = []

    def batches():
        while True:
            drawn.append(1)
            yield torch.arange(30)[None]

    grid = HeadGrid([make_head(1)], (3e-2,), torch.device("cpu"))
    dev = torch.randn(20, L, D, generator=generator), torch.randint(K, (20,), generator=generator)
    best = train(grid, batches(), (means, classes), dev, 500, 1, None, 3)
    assert len(drawn) == int(best.step) + 3


def test_a_diverging_run_leaves_its_neighbours_alone():
    means, classes = torch.randn(30, L, D, generator=torch.Generator().manual_seed(0)), torch.arange(30) % K
    rows = torch.arange(30)[None]
    mixed = HeadGrid([make_head(1)], (1e-2, 1e30), torch.device("cpu"))
    alone = HeadGrid([make_head(1)], (1e-2,), torch.device("cpu"))
    for _ in range(20):
        mixed.step(means[rows], classes[rows], 1.0)
        alone.step(means[rows], classes[rows], 1.0)
    for name, value in alone.parameters.items():
        torch.testing.assert_close(mixed.parameters[name][:, 0], value[:, 0])
