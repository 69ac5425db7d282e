"""Phone strings, CTC heads and phone error rates: held against hand-worked examples, enumeration, torch and a plain DP."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from cache.errors import DataError
from cache.manifest import Manifest
from pipeline.tasks import metrics
from pipeline.tasks.framegrid import FrameGrid, ctc, greedy
from pipeline.tasks.frames import Frames
from pipeline.tasks.heads import ProbeHead
from pipeline.tasks.labels import TASKS, phones_of
from pipeline.tasks.phones import frames_needed, spoken_splits
from tests.probe_fixtures import utterance

L, D, P, K = 3, 6, 5, 4


def edit_distance(truth, answer) -> int:
    """Wagner & Fischer 1974, as the textbook has it."""
    row = list(range(len(answer) + 1))
    for i, a in enumerate(truth, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(answer, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


@pytest.mark.parametrize(
    ("truth", "answer", "edits"),
    [
        ("k a t", "k a t", (0, 0, 0)),
        ("k a t", "", (0, 3, 0)),
        ("k a t", "k a", (0, 1, 0)),
        ("k a t", "k o t", (1, 0, 0)),
        ("k a t", "s k a t", (0, 0, 1)),
        ("k ɪ t ə n", "s ɪ t ɪ ŋ", (3, 0, 0)),
        ("s ɪ k s t", "s i k s", (1, 1, 0)),
        ("a a", "a b a b", (0, 0, 2)),
    ],
)
def test_errors_worked_out_by_hand(truth, answer, edits):
    symbols = {symbol: number for number, symbol in enumerate(sorted({*truth.split(), *answer.split()}), 1)}
    pair = [[symbols[symbol] for symbol in text.split()] for text in (truth, answer)]
    assert metrics.phone_errors(*pair) == edits
    assert metrics.phone_error_rate([pair[0]], [pair[1]]) == pytest.approx(sum(edits) / len(truth.split()))


def test_errors_are_those_of_a_plain_table():
    draw = random.Random(0)
    pairs = [[draw.choices(range(1, 5), k=draw.randrange(low, 30)) for low in (1, 0)] for _ in range(200)]
    for truth, answer in pairs:
        assert sum(metrics.phone_errors(truth, answer)) == edit_distance(truth, answer)
    truths, answers = zip(*pairs, strict=True)
    whole = sum(edit_distance(*pair) for pair in pairs) / sum(map(len, truths))
    assert metrics.phone_error_rate(truths, answers) == pytest.approx(whole)


def test_a_rate_is_over_all_phones_and_not_a_mean_of_utterances():
    assert metrics.phone_error_rate([[1] * 9, [1]], [[1] * 9, []]) == pytest.approx(0.1)


def test_the_bootstrap_covers_the_spread_of_independent_utterances():
    draw = np.random.default_rng(0)
    errors, lengths = torch.from_numpy(draw.binomial(20, 0.3, 400)), torch.full((400,), 20)
    low, high = metrics.bootstrap_interval(errors.double(), lengths)
    rate = float(errors.sum() / lengths.sum())
    reach = (
        1.96 * float(errors.double().std()) / 20 / math.sqrt(400)
    )  # all lengths equal: the mean of independent numbers
    assert (low, high) == (pytest.approx(rate - reach, abs=2e-3), pytest.approx(rate + reach, abs=2e-3))
    assert metrics.bootstrap_interval(errors.double(), lengths) == (low, high)


@pytest.mark.parametrize(
    ("best", "counts", "heard"),
    [
        ([1, 1, 0, 1, 2, 2], [6], [(1, 1, 2)]),
        ([0, 0, 0], [3], [()]),
        ([3, 3, 3, 2], [2, 2], [(3,), (3, 2)]),  # a repeat across a border is two phones
        ([1, 0, 0, 1], [1, 2, 1], [(1,), (), (1,)]),
    ],
)
def test_greedy_answers_join_repeats_and_drop_blanks(best, counts, heard):
    assert greedy(np.array(best), counts) == heard


def test_the_loss_is_minus_the_log_of_all_paths_that_spell_the_string():
    logits = torch.randn(1, 1, 6, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts, strings = [4, 2], [(1, 1, 2), (3,)]
    losses = ctc(logits, counts, strings)[0, 0]
    begin = 0
    for count, string, loss in zip(counts, strings, losses, strict=True):
        chances = logits[0, 0, begin : begin + count].softmax(-1)
        spelled = [p for p in itertools.product(range(K), repeat=count) if greedy(np.array(p), [count]) == [string]]
        total = sum(math.prod(float(chances[t, k]) for t, k in enumerate(path)) for path in spelled)
        assert float(loss) == pytest.approx(-math.log(total))
        begin += count


def test_frames_needed_are_what_ctc_needs():
    assert [frames_needed(s) for s in ((1,), (1, 2), (1, 1), (1, 1, 1, 2))] == [1, 2, 3, 6]
    logits = torch.zeros(1, 1, 5, K)
    assert float(ctc(logits, [5], [(1, 1, 1)])) > 0
    assert float(ctc(logits[:, :, :4], [4], [(1, 1, 1)])) == 0  # zero_infinity: it teaches nothing


def head(seed: int) -> ProbeHead:
    made = ProbeHead(L, D, P, K, torch.Generator().manual_seed(seed))
    with torch.no_grad():  # layers weighted unequally, so that mixing them shows
        made.layer_scores.copy_(torch.linspace(-1, 1, L))
    return made


def test_a_head_multiplied_out_is_the_head_frame_by_frame():
    layers = torch.randn(L, 11, D, generator=torch.Generator().manual_seed(0))
    heads = [head(seed).requires_grad_(False) for seed in (1, 2)]
    logits = FrameGrid(heads, (1e-3, 1e-2), torch.device("cpu")).logits(layers)
    for n, alone in enumerate(heads):
        mixed = sum(weight * layer for weight, layer in zip(alone.layer_weights, layers, strict=True))
        for rate in range(2):
            torch.testing.assert_close(logits[n, rate], alone.classify(alone.project(mixed)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_run_in_the_grid_is_the_head_trained_alone_with_torch(clip_norm):
    generator = torch.Generator().manual_seed(0)
    counts, strings, rates = [7, 4, 9], [(1, 2, 2), (3,), (2, 1, 3, 1)], (1e-3, 3e-2)
    steps = [Frames(torch.randn(L, sum(counts), D, generator=generator), counts) for _ in range(15)]
    together = FrameGrid([head(1), head(2)], rates, torch.device("cpu"))
    for frames in steps:
        together.step(frames, strings, clip_norm)
    for n, seed in enumerate((1, 2)):
        for r, lr in enumerate(rates):
            alone = head(seed)
            adam, loss = torch.optim.Adam(alone.parameters(), lr=lr), nn.CTCLoss(blank=0, zero_infinity=True)
            for frames in steps:
                adam.zero_grad()
                logits = alone.pooled(frames.layers.transpose(0, 1)).log_softmax(-1)
                padded = nn.utils.rnn.pad_sequence(list(logits.split(counts)))
                loss(padded, torch.tensor(sum(strings, ())), tuple(counts), tuple(map(len, strings))).backward()
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(alone.parameters(), clip_norm)
                adam.step()
            for name, value in alone.named_parameters():
                torch.testing.assert_close(together.parameters[name][n, r], value, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_takes_the_steps_that_a_processor_takes():
    counts, strings, rates = [7, 4, 9], [(1, 2, 2), (3,), (2, 1, 3, 1)], (1e-3, 1e-2)
    frames = Frames(torch.randn(L, sum(counts), D, generator=torch.Generator().manual_seed(0)), counts)
    grids = [FrameGrid([head(1), head(2)], rates, torch.device(device)) for device in ("cpu", "cuda")]
    for _ in range(5):
        for grid, layers in zip(grids, (frames.layers, frames.layers.cuda()), strict=True):
            grid.step(Frames(layers, counts), strings, 1.0)
    for name, value in grids[0].parameters.items():
        torch.testing.assert_close(grids[1].parameters[name].cpu(), value, rtol=1e-3, atol=1e-4)


def test_a_diverging_run_leaves_its_neighbours_alone():
    frames = Frames(torch.randn(L, 9, D, generator=torch.Generator().manual_seed(0)), [9])
    mixed = FrameGrid([head(1)], (1e-2, 1e30), torch.device("cpu"))
    alone = FrameGrid([head(1)], (1e-2,), torch.device("cpu"))
    for _ in range(10):
        mixed.step(frames, [(1, 2)], 1.0)
        alone.step(frames, [(1, 2)], 1.0)
    assert mixed.finite().tolist() == [[True, False]]
    for name, value in alone.parameters.items():
        torch.testing.assert_close(mixed.parameters[name][:, 0], value[:, 0])


def said(*rows: tuple[str, str | None], frames: int = 20) -> Manifest:
    """Utterances of (split, phones)."""
    return Manifest(
        tuple(utterance(f"{n}", frames, {"pr": split}, pronunciation=text) for n, (split, text) in enumerate(rows))
    )


def splits_of(manifest: Manifest, unseen="refuse"):
    return spoken_splits(manifest, TASKS["pr"], ("sil",), unseen)


def test_strings_are_the_phones_in_order_without_silences():
    timed = utterance("t", 20, {"pr": "test"}, phones=(("sil", 0, 9), ("b", 9, 20), ("aɪ", 20, 30), ("sil", 30, 40)))
    assert phones_of(timed) == "sil b aɪ sil"
    rest = said(("train", "b aɪ t"), ("train", "t sil"), ("dev", "t"))
    splits = splits_of(Manifest((*rest, timed)))
    assert splits.names == ("aɪ", "b", "t")
    assert splits.train.strings == ((2, 1, 3), (3,))
    assert (splits.test.ids, splits.test.strings) == (("toy/t",), ((2, 1),))
    assert (splits.train.num_phones, splits.unfit) == (4, ())


def test_training_utterances_too_short_for_their_phones_are_named_and_the_others_stay():
    manifest = said(("train", "a b a"), ("train", "a a b"), ("dev", "a a a"), ("test", "b b b"), frames=3)
    splits = splits_of(manifest)
    assert (splits.train.ids, splits.unfit) == (("toy/0",), ("toy/1",))
    assert (len(splits.dev), len(splits.test)) == (1, 1)  # what is only answered needs no room


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("train", None), ("dev", "a"), ("test", "a")],
            "toy/0 takes part in task 'pr' but has no phones; give it one",
        ),
        ([("train", "a"), ("dev", "sil"), ("test", "a")], "toy/1 takes part .* nothing is left of its phones"),
        ([("train", "a"), ("dev", "a"), ("test", "a b")], "toy/2: the phone 'b' is in the test split .* no training"),
        ([("train", "a"), ("test", "a")], "task 'pr' has no dev utterances"),
        ([("train", "a " * 30), ("dev", "a"), ("test", "a")], "none of the 1 training utterances has as many frames"),
    ],
)
def test_phones_that_cannot_be_recognised_are_refused_with_a_reason(rows, message):
    with pytest.raises(DataError, match=message):
        splits_of(said(*rows))


def test_a_phone_that_training_lacks_is_an_error_whatever_is_answered():
    splits = splits_of(said(("train", "a b"), ("dev", "a x"), ("test", "y a z")), "count")
    assert (splits.names, splits.unseen) == (("a", "b"), 2)
    (truth,) = splits.test.strings
    answers = itertools.chain.from_iterable(itertools.product(range(1, K), repeat=n) for n in range(5))
    heard = [answer for answer in answers if set(answer) <= {1, 2}]  # all that a head of two phones can say
    assert min(sum(metrics.phone_errors(truth, answer)) for answer in heard) == 2


def test_the_constant_answer_is_the_best_of_repeating_the_most_frequent_phone():
    draw = random.Random(1)
    texts = [" ".join(draw.choices("abc", weights=(6, 2, 1), k=draw.randrange(3, 12))) for _ in range(30)]
    splits = splits_of(said(*[("train", text) for text in texts], ("dev", "a"), ("test", "a")))
    answer = splits.constant()
    assert set(answer) == {1}
    costs = [sum(edit_distance(string, (1,) * k) for string in splits.train.strings) for k in range(14)]
    assert costs[len(answer)] == min(costs)
    rare = splits_of(said(("train", "a b c d e f"), ("train", "g h b c d"), ("dev", "a"), ("test", "a")))
    assert len(rare.constant()) <= 1  # a second one would have to be right somewhere
