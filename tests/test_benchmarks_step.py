"""The benchmark of steps: its operation counts are those of the sizes, and its three ways compute the same kind of step."""

from pathlib import Path

import pytest
import torch

from cache.frames import num_frames
from pipeline.student.shape import KERNELS, STRIDES


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The module and a kitchen with two short batches."""
    root: Path = tmp_path_factory.mktemp("step")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        patch.setenv("DECANT_STORE", str(root / "store"))
        import bench_step

        size = bench_step.QUICK._replace(batch_seconds=2.5, batches=2)
        yield bench_step, bench_step.Kitchen(size, root, "float32", "cpu")


def trunk(samples, frames, config, blocks):
    """Multiply-accumulates of one utterance: convolutions, projection, positions, blocks."""
    total, length, channels = 0, samples, 1
    for kernel, stride, out in zip(KERNELS, STRIDES, config.conv_dim, strict=True):
        length = (length - kernel) // stride + 1
        total += length * channels * out * kernel
        channels = out
    width, units = config.hidden_size, config.intermediate_size
    total += frames * channels * width
    # an even kernel padded by half of it on both sides gives one frame too many, which is thrown away
    total += (frames + 1) * width * width // config.num_conv_pos_embedding_groups * config.num_conv_pos_embeddings
    return total + blocks * (4 * frames * width**2 + 2 * frames**2 * width + 2 * frames * width * units)


@pytest.mark.parametrize("method", ["ALONE", "THREE", "WHOLE"])
def test_operations_are_those_of_the_sizes(bench, method):
    bench, kitchen = bench
    contest, config = bench.Contest(kitchen, getattr(bench, method)), kitchen.config
    batch, samples = contest.memory[0].waves.shape
    frames, width, blocks = num_frames(samples), config.hidden_size, config.num_hidden_layers
    teacher = trunk(samples, frames, config, blocks)
    if method == "WHOLE":
        student = teacher + 4 * frames * width**2
    else:
        heads = 3 if method == "ALONE" else 9
        groups = heads // 3
        student = trunk(samples, frames, config, 2)
        student += groups * (frames * width * 3 * width + 3 * frames * width**2)
    teachers = 3 if method == "THREE" else 1
    assert contest.operations() == (batch * student, batch * teachers * teacher)


def test_a_turn_of_each_way_takes_every_batch_once_and_changes_the_student(bench, monkeypatch):
    bench, kitchen = bench
    contest = bench.Contest(kitchen, bench.THREE)
    seen = []
    update = contest.learner.update

    def noted(batches, frames, step):
        (batch,) = batches
        seen.append((type(contest.learner.make_targets).__name__, batch.ids, frames, step))
        assert update([batch], frames, step).is_finite

    monkeypatch.setattr(contest.learner, "update", noted)
    rates = contest.rounds(1, 1)
    assert {way: len(rate) for way, rate in rates.items()} == dict.fromkeys(bench.WAYS, 1)
    assert [step for *_, step in seen] == list(range(1, 8))  # one to warm up, two batches in each way
    ids = [batch.ids for batch in contest.memory]
    online = [of for name, of, *_ in seen if name == "Online"]
    assert online == ids
    assert sorted(of for _, of, *_ in seen[1:]) == sorted(3 * ids)


def test_teachers_in_the_loop_give_what_a_store_of_theirs_would_hold(bench):
    bench, kitchen = bench
    contest = bench.Contest(kitchen, bench.WHOLE)
    batch = contest.online.batch = contest.memory[0]
    (made,) = contest.online([])
    (stored,) = contest.cached(batch.targets)
    assert made.shape == stored.shape
    outputs = kitchen.teachers["one"].outputs(batch.waves.float() / 32768, batch.samples)
    for n, layer in enumerate([outputs.projection, *(outputs.layers[n] for n in kitchen.size.layers)]):
        torch.testing.assert_close(made[:, n], layer, rtol=0, atol=0)
