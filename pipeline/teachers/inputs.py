"""How each family hears: padded waveforms in, its raw states on its own frame grid out, the same in any batch.

transformers reproduces fairseq, where an utterance's features depend on how far its batch was padded: the group norm of
base models counts the zeros, data2vec's stacked position convolutions let them grow into speech, and per-utterance
normalisation and attention see them unless told not to. Here all of these see the valid samples alone.
"""

import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from cache.errors import DataError
from cache.frames import RATE_HZ
from pipeline.padding import LengthMaskedGroupNorm, frame_mask, frames_of_samples, normalise_waves
from pipeline.perthread import PerThread
from pipeline.teachers.families import KERNELS, PAIRS, STRIDES, WHISPER
from pipeline.teachers.mel import LogMel, filter_banks
from pipeline.upstream import Outputs

# WavLM's own call, a boolean padding mask beside a float bias: PyTorch adds them as meant, and says so once a process.
warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")

Hear = Callable[[Tensor, Tensor], Outputs]


class Blocks:
    """The transformer's blocks, watched: the first one's input and each one's output.

    Versions of transformers differ in whether their `hidden_states` end with the final norm: here layer L is what block L
    gives, in pre-norm models (large, Whisper) too.
    """

    def __init__(self, blocks: Any) -> None:
        self.seen = PerThread()  # states of the forward that is on its way
        blocks[0].register_forward_pre_hook(lambda _, args: self.seen.value.append(args[0]))
        for block in blocks:
            block.register_forward_hook(
                lambda _, args, out: self.seen.value.append(out if isinstance(out, Tensor) else out[0])
            )

    def states_of(self, forward: Callable[[], Any]) -> list[Float[Tensor, "B T D"]]:
        """Run a forward and take its states; none is kept here, where it would hold a batch's memory."""
        states = self.seen.value = list[Tensor]()
        try:
            forward()
        finally:
            self.seen.value = None
        return states


class Waveform:
    """HuBERT, wav2vec 2.0, WavLM and data2vec: convolutions over the samples, which may be normalised before."""

    def __init__(self, model: Any, normalise: bool) -> None:
        self.model, self.normalise, self.blocks = model, normalise, Blocks(model.encoder.layers)
        self.samples = PerThread()  # of the batch that is on its way
        self.projected = PerThread()
        model.feature_projection.register_forward_hook(self._take_projection)
        self.norm: LengthMaskedGroupNorm | None = None
        first = model.feature_extractor.conv_layers[0]
        if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
            self.norm = LengthMaskedGroupNorm(first.layer_norm.num_channels, first.layer_norm.eps)
            self.norm.load_state_dict(first.layer_norm.state_dict())
            first.layer_norm = self.norm
        # data2vec has several convolutions for positions: after the first, bias and speech have filled the padding
        for layer in getattr(model.encoder.pos_conv_embed, "layers", ()):
            layer.register_forward_hook(self._silence_padding)

    def __call__(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> Outputs:
        """Projected features, input of the first block, and output of each."""
        valid = frame_mask(samples, waves.shape[1])
        waves = normalise_waves(waves, samples) if self.normalise else waves.masked_fill(~valid, 0.0)
        self.samples.value = samples
        if self.norm is not None:
            self.norm.valid = (samples - KERNELS[0]).div(STRIDES[0], rounding_mode="floor") + 1
        states = self.blocks.states_of(lambda: self.model(waves, attention_mask=valid.long()))
        projection, self.projected.value = self.projected.value, None
        frames = frame_mask(frames_of_samples(samples), projection.shape[1])
        return Outputs(projection.masked_fill(~frames[..., None], 0.0), states)

    def _take_projection(self, _: nn.Module, args: Any, out: Any) -> None:
        self.projected.value = out if isinstance(out, Tensor) else out[0]

    def _silence_padding(self, _: nn.Module, args: Any, out: Float[Tensor, "B D T"]) -> Float[Tensor, "B D T"]:
        samples = self.samples.value
        return out.masked_fill(~frame_mask(frames_of_samples(samples), out.shape[2])[:, None], 0.0)


class FilterBanks:
    """w2v-BERT 2.0: Kaldi's filter banks in pairs, normalised bin by bin over the utterance."""

    def __init__(self, model: Any, normalise: bool) -> None:
        self.model, self.blocks = model, Blocks(model.encoder.layers)
        # two of its three kinds of positions are a table that a forward leaves in the model for the next one
        keeps = model.config.position_embeddings_type in ("rotary", "relative")
        self.alone: AbstractContextManager[Any] = threading.Lock() if keeps else nullcontext()

    def __call__(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> Outputs:
        """Input of the first block, and output of each.

        Raises:
            DataError: an utterance too short for a frame.
        """
        if (shortest := int(samples.min())) < PAIRS.field:
            raise DataError(
                f"an utterance has {shortest} samples and w2v-BERT's first frame needs {PAIRS.field}; leave out what is "
                "shorter than 0.035 s (prepare.min_sec)"
            )
        banks = filter_banks(waves, samples, 80)
        mask = frame_mask(PAIRS.num_frames(samples), banks.shape[1])
        with self.alone:
            return Outputs(None, self.blocks.states_of(lambda: self.model(banks, attention_mask=mask.long())))


class Window:
    """Whisper's encoder: a log-mel spectrum of the utterance and silence, always as long as the model's positions.

    It attends to the silence too: its layers are those of the utterance in its window, whatever the batch.
    """

    def __init__(self, model: Any, normalise: bool) -> None:
        self.model, self.blocks = model, Blocks(model.layers)
        self.longest = model.config.max_source_positions * WHISPER.hop  # samples: 30 s
        self.log_mel = LogMel(model.config.num_mel_bins, self.longest)

    def __call__(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> Outputs:
        """Input of the first block, and output of each before the final norm.

        Raises:
            DataError: an utterance longer than the window.
        """
        if (most := int(samples.max())) > self.longest:
            raise DataError(
                f"an utterance has {most / RATE_HZ:.1f} s and Whisper hears {self.longest / RATE_HZ:g} s; leave out what is "
                f"longer (prepare.max_sec: {self.longest / RATE_HZ:g})"
            )
        spectrum = self.log_mel.to(waves.device)(waves, samples)
        frames = int(WHISPER.num_frames(samples).max())
        return Outputs(None, [state[:, :frames] for state in self.blocks.states_of(lambda: self.model(spectrum))])


HEARS: dict[str, tuple[Callable[[Any, bool], Hear], str]] = {  # and what `describe` calls it
    "hubert": (Waveform, "waveform"),
    "wav2vec2": (Waveform, "waveform"),
    "wavlm": (Waveform, "waveform"),
    "data2vec-audio": (Waveform, "waveform"),
    "wav2vec2-bert": (FilterBanks, "pairs of 80 log filter banks, each bin normalised over the utterance"),
    "whisper": (Window, "log-mel spectrum of a window, silence after the utterance"),
}
