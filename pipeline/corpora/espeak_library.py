"""A voice, its settings and a text in; the waveform of espeak-ng at 22 050 Hz and its phones with their times out.

espeak-ng keeps state from one utterance to the next that no call resets: the phase of its flutter, its echo, its noise.
The same words sound different the second time, also after Terminate and Initialize. So the library is loaded for every
utterance and unloaded after it (a quarter of a millisecond), and an utterance is a pure function of its arguments.
"""

import _ctypes
import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int16

from cache.errors import DataError, SettingsError

ESPEAK_HZ = 22_050
SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: call back in this thread, play nothing
PHONEME_EVENTS, PHONEME_IPA, DONT_EXIT = 0x0001, 0x0002, 0x8000
RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4  # espeak_PARAMETER
LIST_TERMINATED, PHONEME = 0, 7  # espeak_EVENT_TYPE
UTF8 = 1  # espeakCHARS_UTF8
BY_CHARACTER = 1  # espeak_POSITION_TYPE
MAX_DATA_PATH = 159  # espeak-ng copies the path of its data into 160 bytes
SILENCE = "sil"
PLAIN_IPA = str.maketrans({"ˈ": "", "ˌ": "", ":": "ː"})  # without stress; some accents type a colon for length


class Speech(NamedTuple):
    """What espeak-ng said."""

    wave: Int16[np.ndarray, " S"]
    phones: tuple[tuple[str, int], ...]
    """(IPA symbol without stress, first sample), in time order; `sil` for its pauses."""


class Identity(ctypes.Union):
    """The `id` of an event; of a phoneme event its symbol, up to eight bytes without an end mark."""

    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", Identity),
    )


SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))


def espeak_paths() -> tuple[Path, Path]:
    """The shared library and the folder of voices, from the package espeakng-loader.

    Raises:
        SettingsError: the package is not installed.
        DataError: its path is too long for espeak-ng.
    """
    try:
        import espeakng_loader  # the only use; optional
    except ImportError:
        raise SettingsError(
            'a source of kind espeak needs espeak-ng: `uv pip install --editable ".[embedded]"`, or choose another kind of source'
        ) from None
    library, data = Path(espeakng_loader.get_library_path()), Path(espeakng_loader.get_data_path())
    if len(os.fsencode(data)) > MAX_DATA_PATH:
        raise DataError(
            f"{data} is longer than the {MAX_DATA_PATH} bytes espeak-ng can take; install the environment in a shorter path"
        )
    return library, data


def known_variants() -> list[str]:
    """The voice variants espeak-ng has: m1, f2, croak ..."""
    return sorted(file.name for file in (espeak_paths()[1] / "voices" / "!v").iterdir())


def is_loaded(library: Path) -> bool:
    """Whether this process holds a shared library."""
    try:
        found = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False
    _ctypes.dlclose(found._handle)  # asking counted as a use
    return True


@contextmanager
def fresh_espeak() -> Iterator[ctypes.CDLL]:
    """A newly loaded, initialised espeak-ng.

    Raises:
        DataError: it does not start, or something else in this process holds the library, and with it its state.
    """
    library, data = espeak_paths()
    if is_loaded(library):
        raise DataError(
            f"{library.name} is held by something else in this process, so speech would depend on what was said before; "
            "run `decant prepare` in a process of its own"
        )
    espeak = ctypes.CDLL(str(library))
    try:
        if espeak.espeak_Initialize(SYNCHRONOUS, 0, os.fsencode(data), PHONEME_EVENTS | PHONEME_IPA | DONT_EXIT) <= 0:
            raise DataError(f'espeak-ng does not start with its data in {data}; reinstall "decant[embedded]"')
        espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))  # else the time
        yield espeak
        espeak.espeak_Terminate()
    finally:
        _ctypes.dlclose(espeak._handle)


def speak(voice: str, text: str, rate_wpm: int, pitch: int, pitch_range: int) -> Speech:
    """Say a text.

    Args:
        voice: an espeak-ng language and a variant, such as `en-us+m3`.
        text: words; espeak-ng's own rules pronounce them.
        rate_wpm: words per minute, 80 to 450.
        pitch: 0 to 99.
        pitch_range: 0 (monotone) to 99.

    Raises:
        SettingsError: no such voice.
        DataError: espeak-ng fails, or gives no sound.
    """
    waves: list[np.ndarray] = []
    phones: list[tuple[str, int]] = []

    def receive(samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: "ctypes._Pointer[Event]") -> int:
        if samples and count > 0:
            waves.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != LIST_TERMINATED:
            if events[index].type == PHONEME:
                symbol = bytes(events[index].id.string).decode("utf-8", errors="ignore").translate(PLAIN_IPA)
                phones.append((symbol or SILENCE, events[index].sample))
            index += 1
        return 0

    callback = SynthCallback(receive)
    encoded = text.encode()
    with fresh_espeak() as espeak:
        espeak.espeak_SetSynthCallback(callback)
        if espeak.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SettingsError(
                f"espeak-ng has no voice {voice!r}; an accent is a language such as en-us or en-gb-scotland"
            )
        for parameter, value in ((RATE, rate_wpm), (VOLUME, 100), (PITCH, pitch), (RANGE, pitch_range)):
            espeak.espeak_SetParameter(parameter, value, 0)
        status = espeak.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, BY_CHARACTER, 0, UTF8, None, None)
        espeak.espeak_Synchronize()
    if status != 0 or not waves:
        raise DataError(f"espeak-ng gives no sound for {text!r} in the voice {voice} (status {status})")
    return Speech(np.concatenate(waves), tuple(phones))
