"""wav2vec 2.0's objective: its equations in double precision, transformers' own pretraining model, and what it teaches."""

import math

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from scipy import stats
from transformers.models.wav2vec2 import modeling_wav2vec2

from pipeline.teachers.contrastive import (
    Annealing,
    Contrastive,
    ContrastiveParams,
    Quantiser,
    contrast,
    diversity_loss,
    draw_distractors,
)

SETTINGS = {
    "kind": "contrastive",
    "codebooks": 2,
    "entries": 12,
    "code_width": 16,
    "target_width": 10,
    "gumbel": {"start": 2.0, "end": 0.5, "reached": 0.7},
    "distractors": 7,
    "temperature": 0.1,
    "diversity_weight": 0.1,
    "penalty_weight": 10.0,
    "feature_grad_mult": 0.1,
    "unmasked_weight": 0.0,
}
KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


def settings(**changes):
    return ContrastiveParams.model_validate({**SETTINGS, **changes})


def config(**changes):
    return transformers.Wav2Vec2Config(
        conv_dim=[8, 8, 8, 12, 12, 16, 16],
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_proj_dropout=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        layerdrop=0.0,
        **changes,
    )


def new_objective(seed=0, **changes):
    torch.manual_seed(seed)
    return Contrastive(transformers.Wav2Vec2Model(config()), settings(**changes))


@pytest.fixture
def waves():
    return 0.1 * torch.randn(3, 400 + 320 * 29, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def hidden():
    rows = torch.zeros(3, 30, dtype=torch.bool)
    rows[0, 3:15], rows[1, 8:18], rows[2, 0:10] = True, True, True
    rows[2, 14:29] = True
    return rows


def by_the_equations(task, waves, hidden, others, noise, temperature):
    """The loss as the paper writes it, frame by frame in float64, from the weights alone: loss and accuracy."""
    params = task.params
    weights = {name: value.detach().double() for name, value in task.state_dict().items()}
    with torch.no_grad():
        raw = task.model.feature_extractor(waves).transpose(1, 2)
        normed = task.model.feature_projection(raw)[1].double()
        states = task.model(waves, mask_time_indices=hidden).last_hidden_state.double()
    width = params.code_width // params.codebooks
    books = weights["quantiser.codevectors"].view(params.codebooks, params.entries, width).numpy()
    frames = [tuple(place) for place in hidden.nonzero().tolist()]
    targets, use = [], np.zeros((params.codebooks, params.entries))
    for number, (b, t) in enumerate(frames):
        logits = weights["quantiser.weight_proj.weight"] @ normed[b, t] + weights["quantiser.weight_proj.bias"]
        logits = logits.view(params.codebooks, params.entries).numpy()
        use += np.exp(logits) / np.exp(logits).sum(1, keepdims=True) / len(frames)
        chosen = (logits + noise[number].numpy()).argmax(1)  # the softmax keeps the order, whatever its temperature
        word = np.concatenate([books[g, v] for g, v in enumerate(chosen)])
        targets.append(weights["project_q.weight"].numpy() @ word + weights["project_q.bias"].numpy())

    def similarity(a, b):
        return a @ b / math.sqrt((a @ a) * (b @ b)) / params.temperature

    total, hits = 0.0, 0
    for number, (b, t) in enumerate(frames):
        context = (weights["project_hid.weight"] @ states[b, t] + weights["project_hid.bias"]).numpy()
        own = similarity(context, targets[number])
        rivals = [
            similarity(context, targets[o]) for o in others[number] if not np.array_equal(targets[o], targets[number])
        ]
        total += math.log(math.exp(own) + sum(map(math.exp, rivals))) - own  # eq. 3
        hits += bool(rivals) and own > max(rivals)
    entropies = -(use * np.log(use)).sum(1)
    cells = params.codebooks * params.entries
    diversity = (cells - np.exp(entropies).sum()) / cells
    penalty = float(raw.double().square().mean())
    return (
        total / len(frames) + params.diversity_weight * diversity + params.penalty_weight * penalty,
        hits / len(frames),
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_that_of_the_equations_in_double_precision(training, waves, hidden, monkeypatch):
    task = new_objective().train(training)
    with torch.no_grad():  # weights as small as after some training, so that the softmax is not one-hot
        task.quantiser.weight_proj.weight.mul_(0.3)
    torch.manual_seed(3)
    others = draw_distractors(hidden, 7)
    noise = torch.zeros(int(hidden.sum()), 2, 12, dtype=torch.float64)
    if training:
        generator = torch.Generator().manual_seed(4)
        noise = -torch.empty(noise.shape, dtype=torch.float64).exponential_(generator=generator).log()

    def gumbel_softmax(logits, tau, hard):
        assert (tau, hard) == (task.params.gumbel.at(0.3), True)
        soft = ((logits + noise) / tau).softmax(2).float()
        return torch.nn.functional.one_hot(soft.argmax(2), 12) - soft.detach() + soft

    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", gumbel_softmax)
    torch.manual_seed(3)
    found = task(waves, hidden, 0.3)
    loss, accuracy = by_the_equations(task, waves, hidden, others.tolist(), noise, task.params.gumbel.at(0.3))
    assert found.loss.item() == pytest.approx(loss, abs=1e-5)
    assert found.accuracy.item() == pytest.approx(accuracy)


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_that_of_transformers_with_the_same_weights_noise_and_distractors(training, waves, monkeypatch):
    # when it does not train, theirs measures diversity by the codes and not by the softmax
    params = settings(penalty_weight=0.0, diversity_weight=0.1 if training else 0.0)
    reference = modeling_wav2vec2.Wav2Vec2ForPreTraining(
        config(
            num_codevectors_per_group=12,
            num_codevector_groups=2,
            codevector_dim=16,
            proj_codevector_dim=10,
            num_negatives=7,
            contrastive_logits_temperature=0.1,
            diversity_loss_weight=0.1,
        )
    ).train(training)
    task = Contrastive(reference.wav2vec2, params).train(training)
    for name in ("project_hid", "project_q"):
        getattr(task, name).load_state_dict(getattr(reference, name).state_dict())
    task.quantiser.load_state_dict(reference.quantizer.state_dict())  # the same names and shapes
    everything = torch.ones(3, 30, dtype=torch.bool)  # it draws noise for frames that are not hidden too
    reference.set_gumbel_temperature(params.gumbel.at(0.4))
    np.random.seed(1)
    theirs = modeling_wav2vec2._sample_negative_indices((3, 30), 7, everything.numpy())
    others = torch.from_numpy(theirs).long().flatten(0, 1)
    monkeypatch.setattr("pipeline.teachers.contrastive.draw_distractors", lambda chosen, num: others)

    torch.manual_seed(2)
    wanted = reference(waves, mask_time_indices=everything, sampled_negative_indices=torch.from_numpy(theirs))
    torch.manual_seed(2)
    found = task(waves, everything, 0.4)
    loss = wanted.loss if training else wanted.contrastive_loss
    assert found.loss.item() == pytest.approx(loss.item() / everything.sum().item(), abs=1e-5)


def test_what_a_hidden_frame_holds_reaches_its_target_and_no_prediction(waves, hidden):
    task = new_objective().eval()
    seen = []
    task.project_hid.register_forward_hook(lambda module, given, made: seen.append(given[0].detach().clone()))
    task.quantiser.register_forward_hook(lambda module, given, made: seen.append(given[0].detach().clone()))
    changed = waves.clone()
    changed[0, 320 * 6 : 320 * 12] += 0.05 * torch.randn(320 * 6)  # within frames 3 to 15 of row 0, all hidden
    for some in (waves, changed):
        task.model.feature_extractor.conv_layers[0].layer_norm = torch.nn.Identity()  # whose statistics see everything
        task(some, hidden, 0.0)
    targets, states, changed_targets, changed_states = seen
    torch.testing.assert_close(states, changed_states, rtol=0, atol=1e-6)
    moved = (targets - changed_targets).abs().amax(1).gt(1e-3).nonzero()[:, 0]
    assert moved.tolist() == list(range(5 - 3, 12 - 3))  # frames 5 to 11 touch the change; 3 is the first hidden one


def test_distractors_are_other_chosen_frames_of_the_same_row_and_uniform():
    chosen = torch.zeros(4, 40, dtype=torch.bool)
    chosen[0, 5:9], chosen[1, [0, 39]], chosen[3, ::3] = True, True, True
    torch.manual_seed(0)
    others = draw_distractors(chosen, 3_000)
    rows = chosen.nonzero()[:, 0]
    own = torch.arange(len(rows))[:, None]
    assert others.shape == (4 + 2 + 14, 3_000)
    assert torch.equal(rows[others], rows[:, None].expand_as(others))
    assert not (others == own).any()
    assert torch.equal(others[4:6], torch.tensor([[5], [4]]).expand(2, 3_000))
    for frame in (0, 3, 6, 12, 19):
        times = torch.bincount(others[frame])[torch.bincount(others[frame]) > 0].numpy()
        peers = int((rows == rows[frame]).sum()) - 1
        assert len(times) == peers
        assert stats.chisquare(times).pvalue > 1e-4


def test_a_frame_without_another_in_its_row_teaches_nothing_and_counts_as_missed(waves):
    task = new_objective().eval()
    uses = []
    task.quantiser.register_forward_hook(lambda module, given, made: uses.append(made.mean_use))
    alone = torch.zeros(3, 30, dtype=torch.bool)
    alone[1, 7] = True
    prediction = task(waves, alone, 0.0)
    penalty = task.model.feature_extractor(waves).square().mean()
    assert draw_distractors(alone, 5).tolist() == [[0] * 5]
    assert prediction.accuracy.item() == 0.0
    assert prediction.loss.item() == pytest.approx((0.1 * diversity_loss(uses[0]) + 10 * penalty).item(), rel=1e-5)


def test_distractors_with_the_codes_of_the_target_are_not_counted():
    generator = torch.Generator().manual_seed(0)
    predicted, targets = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    targets[2] = targets[0]
    codes = torch.tensor([[1, 2], [1, 3], [1, 2], [2, 2]])
    logits = contrast(predicted, targets, codes, torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]))
    assert logits.isinf().tolist() == [
        [False, False, True, False],
        [False] * 4,
        [False, True, False, False],
        [False] * 4,
    ]
    wanted = torch.cosine_similarity(predicted[3], targets[[3, 0, 1, 2]], dim=1)
    torch.testing.assert_close(logits[3], wanted)


def test_a_collapsed_quantiser_scores_nothing(waves, hidden):
    task = new_objective(penalty_weight=0.0, diversity_weight=1.0).eval()
    with torch.no_grad():
        task.quantiser.weight_proj.weight.zero_()
        task.quantiser.weight_proj.bias[[3, 12 + 5]] = 50.0
    prediction = task(waves, hidden, 0.0)
    assert prediction.accuracy.item() == 0.0
    assert prediction.loss.item() == pytest.approx(1 - 1 / 12)  # the diversity loss alone, at its worst


def test_diversity_is_least_where_codewords_are_used_alike_and_most_where_one_is_left():
    alike = torch.full((2, 8), 1 / 8)
    one = torch.zeros(2, 8)
    one[0, 3] = one[1, 0] = 1.0
    assert diversity_loss(alike).item() == pytest.approx(0.0, abs=1e-6)
    assert diversity_loss(one).item() == pytest.approx(1 - 1 / 8)
    between = torch.rand(50, 2, 8, generator=torch.Generator().manual_seed(0)).softmax(2)
    assert all(0.0 < diversity_loss(use).item() < 1 - 1 / 8 for use in between)
    assert diversity_loss(torch.stack([alike[0], one[0]])).item() == pytest.approx((1 - 1 / 8) / 2)


def test_a_codeword_that_nothing_uses_leaves_the_gradient_finite():
    logits = torch.tensor([[[0.0, -200.0, 1.0]]], requires_grad=True)
    use = logits.softmax(2).mean(0)
    assert use[0, 1].item() == 0.0
    diversity_loss(use).backward()
    exact = logits.detach().double().requires_grad_()
    p = exact.softmax(2)[0, 0, [0, 2]]
    (1 - torch.exp(-(p * p.log()).sum()) / 3).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_the_temperature_falls_by_a_constant_factor_and_then_stays():
    gumbel = Annealing(start=2.0, end=0.5, reached=277_259 / 400_000)
    steps = [0, 1, 1_000, 277_258, 300_000, 400_000]
    wanted = [max(2.0 * 0.999995**step, 0.5) for step in steps]  # fairseq: latent_temp (2, 0.5, 0.999995)
    assert [gumbel.at(step / 400_000) for step in steps] == pytest.approx(wanted, rel=1e-5)


def test_codewords_are_drawn_with_the_probabilities_of_the_softmax_at_any_temperature():
    quantiser = Quantiser(16, settings())
    features = 0.2 * torch.randn(4_000, 16, generator=torch.Generator().manual_seed(1))
    likeliest = quantiser.eval()(features, 1.0)
    torch.manual_seed(0)
    warm = quantiser.train()(features, 2.0)
    torch.manual_seed(0)
    cold = quantiser(features, 0.5)
    assert torch.equal(warm.codes, cold.codes)  # the noise is added before the temperature divides
    share = (likeliest.codes == cold.codes).double().mean()
    logits = quantiser.weight_proj(features).view(-1, 2, 12).softmax(2)
    assert share.item() == pytest.approx(logits.amax(2).mean().item(), abs=0.02)  # Gumbel-max draws from the softmax
    torch.testing.assert_close(likeliest.mean_use, cold.mean_use)


def test_every_part_learns_and_the_convolutions_as_slowly_as_they_are_told(waves, hidden):
    gradients = {}
    for factor in (1.0, 0.1):
        task = new_objective(feature_grad_mult=factor).train()
        torch.manual_seed(1)
        task(waves, hidden, 0.5).loss.backward()
        found = {name: p.grad for name, p in task.named_parameters()}
        assert [name for name, gradient in found.items() if gradient is None or not gradient.any()] == []
        gradients[factor] = found
    for name, full in gradients[1.0].items():
        expected = full * (0.1 if "feature_extractor" in name else 1.0)
        torch.testing.assert_close(gradients[0.1][name], expected, rtol=1e-4, atol=1e-7)


def test_convolutions_whose_gradient_is_nought_stay_as_they_began(waves, hidden):
    task = new_objective(feature_grad_mult=0.0).train()
    assert torch.equal(task.convolve(waves), new_objective().convolve(waves))
    task(waves, hidden, 0.5).loss.backward()
    still = {name for name, p in task.named_parameters() if p.grad is None}
    assert still == {name for name, _ in task.named_parameters() if ".feature_extractor." in name}


def test_frames_that_were_not_hidden_are_told_from_each_other_when_asked(waves, hidden):
    torch.manual_seed(8)
    plain = new_objective().eval()
    both = new_objective(unmasked_weight=0.5).eval()
    both.load_state_dict(plain.state_dict())
    torch.manual_seed(8)
    first = plain(waves, hidden, 0.0)
    torch.manual_seed(8)
    second = both(waves, hidden, 0.0)
    with torch.no_grad():
        raw = both.model.feature_extractor(waves).transpose(1, 2)
        states = both.model(waves, mask_time_indices=hidden).last_hidden_state
        torch.manual_seed(8)
        draw_distractors(hidden, 7)  # the first comparison's draw
        seen, _ = both.compare(states, both.model.feature_projection(raw)[1], ~hidden, 2.0)
    assert second.accuracy == first.accuracy
    assert (second.loss - first.loss).item() == pytest.approx(0.5 * seen.loss.item(), abs=1e-5)


def test_the_same_seed_gives_the_same_loss_and_another_does_not(waves, hidden):
    task = new_objective().train()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(task(waves, hidden, 0.2).loss.item())
    assert losses[0] == losses[1] != losses[2]


def test_in_half_precision_the_comparison_stays_in_single(waves, hidden):
    task = new_objective().eval()
    states, features = (torch.randn(3, 30, width, generator=torch.Generator().manual_seed(width)) for width in (24, 16))
    torch.manual_seed(0)
    exact, exact_diversity = task.compare(states, features, hidden, 1.0)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, diversity = task.compare(states, features, hidden, 1.0)
        assert task.project_hid(states).dtype == torch.bfloat16  # it would have been half
        whole = task.train()(waves, hidden, 0.0)
    assert torch.equal(exact.loss, found.loss)
    assert torch.equal(exact_diversity, diversity)
    whole.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())


def planted(num, generator):
    """Tones that change every 4 frames, each followed by the same other one: what is hidden can be told from beside it."""
    notes = torch.tensor([400.0, 800.0, 1_600.0, 3_200.0])
    first = torch.randint(4, (num, 1), generator=generator)
    order = (first + torch.arange(8)) % 4
    hertz = notes[order].repeat_interleave(4 * 320, 1)
    phase = torch.cumsum(2 * math.pi * hertz / 16_000, 1)
    return 0.3 * torch.sin(phase) + 0.01 * torch.randn(phase.shape, generator=generator)


def test_a_short_training_on_planted_signals_lifts_the_accuracy_over_chance():
    task = new_objective(feature_grad_mult=1.0, penalty_weight=0.0, distractors=10).train()
    optimiser = torch.optim.Adam(task.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    history = []
    for step in range(150):
        waves = planted(8, generator)
        hidden = torch.zeros(8, 31, dtype=torch.bool)
        for row in hidden:
            start = int(torch.randint(4, 20, (1,), generator=generator))
            row[start : start + 8] = True
        prediction = task(waves, hidden, step / 150)
        optimiser.zero_grad()
        prediction.loss.backward()
        optimiser.step()
        history.append(prediction.accuracy.item())
    assert np.mean(history[:10]) < 0.4
    assert np.mean(history[-20:]) > 0.8


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"entries": 1}, "greater than or equal to 2"),
        ({"gumbel": {"start": 2.0, "end": 0.5, "reached": 0.0}}, "greater than 0"),
        ({"negatives": 3}, "Extra inputs"),
        ({"code_width": 15}, "code_width 15 must be a multiple of codebooks"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, text):
    with pytest.raises(ValidationError, match=text):
        settings(**change)
