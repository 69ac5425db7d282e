"""The settings of a source in; its folder, fetched where it was missing, out.

Only corpora that are openly licensed and whose recipe in torchaudio checks the archive's SHA-256: LibriSpeech (CC BY 4.0)
and Speech Commands (CC BY 4.0). They are unpacked beside their place and renamed into it: whole or absent.
"""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cache.errors import DataError, ResourceError, SettingsError
from pipeline.corpora.folder import expand_root
from pipeline.corpora.librispeech import LibriSpeechParams
from pipeline.corpora.sources import Source
from pipeline.corpora.speech_commands import SpeechCommandsParams

WHERE = {
    "iemocap": "ask its authors for it (USC SAIL), it has a licence of its own",
    "ravdess": "get Audio_Speech_Actors_01-24.zip from its page on Zenodo (CC BY-NC-SA 4.0)",
    "speechocean762": "get OpenSLR 101 (CC BY 4.0)",
    "voxceleb1": "ask its authors for it (VGG Oxford)",
}


def download(corpus: str, source: Source) -> list[Path]:
    """Fetch what is missing of a source; the folders that were fetched.

    Raises:
        DataError: no recipe fetches this kind of corpus and it is missing, or the network or an archive fails.
        SettingsError: a folder that the archive would not unpack to.
    """
    root = expand_root(corpus, source.root) if hasattr(source, "root") else None
    match source:
        case LibriSpeechParams():
            from torchaudio.datasets import LIBRISPEECH

            assert root is not None
            missing = [root / subset for subset in source.subsets if not (root / subset).is_dir()]
            if missing:
                check_name(corpus, root, ("LibriSpeech",))
            for place in missing:
                fetch(place, f"LibriSpeech/{place.name}", partial(LIBRISPEECH, url=place.name, download=True))
            return missing
        case SpeechCommandsParams():
            from torchaudio.datasets import SPEECHCOMMANDS

            assert root is not None
            if root.is_dir():
                return []
            check_name(corpus, root, ("speech_commands_v0.01", "speech_commands_v0.02"))
            fetch(root, f"SpeechCommands/{root.name}", partial(SPEECHCOMMANDS, url=root.name, download=True))
            return [root]
        case _:
            if root is not None and not root.is_dir():
                hint = WHERE.get(source.kind, "bring it there")
                raise DataError(f"prepare.sources.{corpus}: no recipe fetches {source.kind} to {root}; {hint}")
            return []


def check_name(corpus: str, root: Path, names: tuple[str, ...]) -> None:
    """Refuse a folder that the archive does not unpack to."""
    if root.name not in names:
        raise SettingsError(
            f"prepare.sources.{corpus}.root ends in {root.name!r}; to fetch it, end it in {' or '.join(names)}"
        )


def fetch(place: Path, unpacked: str, recipe: Callable[[Path], object]) -> None:
    """Run a recipe in a folder beside `place`, and move what it unpacked there.

    Raises:
        DataError: the network, the archive or its checksum fails.
        ResourceError: the disk refuses.
    """
    beside = place.parent / f".{place.name}.partial"
    try:
        shutil.rmtree(beside, ignore_errors=True)  # an archive of an earlier run may be cut short
        beside.mkdir(parents=True)
        recipe(beside)
        os.replace(beside / unpacked, place)
        shutil.rmtree(beside)
    except FileNotFoundError as error:
        raise DataError(f"{place.name}: its archive has no {unpacked}; report it, and unpack it by hand") from error
    except ConnectionError as error:
        raise DataError(f"{place.name} cannot be fetched: {error}; bring the corpus to {place} by hand") from error
    except OSError as error:
        if error.errno is not None:
            raise ResourceError(f"{place.name} cannot be written to {beside}: {error.strerror}") from error
        raise DataError(  # urllib's URLError: no network, no such host, refused
            f"{place.name} cannot be fetched: {getattr(error, 'reason', error)}; connect, or bring the corpus to {place}"
        ) from error
    except RuntimeError as error:  # torch.hub: the hash of the archive is another
        raise DataError(f"{place.name} cannot be fetched: {error}; run the command again") from error
