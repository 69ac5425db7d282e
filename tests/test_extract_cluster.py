"""Extraction on workers in processes of their own: the bytes of one process, whatever is killed, hangs, or is poison."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from distributed import Client

from cache.errors import DataError, ResourceError, SettingsError, StoreError
from pipeline.extraction.executors import SlurmParams, hire, local_workers, running_scheduler, slurm_cluster
from pipeline.extraction.settings import Keep
from stages._params import read_params
from tests.cluster_fixtures import (
    PARAMS,
    PRELOAD,
    ROOT,
    Driver,
    dask_settings,
    files,
    in_this_process,
    is_alive,
    make_corpus,
    make_logmel,
    make_student,
    settle,
    two_workers,
    until,
)
from tests.in_process import decant


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with two_workers(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def hooks(cluster):
    cluster.client.run(settle)
    cluster.hooks.clear()
    yield cluster.hooks
    cluster.hooks.clear()


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Its waves are in both of the stores, `reference` and `store`."""
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    corpus = make_corpus(tmp_path)
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "waves").symlink_to(tmp_path / "store" / "waves")
    return corpus


@pytest.fixture
def reference(tmp_path, monkeypatch, corpus):
    """(model, params, keep) -> receipt and files that this process makes."""

    def make(model, params=PARAMS, **keep):
        with monkeypatch.context() as patch:
            patch.setenv("DECANT_STORE", str(tmp_path / "reference"))
            receipt = in_this_process(corpus, model, params, **keep)
            return receipt, files(receipt)

    return make


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_two_workers_write_the_bytes_that_one_process_writes(codec, cluster, hooks, corpus, reference, tmp_path):
    model, keep = make_student(tmp_path), Keep(layers=(0, (1, 2)), select="all")
    params = PARAMS.model_copy(update={"codec": codec})
    driver = Driver(cluster.client, corpus, model, params, keep)
    orphan = driver.job.directory / "layer-00" / "c" / "3" / ".0.of-a-lost-driver.partial"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"half a shard")
    receipt = driver()
    whole, bytes_of_whole = reference(model, params, keep=keep)
    assert receipt == whole
    assert files(receipt) == bytes_of_whole  # and so no partial file is left
    assert sorted(hooks.made()) == list(range(8))
    assert sum(s for s, found in driver.ticks if not found) == pytest.approx(corpus.manifest.samples.sum() / 16_000)
    again = Driver(cluster.client, corpus, model, params, keep)
    assert again() == receipt
    assert len(hooks.made()) == 8  # nothing was made a second time
    assert again.ticks == [(pytest.approx(corpus.manifest.samples.sum() / 16_000), True)]


def test_kill_9_of_a_worker_in_the_middle_of_a_shard_costs_that_shard_alone(
    cluster, hooks, corpus, reference, tmp_path
):
    model = make_logmel(tmp_path)
    hooks.at(2, "kill", once=True)
    receipt = Driver(cluster.client, corpus, model)()
    assert (receipt, files(receipt)) == reference(model)
    made = hooks.made()
    assert made.count(2) == 2
    assert set(made) == set(range(8))
    assert len(made) <= 10  # what it held beside shard 2 is made again, too, and no more than that


def test_a_worker_that_hangs_loses_its_work_to_others_and_is_started_again(cluster, hooks, corpus, reference, tmp_path):
    model, jumped = make_logmel(tmp_path), []
    hooks.at(1, "stop", once=True)

    def clock():
        """Real seconds, until one worker has stopped and all others have nothing to do; then the deadline is over."""
        if not jumped and (hooks.folder / "stopped").exists() and driver.crew.busy == 1:
            jumped.append(2000.0)
        return time.monotonic() + sum(jumped)

    driver = Driver(cluster.client, corpus, model, clock=clock)
    receipt = driver()
    assert (receipt, files(receipt)) == reference(model)
    assert hooks.made().count(1) == 2
    assert [line for line in driver.said if "answered nothing for 1000 s; its work goes to others" in line]
    stopped = int((hooks.folder / "stopped").read_text())
    until(lambda: not is_alive(stopped), "its nanny ends it")


def test_a_shard_that_always_fails_is_put_aside_until_the_others_are_done(cluster, hooks, corpus, reference, tmp_path):
    model = make_logmel(tmp_path)
    hooks.at(1, "kill")
    hooks.at(4, "bad", text="tiny/009: layer-00 has values that are not finite")
    hooks.at(5, "defect", text="out of memory")
    driver = Driver(cluster.client, corpus, model, attempts=2)
    with pytest.raises(DataError) as error:
        driver()
    assert str(error.value).startswith("3 of 8 shards failed 2 times each and all others are committed: ")
    for told in (
        "shard 1 (tiny/002 to tiny/003, 2 utterances): its worker ended",
        "shard 4 (tiny/008 to tiny/009, 2 utterances): tiny/009: layer-00 has values that are not finite",
        "shard 5 (tiny/010 to tiny/011, 2 utterances): RuntimeError: out of memory",
    ):
        assert told in str(error.value)
    assert driver.committed == {0, 2, 3, 6, 7}
    assert hooks.made().count(4) == hooks.made().count(5) == 2
    assert hooks.made().count(1) in (2, 3)  # a death beside another shard is not counted
    hooks.clear()
    receipt = Driver(cluster.client, corpus, model)()
    assert sorted(hooks.made()) == [1, 4, 5]
    assert (receipt, files(receipt)) == reference(model)


def test_workers_refuse_another_store_and_the_driver_another_disk(cluster, hooks, corpus, tmp_path):
    model = make_logmel(tmp_path)
    driver = Driver(cluster.client, corpus, model)
    newer = PARAMS.model_copy(update={"version": 2})
    driver.order = replace(driver.order, params=newer)
    with pytest.raises(StoreError, match=r"worker process \d+ on .*would make the store .*: version differs; give all"):
        driver()
    driver = Driver(cluster.client, corpus, model)
    driver.order = replace(driver.order, models=(str(tmp_path / "nothing"),))
    with pytest.raises(StoreError, match=r"worker process \d+ on .*nothing is no model"):
        driver()
    assert hooks.made() == []
    driver = Driver(cluster.client, corpus, model)
    driver.order = replace(driver.order, directory=str(tmp_path / "elsewhere"))
    with pytest.raises(StoreError, match=r"here it is absent; set DECANT_STORE to a disk that all workers share"):
        driver()
    assert driver.committed == set()


def command(tmp_path, corpus, out, *more):
    params = {"extract": PARAMS.model_dump(), "keep": {"layers": "all", "select": "all"}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    return [
        *("extract", "tiny", "--keep", "keep", "--params", tmp_path / "params.yaml", "--out", tmp_path / out),
        *("--model", make_logmel(tmp_path), "--manifest", corpus.manifest_path, "--waves", corpus.waves_path, *more),
    ]


def serve(file):
    """A process: a Dask scheduler that writes where it is to `file`."""
    import asyncio

    from distributed import Scheduler

    async def live():
        async with Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0", scheduler_file=file) as it:
            await it.finished()

    asyncio.run(live())


def work(file, hooks, preload=PRELOAD):
    """A process: a Dask worker without a nanny."""
    import asyncio

    from distributed import Worker

    os.environ["DECANT_TEST_HOOKS"] = hooks

    async def live():
        async with Worker(scheduler_file=file, nthreads=1, host="127.0.0.1", preload=[str(preload)]) as it:
            await it.finished()

    asyncio.run(live())


def work_without_us(file, hooks):
    """A process: a Dask worker from an environment where Decant is not installed."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
    sys.path[:] = [place for place in sys.path if not (Path(place) / "pipeline").exists()]
    for name in [name for name in sys.modules if name.split(".")[0] == "pipeline"]:
        del sys.modules[name]
    (Path(hooks) / "nothing.py").touch()
    work(file, hooks, Path(hooks) / "nothing.py")


@pytest.fixture
def elsewhere(cluster, tmp_path, request):
    """A scheduler that somebody else runs, with a worker that has no nanny; `cluster` has made Dask's settings."""
    file, context = tmp_path / "scheduler.json", multiprocessing.get_context("forkserver")
    target = getattr(request, "param", work)
    processes = [
        context.Process(target=serve, args=(str(file),)),
        context.Process(target=target, args=(str(file), str(cluster.hooks.folder))),
    ]
    try:
        processes[0].start()
        until(file.exists, "the scheduler starts")
        processes[1].start()
        yield file, *(process.pid for process in processes)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def test_a_lost_scheduler_is_named_and_the_same_command_goes_on(elsewhere, cluster, hooks, corpus, reference, tmp_path):
    file, scheduler, _ = elsewhere
    hooks.at(3, "kill-other", text=scheduler)
    done = decant(*command(tmp_path, corpus, "r.json", "--executor", "dask", "--scheduler", file))
    assert done.returncode == 4
    assert "is gone, or was restarted; what is committed stays: see that one runs, and run the same" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "extract tiny: Dask at tcp://127.0.0.1:" in done.stdout
    assert hooks.made() == [0, 1, 2, 3]
    hooks.clear()
    driver = Driver(cluster.client, corpus, make_logmel(tmp_path))
    assert driver.committed == {0, 1, 2}
    receipt = driver()
    assert sorted(hooks.made()) == [3, 4, 5, 6, 7]
    assert (receipt, files(receipt)) == reference(make_logmel(tmp_path))


def test_a_worker_that_cannot_be_started_again_is_left_alone_and_its_late_shard_harms_nothing(
    elsewhere, cluster, hooks, corpus, reference, tmp_path
):
    file, _, worker = elsewhere
    hooks.at(2, "stop", once=True)

    def clock():
        return time.monotonic() + 2000.0 * (hooks.folder / "stopped").exists()

    with running_scheduler(str(file)) as client:
        lone = Driver(client, corpus, make_logmel(tmp_path), clock=clock)
        with pytest.raises(
            ResourceError, match=r"none of the 1 workers at tcp://.* answered in 1000 s; start others or"
        ):
            lone()
    assert lone.committed == {0, 1}
    receipt = Driver(cluster.client, corpus, make_logmel(tmp_path))()
    os.kill(worker, signal.SIGCONT)
    late = lone.job.directory / "layer-00" / "c" / "2"
    until(lambda: list(late.glob(".0.*.partial")), "it writes its shard after all, beside the one that is committed")
    assert hooks.made().count(2) == 2
    assert Driver(cluster.client, corpus, make_logmel(tmp_path))() == receipt  # and takes away what was left
    assert (receipt, files(receipt)) == reference(make_logmel(tmp_path))


@pytest.mark.parametrize("elsewhere", [work_without_us], indirect=True)
def test_a_worker_that_lacks_decant_is_refused_before_it_gets_an_order(elsewhere):
    def there():
        with Client(scheduler_file=str(elsewhere[0]), set_as_default=False) as client:
            return client.nthreads()

    until(there, "the worker comes")
    with (
        pytest.raises(SettingsError, match=r"the worker at tcp://.* cannot import Decant; start scheduler and workers"),
        running_scheduler(str(elsewhere[0])),
    ):
        pass


@pytest.mark.slow
def test_workers_end_with_a_killed_driver_and_its_lock_is_free(corpus, reference, tmp_path, monkeypatch):
    """The console command with its own workers, which are spawned; then the same command in one process."""
    with dask_settings(tmp_path) as hooks:
        hooks.at(3, "wait")
        arguments = command(tmp_path, corpus, "r.json", "--executor", "dask", "--workers", "1", "--threads", "1")
        monkeypatch.setenv("DASK_DISTRIBUTED__WORKER__PRELOAD", str(PRELOAD))
        monkeypatch.setenv("DASK_TEMPORARY_DIRECTORY", str(tmp_path))
        with open(tmp_path / "log", "w") as log:
            driver = subprocess.Popen(
                [sys.executable, "-m", "stages", *map(str, arguments)], cwd=ROOT, stdout=log, stderr=log
            )
        try:
            store = tmp_path / "store" / "features"
            until(
                lambda: (
                    (
                        (hooks.folder / "waiting").exists()
                        and any(f.stat().st_size for f in store.glob("*/journal.jsonl"))
                    )
                    or driver.poll() is not None
                ),
                "a worker comes to shard 3 and the driver has recorded another",
            )
        finally:
            driver.kill()
            driver.wait()
        workers = hooks.pids()
        assert int((hooks.folder / "waiting").read_text()) in workers, (tmp_path / "log").read_text()
        until(lambda: not any(map(is_alive, workers)), "the workers end")
    journal = next(store.glob("*/journal.jsonl"))
    committed = journal.read_text()
    done = decant(*command(tmp_path, corpus, "r.json"))
    assert done.returncode == 0, done.stderr
    assert journal.read_text().startswith(committed)
    receipt, whole = reference(make_logmel(tmp_path))
    assert yaml.safe_load((tmp_path / "r.json").read_text()) == receipt
    assert files(receipt) == whole


def test_each_worker_has_one_gpu_and_its_share_of_the_cores(tmp_path, monkeypatch):
    """No GPU is needed to see what a worker would be told to use."""
    monkeypatch.setattr("pipeline.extraction.executors.visible_gpus", lambda: ["4", "GPU-abc"])
    with dask_settings(tmp_path), local_workers(None, "cuda", 3) as client:
        told = client.run(lambda: (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]))
        assert sorted(told.values()) == [("4", "3"), ("GPU-abc", "3")]
    with pytest.raises(SettingsError, match=r"--workers is 3 and there are 2 GPUs"), local_workers(3, "cuda", None):
        pass


def test_options_that_cannot_be_obeyed_are_named(tmp_path, monkeypatch):
    for arguments, message in [
        (
            ("local", 2, None, "tcp://here:1", None, "cpu"),
            r"--scheduler tcp://here:1 goes with --executor dask, not local",
        ),
        (("dask", 2, None, "", None, "cuda:1"), r"--device cuda:1 names one GPU, and each worker has its own"),
        (("dask", None, None, "", None, "cpu"), r"how many processes on the CPU\? set --workers"),
        (
            ("dask", None, None, "nowhere.json", None, "cpu"),
            r"nowhere.json is neither an address .* nor a scheduler file",
        ),
        (("slurm", None, None, "", SLURM, "cuda"), r"how many SLURM jobs\? set --workers"),
    ]:
        with pytest.raises(SettingsError, match=message), hire(*arguments):
            pass
    import dask

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "50ms"}),
        pytest.raises(StoreError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9"),
        running_scheduler("tcp://127.0.0.1:9"),
    ):
        pass


@pytest.mark.parametrize(
    ("executor", "extra", "module"), [("dask", "dask", "distributed"), ("slurm", "slurm", "dask_jobqueue")]
)
def test_a_missing_extra_is_named_and_one_process_needs_none(executor, extra, module, corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "slurm.yaml").write_text(yaml.safe_dump({"slurm": SLURM.model_dump(mode="json")}))
    more = ("--executor", executor, "--workers", "2", "--slurm", tmp_path / "slurm.yaml")
    done = decant(*command(tmp_path, corpus, "r.json", *more))
    assert done.returncode == 2
    assert done.stderr == (
        f"decant extract: {module} is not installed; install the extra {extra}: `uv pip install --editable '.[{extra}]'`\n"
    )
    assert decant(*command(tmp_path, corpus, "r.json")).returncode == 0


SLURM = SlurmParams(
    queue="gpu",
    account="speech",
    cpus=8,
    memory="32GB",
    gres="gpu:1",
    walltime="04:00:00",
    margin_min=5,
    stagger_min=10,
    interface=None,
    directives=("--exclude=node7",),
    prologue=("module load cuda",),
    log_directory=None,
)


def test_a_job_of_slurm_is_one_worker_with_one_gpu_that_leaves_before_the_wall_time():
    with slurm_cluster(SLURM) as cluster:
        script = cluster.job_script()
    for line in (
        "#SBATCH -p gpu",
        "#SBATCH -A speech",
        "#SBATCH -n 1",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=30G",
        "#SBATCH -t 04:00:00",
        "#SBATCH --gres=gpu:1",
        "#SBATCH --exclude=node7",
        "export OMP_NUM_THREADS=8",
        "module load cuda",
    ):
        assert line in script.splitlines(), script
    started = script.splitlines()[-1]
    assert "--nthreads 2 " in started
    # 4 h less 5 min of margin: 3 h 45 min, give or take 10 min
    assert started.endswith("--lifetime 13500s --lifetime-stagger 600s --preload pipeline.extraction.task")
    assert "--nanny --death-timeout 60" in started  # a minute after its driver has gone
    with pytest.raises(SettingsError, match=r"slurm.walltime 00:20:00 leaves a worker no time after margin_min 5"):
        slurm_cluster(SLURM.model_copy(update={"walltime": "00:20:00"}))
    assert read_params("slurm", SlurmParams, ROOT / "recipes" / "slurm" / "slurm.yaml").lifetime_sec == 13_500
    assert SLURM.model_copy(update={"walltime": "2-00:00:00", "stagger_min": 0}).lifetime_sec == 2 * 86_400 - 300
