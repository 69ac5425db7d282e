"""extract: one model and the waveforms in, its layers in a store and one receipt out."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer()


@app.command()
def main(
    name: Annotated[str, typer.Argument(help="What to call the model on screen.")],
    model: Annotated[
        list[Path],
        typer.Option(
            help="A teacher's or student's folder, or the JSON of a log-mel baseline; several for their mean."
        ),
    ],
    manifest: Annotated[Path, typer.Option(help="Which utterances, in which order.")],
    waves: Annotated[Path, typer.Option(help="Receipt of the wave store.")],
    keep: Annotated[str, typer.Option(help="Key in the params file of what to keep, e.g. teachers.hubert.keep.")],
    out: Annotated[Path, typer.Option(help="The receipt to write.")],
    of: Annotated[str, typer.Option(help="Key of a list of folders below --model, whose mean is kept.")] = "",
    params: Annotated[Path, typer.Option(help="Settings.")] = Path("params.yaml"),
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    writers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that write shards; 0: this one. Else one for a GPU, 0 for a CPU."),
    ] = None,
    executor: Annotated[
        Literal["local", "dask", "slurm"],
        typer.Option(envvar="DECANT_EXECUTOR", help="This process, processes of Dask, or jobs of SLURM."),
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(envvar="DECANT_WORKERS", min=1, help="Processes or jobs; else one for each GPU.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(envvar="DECANT_THREADS", min=1, help="Of a process here; else they share the cores.")
    ] = None,
    scheduler: Annotated[
        str, typer.Option(envvar="DECANT_SCHEDULER", help="A running one: tcp://HOST:PORT, or its scheduler file.")
    ] = "",
    slurm: Annotated[
        Path, typer.Option(envvar="DECANT_SLURM", help="What a job is: see recipes/slurm/slurm.yaml.")
    ] = Path("slurm.yaml"),
    deadline_sec: Annotated[
        float, typer.Option(envvar="DECANT_DEADLINE_SEC", min=1.0, help="For a worker to answer; then it has hung.")
    ] = 1800.0,
    attempts: Annotated[
        int, typer.Option(envvar="DECANT_ATTEMPTS", min=1, help="For a shard on workers; then the others come first.")
    ] = 3,
) -> None:
    """Run a model once over the manifest and store its layers; a killed run goes on where it stopped."""
    from cache.frames import RATE_HZ
    from cache.publish import write_json
    from pipeline.devices import choose_device
    from pipeline.extract import extract
    from pipeline.extraction.job import check_waves, plan_job
    from pipeline.extraction.settings import ExtractParams, Keep
    from pipeline.models import open_models
    from stages._corpus import open_corpus
    from stages._models import model_paths
    from stages._params import read_params
    from stages._progress import progress

    settings: ExtractParams = read_params("extract", ExtractParams, params)
    what: Keep = read_params(keep, Keep, params)
    utterances, store = open_corpus(manifest, waves)
    models = model_paths(model, of, params)
    place = choose_device(device) if executor == "local" else "cpu"  # a driver only looks at the model
    upstream = open_models(models, place)
    job = plan_job(upstream, utterances, settings, what, place)
    if job.left_out:
        print(f"extract {name}: {len(job.left_out)} recordings of more than {settings.long.max_sec:g} s are skipped")
    with ExitStack() as until_done:
        if executor != "local" or scheduler:
            from pipeline.extraction.executors import SlurmParams, hire

            jobs = read_params("slurm", SlurmParams, slurm) if executor == "slurm" else None
            client = until_done.enter_context(hire(executor, workers, threads, scheduler, jobs, device))
            print(f"extract {name}: Dask at {client.scheduler.address}, dashboard {client.dashboard_link}", flush=True)
            from pipeline.extraction.cluster import device_of, extract_on, order_of
            from pipeline.extraction.crew import Crew, Limits

            check_waves(job.manifest, store)
            crew = Crew(client, Limits(deadline_sec, attempts))
            job = plan_job(upstream, utterances, settings, what, device_of(crew, device))
        seconds = float(job.manifest.samples.sum()) / RATE_HZ
        with progress(f"extract {name}", total=seconds, unit="audio-s") as tick:
            receipt = (
                extract(upstream, utterances, store, settings, what, place, tick, writers)
                if executor == "local"
                else extract_on(crew, order_of(job, models, manifest, waves, what), job, tick)
            )
    write_json(out, receipt)
    print(
        f"extract {name}: {len(receipt['arrays'])} arrays x {receipt['rows']:,} frames x {upstream.width} {settings.codec}, "
        f"{receipt['bytes'] / 1e6:,.1f} MB in store/features/{receipt['key']}"
    )


if __name__ == "__main__":
    app()
