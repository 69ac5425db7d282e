"""The settings of a source in, its recordings out: the one place that knows every kind of corpus."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from cache.manifest import Manifest
from pipeline.corpora.drawn import draw_trials
from pipeline.corpora.espeak import EspeakParams, count_lines, espeak_items
from pipeline.corpora.folder import corpus_root, count_recordings
from pipeline.corpora.iemocap import SESSIONS, IemocapParams, iemocap_items
from pipeline.corpora.item import Item
from pipeline.corpora.kaldi import KaldiParams, kaldi_items
from pipeline.corpora.lhotse_manifests import LhotseParams, lhotse_items
from pipeline.corpora.librispeech import LibriSpeechParams, librispeech_items
from pipeline.corpora.ravdess import RavdessParams, actor_folders, ravdess_items
from pipeline.corpora.speech_commands import SpeechCommandsParams, speech_commands_items, word_folders
from pipeline.corpora.speechocean762 import Speechocean762Params, speechocean762_items
from pipeline.corpora.table import TableParams, table_items
from pipeline.corpora.trials import Trial
from pipeline.corpora.voxceleb import VoxCeleb1Params, speaker_folders, video_of, voxceleb1_items, voxceleb1_trials

Source = Annotated[
    EspeakParams
    | IemocapParams
    | KaldiParams
    | LhotseParams
    | LibriSpeechParams
    | RavdessParams
    | SpeechCommandsParams
    | Speechocean762Params
    | TableParams
    | VoxCeleb1Params,
    Field(discriminator="kind"),
]


def items_of(corpus: str, source: Source, workers: int) -> Iterator[Item]:
    """The recordings of a source, in its order; each is decoded or made only when it is reached."""
    match source:
        case EspeakParams():
            return espeak_items(corpus, source, workers)
        case LibriSpeechParams():
            return librispeech_items(corpus, source)
        case IemocapParams():
            return iemocap_items(corpus, source)
        case RavdessParams():
            return ravdess_items(corpus, source)
        case KaldiParams():
            return kaldi_items(corpus, source)
        case Speechocean762Params():
            return speechocean762_items(corpus, source)
        case LhotseParams():
            return lhotse_items(corpus, source)
        case TableParams():
            return table_items(corpus, source)
        case VoxCeleb1Params():
            return voxceleb1_items(corpus, source)
        case SpeechCommandsParams():
            return speech_commands_items(corpus, source)


def count_of(corpus: str, source: Source) -> int:
    """About how many recordings there will be, for a progress bar."""
    match source:
        case EspeakParams():
            return count_lines(source)
        case LibriSpeechParams():
            root = corpus_root(corpus, source.root)
            return sum(count_recordings(root / subset) for subset in source.subsets)
        case IemocapParams():
            return sum(
                count_recordings(corpus_root(corpus, source.root) / session / "sentences") for session in SESSIONS
            )
        case RavdessParams():
            return sum(map(count_recordings, actor_folders(corpus_root(corpus, source.root))))
        case KaldiParams() | LhotseParams() | Speechocean762Params() | TableParams():
            return sum(1 for _ in items_of(corpus, source, 1))  # lists alone: nothing is decoded
        case VoxCeleb1Params():
            return sum(map(count_recordings, speaker_folders(corpus, corpus_root(corpus, source.root), source)))
        case SpeechCommandsParams():
            return sum(map(count_recordings, word_folders(corpus, source)))


def trials_of(corpus: str, source: Source) -> Iterator[Trial]:
    """The trials of speaker verification that come with a source; of most, none."""
    match source:
        case VoxCeleb1Params():
            return voxceleb1_trials(corpus, source)
        case _:
            return iter(())


def drawn_trials_of(corpus: str, source: Source, manifest: Manifest) -> list[Trial]:
    """The trials that its settings have drawn from the utterances of a source.

    Raises:
        DataError: the utterances do not give so many.
    """
    match source:
        case IemocapParams() | RavdessParams():  # actors, who change their voices
            return []
        case VoxCeleb1Params():
            return draw_trials(corpus, manifest, source.sv, scene=video_of) if source.sv is not None else []
        case _:
            return draw_trials(corpus, manifest, source.sv) if source.sv is not None else []
