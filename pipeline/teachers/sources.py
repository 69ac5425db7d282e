"""Where teachers come from: a tagged setting in, a pinned Hugging Face folder out.

A teacher is a folder on this machine, a repository of the hub at one commit, a checkpoint in fairseq's layout, or one
pretrained here. All end as the same folder (`pipeline.teachers.pinned`), so nothing downstream knows which it was.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError  # HTTPError of its client
from pydantic import BaseModel, Field, field_validator
from torch import Tensor

from cache.errors import DataError, SettingsError, StoreError
from cache.manifest import Manifest
from cache.publish import digest_file, publish_dir, read_json
from cache.ragged import Store
from pipeline.distortion.distort import folders_of
from pipeline.teachers.fairseq import Fairseq, read_fairseq
from pipeline.teachers.families import FAMILIES
from pipeline.teachers.grid import STORE, Align
from pipeline.teachers.pinned import CONFIG, PREPROCESSOR, WEIGHTS, Pinned, pin, read_safetensors
from pipeline.teachers.pretrain.batches import Recordings
from pipeline.teachers.pretrain.models import open_start
from pipeline.teachers.pretrain.run import Job, pretrain, training_folder
from pipeline.teachers.pretrain.settings import PretrainParams, without_paths
from pipeline.teachers.unpickle import read_pickle

INDEX, PICKLE = "model.safetensors.index.json", "pytorch_model.bin"
SPECTRAL = [name for name, family in FAMILIES.items() if family.grid != STORE]  # no waveform reaches these models
HEARD = ("sampling_rate", "feature_size", "num_mel_bins", "stride", "hop_length", "n_fft", "chunk_length")
SAFE_FILES = [CONFIG, PREPROCESSOR, WEIGHTS, INDEX, "model-*-of-*.safetensors"]


class Folder(BaseModel, frozen=True, extra="forbid"):
    """A Hugging Face folder: config.json and model.safetensors (or pytorch_model.bin, read without running it)."""

    kind: Literal["folder"]
    path: str
    """The folder."""
    align: Align | None = None
    """How the frames of a model that hears spectra are brought to the store's: nearest or linear. None where they lie there."""


class Hub(BaseModel, frozen=True, extra="forbid"):
    """A repository of the Hugging Face hub at one commit; code in it is never run."""

    kind: Literal["hub"]
    repo: str
    """owner/name."""
    revision: str
    """The commit's full 40-character hash."""
    align: Align | None = None
    """As of a folder."""

    @field_validator("revision")
    @classmethod
    def _full_commit(cls, value: str) -> str:
        if len(value) != 40 or not set(value) <= set("0123456789abcdef"):
            raise ValueError(
                f"{value!r} is not a full commit hash: a branch or tag can move, and the cached targets would then belong to "
                "weights nobody can get again; copy the 40 characters from the repository's list of commits"
            )
        return value


Source = Annotated[Folder | Hub | Fairseq | PretrainParams, Field(discriminator="kind")]


class TeacherParams(BaseModel, frozen=True, extra="forbid"):
    """One teacher."""

    source: Source
    """Where it comes from."""
    normalise: bool | None
    """Bring each waveform to zero mean and unit variance? None: as preprocessor_config.json says (do_normalize). fairseq
    trained base models without and large ones with it."""


class Corpus(NamedTuple):
    """What pretraining reads."""

    manifest: Manifest
    waves: Store


def materialise(
    params: TeacherParams,
    out: Path,
    corpus: Corpus | None = None,
    on_progress: Callable[..., None] = lambda seconds, note="", found=False: None,
    starts_from: Path | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> Pinned:
    """Fetch or make the teacher and publish its pinned folder at `out`.

    Args:
        params: the settings.
        out: the folder to publish.
        corpus: only a pretrained teacher needs it.
        on_progress: called with seconds of audio and a note while pretraining.
        starts_from: the folder of the teacher that a pretrained one goes on from; None, or recipes/scratch.json: new weights.
        device: where to pretrain.
        say: told what a person should know of a pretraining.

    Raises:
        SettingsError: a source that cannot be a teacher, or that lacks something the settings must say.
        Interrupted: a signal came while pretraining; its state is saved.
        DataError: the source is not there.
        StoreError: its weights are damaged, unsafe, or not what its configuration says.
    """
    source = params.source
    if isinstance(source, PretrainParams):
        if corpus is None:
            raise SettingsError("a teacher of kind pretrain needs --manifest and --waves")
        return _pretrain(source, params, out, corpus, on_progress, starts_from, device, say)
    if open_start(starts_from) is not None:
        raise SettingsError(
            f"starts_from is {starts_from} and the source is of kind {source.kind}, which is a whole teacher; set it to "
            "recipes/scratch.json, or continue it in a second teacher of kind pretrain"
        )
    with publish_dir(out) as work:
        if isinstance(source, Folder):
            record = {"kind": "folder", "name": Path(source.path).resolve().name}
            return _pin_folder(Path(source.path), work, params, record, source.align)
        if isinstance(source, Hub):
            return _pin_folder(fetch(source), work, params, source.model_dump(exclude={"align"}), source.align)
        return _pin_checkpoint(source, work, params)


def _pretrain(
    source: PretrainParams,
    params: TeacherParams,
    out: Path,
    corpus: Corpus,
    on_progress: Callable[..., None],
    starts_from: Path | None,
    device: str,
    say: Callable[[str], None],
) -> Pinned:
    """Train, pin and publish; the training's state is kept until then."""
    start = open_start(starts_from)
    # a model hears in training what it will hear in extraction
    heard = start.pinned.normalise if start is not None else False
    normalise = heard if params.normalise is None else params.normalise
    job = Job(source, Recordings(corpus.manifest, corpus.waves), start, normalise, device)
    record = without_paths(source.model_dump(mode="json"))
    record["audio"] = corpus.manifest.select(split="train").audio_digest
    if folders := folders_of(source):
        record["folders"] = folders
    if start is not None:
        record["starts_from"] = {"family": start.pinned.family, "digest": start.pinned.digest}
    with training_folder(out) as run, TemporaryDirectory() as made:
        pretrain(job, run, Path(made), on_progress, say)
        with publish_dir(out) as work:
            return _pin_folder(Path(made), work, params, record)


def fetch(source: Hub) -> Path:
    """The folder of one commit in the hub's cache: what is there whole is used without asking the network.

    `AutoModel.from_pretrained` leaves configuration and weights there and no preprocessor: only the network knows whether
    the commit has one, and where it cannot be reached, what is there has to do.

    Raises:
        DataError: neither in the cache nor to be had; with HF_HUB_OFFLINE=1 at once.
    """
    cached = _cached(source)
    if cached is not None and (cached / PREPROCESSOR).exists():
        return cached
    try:
        return _download(source)
    except DataError:
        if cached is not None:
            return cached
        raise


def _cached(source: Hub) -> Path | None:
    try:
        folder = _snapshot(source, SAFE_FILES, local=True)
    except LocalEntryNotFoundError:
        return None  # the commit is not in the cache, or known to be there in part
    usable = (folder / CONFIG).exists() and any((folder / name).exists() for name in (WEIGHTS, INDEX, PICKLE))
    return folder if usable else None


def _download(source: Hub) -> Path:
    where = f"{source.repo} at {source.revision}"
    try:
        found = _snapshot(source, SAFE_FILES, local=False)
        if (found / WEIGHTS).exists() or (found / INDEX).exists():
            return found
        return _snapshot(source, [*SAFE_FILES, PICKLE], local=False)
    except LocalEntryNotFoundError:
        raise DataError(
            f"{where} is not in the hub's cache (HF_HUB_CACHE) and the hub cannot be reached; run once with a network, or "
            "copy the folder here and use {kind: folder}"
        ) from None
    except HTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{where} could not be fetched: {reason}; check repo, revision and your access to it"
        ) from error


def _snapshot(source: Hub, files: list[str], local: bool) -> Path:
    try:
        return Path(
            snapshot_download(source.repo, revision=source.revision, allow_patterns=files, local_files_only=local)
        )
    except HFValidationError as error:
        raise SettingsError(f"{source.repo!r} is not a repository's name (owner/name): {error}") from error


def _pin_folder(
    folder: Path, work: Path, params: TeacherParams, record: dict[str, Any], align: Align | None = None
) -> Pinned:
    where = f"{record['repo']} at {record['revision'][:12]}" if record["kind"] == "hub" else str(folder)
    if not (folder / CONFIG).exists():
        raise DataError(f"{where} has no {CONFIG}; a teacher is a folder that transformers' save_pretrained wrote")
    config = read_json(folder / CONFIG)
    published = _published_normalise(folder, config, where) if params.normalise is None else params.normalise
    pinned = pin(work, config, read_weights(folder, where), published, record, where, align)
    _check_preprocessor(folder, read_json(work / PREPROCESSOR), where)
    return pinned


def _check_preprocessor(folder: Path, ours: dict[str, Any], where: str) -> None:
    """Refuse a model that was trained to hear something else than its family's spectra or waveforms at 16 kHz."""
    theirs = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).exists() else {}
    for key in HEARD:
        if key in ours and (found := theirs.get(key, ours[key])) != ours[key]:
            raise SettingsError(
                f"{where}: {key} is {found!r} in {PREPROCESSOR} and only {ours[key]!r} can be a teacher"
            )


def _pin_checkpoint(source: Fairseq, work: Path, params: TeacherParams) -> Pinned:
    config, weights, published = read_fairseq(source)
    normalise = params.normalise if params.normalise is not None else published
    if normalise is None:
        raise SettingsError(
            f"{source.path} does not say whether waveforms are normalised; set the teacher's normalise: false (base models) or "
            "true (large ones)"
        )
    path = Path(source.path)
    record = {"kind": "fairseq", "name": path.name, "sha256": digest_file(path)}
    return pin(work, config, weights, normalise, record, source.path)


def _published_normalise(folder: Path, config: dict[str, Any], where: str) -> bool:
    described = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).exists() else {}
    if config.get("model_type") in SPECTRAL:
        return False
    if not isinstance(normalise := described.get("do_normalize"), bool):
        raise SettingsError(
            f"{where} has no {PREPROCESSOR} here that says whether waveforms are normalised; set the teacher's "
            "normalise: false (base models of fairseq) or true (large ones)"
        )
    return normalise


def read_weights(folder: Path, where: str) -> dict[str, Tensor]:
    """All tensors of a folder, from safetensors (one file or several) or from a pickle that is read without running it.

    Raises:
        StoreError: damaged, or a pickle that holds more than tensors.
        DataError: no weights.
    """
    if (folder / WEIGHTS).exists():
        return read_safetensors(folder / WEIGHTS)
    if (folder / INDEX).exists():
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
        if strange := [name for name in names if Path(name).name != name or not (folder / name).exists()]:
            raise DataError(
                f"{where}: {INDEX} names {', '.join(strange)}, which the folder does not have; fetch it again"
            )
        return {key: tensor for name in names for key, tensor in read_safetensors(folder / name).items()}
    if not (folder / PICKLE).exists():
        raise DataError(f"{where} has neither {WEIGHTS} nor {PICKLE}")
    weights = read_pickle(folder / PICKLE, f"{where}: {PICKLE}")
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise StoreError(f"{where}: {PICKLE} is not a plain state dict; ask its authors for safetensors")
    return dict(weights)
