"""The head of speech recognition beside torch's own layers, alone and in company, masked and side by side."""

import threading

import pytest
import torch

from pipeline.tasks.blstm import BlstmParams, Draws, SpeechHead, reduced
from pipeline.tasks.frames import Frames
from pipeline.tasks.masking import MaskParams, masked, stretches
from pipeline.tasks.sidebyside import SideBySide
from pipeline.tasks.speechruns import per_character

L, D, K, CPU = 3, 8, 6, torch.device("cpu")
COUNTS = [9, 4, 12, 1]


def head(**settings) -> SpeechHead:
    defaults = {"head_width": 5, "lstm_layers": 2, "lstm_width": 7, "dropout": 0.2, "reduce_frames": 1}
    made = SpeechHead(L, D, BlstmParams(**defaults | settings), K, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(made.layer_scores, generator=torch.Generator().manual_seed(1))
    return made


def some_frames(counts=COUNTS, seed=0) -> Frames:
    return Frames(torch.randn(L, sum(counts), D, generator=torch.Generator().manual_seed(seed)), list(counts))


def alone(frames: Frames, number: int) -> Frames:
    """One utterance of a batch."""
    return Frames(frames.layers.split(frames.counts, 1)[number], [frames.counts[number]])


@pytest.mark.parametrize("reduce_frames", [1, 2, 3])
def test_the_head_is_torchs_own_lstm_of_all_layers_at_once(reduce_frames):
    speech, frames = head(reduce_frames=reduce_frames), some_frames()
    reference = torch.nn.LSTM(5 * reduce_frames, 7, num_layers=2, bidirectional=True)
    reference.load_state_dict(
        {
            name.replace("_l0", f"_l{layer}{direction}"): value
            for layer, lstm in enumerate(speech.lstms)
            for direction, part in (("", lstm.onward), ("_reverse", lstm.back))
            for name, value in part.state_dict().items()
        }
    )
    for number, answer in enumerate(speech(frames)):
        layers = alone(frames, number).layers
        mixed = sum(weight * layer for weight, layer in zip(speech.layer_scores.softmax(0), layers, strict=True))
        projected = speech.project(mixed)
        while len(projected) % reduce_frames:
            projected = torch.cat([projected, torch.zeros(1, 5)])
        side_by_side = torch.cat([projected[at::reduce_frames] for at in range(reduce_frames)], dim=1)
        want = speech.classify(reference(side_by_side)[0]).log_softmax(-1)
        torch.testing.assert_close(answer, want, rtol=0, atol=1e-5)
        assert len(answer) == reduced(COUNTS[number], reduce_frames)


def test_an_answer_does_not_depend_on_the_company():
    speech, frames = head(), some_frames()
    together = speech(frames)
    for number, answer in enumerate(together):
        torch.testing.assert_close(answer, speech(alone(frames, number))[0], rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_answers():
    speech, frames = head(), some_frames()
    want = speech(frames)
    on_gpu = speech.to("cuda")(Frames(frames.layers.cuda(), frames.counts), None, None)
    for answer, row in zip(on_gpu, want, strict=True):
        torch.testing.assert_close(answer.cpu(), row, rtol=0, atol=1e-4)


def test_the_loss_is_that_of_one_utterance_at_a_time():
    log_probs = [rows.detach() for rows in head()(some_frames())]
    spellings = [(1, 2, 2), (3,), (5, 4, 3, 2, 1), (1, 2)]
    losses = per_character(log_probs, spellings)
    for rows, spelling, loss in zip(log_probs[:3], spellings, losses, strict=False):
        want = torch.nn.functional.ctc_loss(
            rows, torch.tensor(spelling), torch.tensor(len(rows)), torch.tensor(len(spelling)), reduction="sum"
        )
        assert float(loss) == pytest.approx(float(want) / len(spelling), rel=1e-5)
    assert float(losses[3]) == 0, "two characters do not fit into one frame"


def test_dropout_and_masks_come_with_draws_alone_and_again_with_the_same():
    speech, frames = head(), some_frames()
    masks = MaskParams(time_masks=1, time_width=4, channel_masks=1, channel_width=4)
    plain = torch.cat(speech(frames))
    assert torch.equal(plain, torch.cat(speech(frames, masks)))
    first, again, other = (torch.cat(speech(frames, masks, Draws.seeded(seed, CPU))) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, plain)
    assert torch.equal(plain, torch.cat(head(dropout=0.0)(frames, None, Draws.seeded(0, CPU))))


def test_dropout_keeps_the_mean_and_drops_its_share():
    ones = torch.ones(100_000, 1)
    kept = head(dropout=0.2)._dropped(ones, torch.Generator().manual_seed(0))
    assert float((kept == 0).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.01)


def test_masks_hide_whole_stretches_of_each_utterance_and_nothing_else():
    params = MaskParams(time_masks=2, time_width=40, channel_masks=1, channel_width=3)
    generator = torch.Generator().manual_seed(0)
    hidden = masked([torch.ones(30, 10), torch.ones(200, 10), torch.ones(1, 10)], params, generator)
    for utterance in hidden:
        seen_frames, seen_channels = (utterance > 0).any(1), (utterance > 0).any(0)
        assert torch.equal(utterance > 0, seen_frames[:, None] & seen_channels)
        assert int((~seen_channels).sum()) <= 3
    assert not torch.equal((hidden[0] > 0).any(0), (hidden[1] > 0).any(0)), "each draws its own"
    assert bool((hidden[2] > 0).any()), "of one frame nothing is hidden"


def test_a_stretch_has_every_width_and_every_place_alike():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([stretches(8, 1, 3, generator) for _ in range(4000)])
    widths = (~drawn).sum(1)
    assert torch.bincount(widths, minlength=4).tolist() == pytest.approx([1000] * 4, abs=120)
    assert all(bool((~row).int().diff().abs().sum() <= 2) for row in drawn), "one stretch, not two"
    ones = (~drawn[widths == 1]).float().mean(0)
    assert ones.tolist() == pytest.approx([1 / 8] * 8, abs=0.05)


def test_pieces_of_work_run_beside_each_other_and_come_back_in_order():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        both = threading.Barrier(2, timeout=10)
        with SideBySide(CPU) as cores:
            assert cores.each([lambda: (both.wait(), torch.get_num_threads())[1]] * 2) == [1, 1]
            assert cores.each([lambda i=i: i for i in range(5)]) == [0, 1, 2, 3, 4]
            with pytest.raises(ZeroDivisionError):
                cores.each([lambda: 1 / 0])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_line_of_work_keeps_its_order_while_others_overtake_it():
    before, done = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        gate = threading.Event()
        with SideBySide(CPU) as cores:
            first = cores.begin([lambda: gate.wait(10) and done.append("a1"), lambda: done.append("b1")])
            second = cores.begin([lambda: done.append("a2"), lambda: done.append("b2")], after=first)
            second[1].result(timeout=10)
            assert done == ["b1", "b2"], "a waits, b need not"
            gate.set()
            second[0].result(timeout=10)
            assert done[2:] == ["a1", "a2"]
            failed = cores.begin([lambda: 1 / 0])
            with pytest.raises(ZeroDivisionError):
                cores.begin([lambda: done.append("never")], after=failed)[0].result(timeout=10)
    finally:
        torch.set_num_threads(before)
    assert len(done) == 4
