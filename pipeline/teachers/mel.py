"""Mel spectra that models hear: padded waveforms in, Whisper's log-mel or w2v-BERT's filter banks out, the same in any batch.

Both are computed as the feature extractors of transformers do, which run on the CPU one utterance at a time; here on the
model's device. Neither sees the padding: Whisper's window is silence after the utterance whatever the batch, and the filter
banks are computed and normalised row by row.
"""

import torch
import torchaudio
import transformers
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cache.frames import RATE_HZ
from pipeline.padding import INT16_SCALE, frame_mask

WINDOW, SHIFT = 400, 160  # samples: 25 ms every 10 ms, for both


class LogMel(nn.Module):
    """Whisper's input: log10 mel energies of the utterance and the silence after it, at most 80 dB below the loudest."""

    filters: Tensor
    hann: Tensor

    def __init__(self, bins: int, samples: int) -> None:
        super().__init__()
        self.samples = samples
        extractor = transformers.WhisperFeatureExtractor(feature_size=bins)
        self.register_buffer(
            "filters", torch.from_numpy(extractor.mel_filters).float().T.contiguous(), persistent=False
        )
        self.register_buffer("hann", torch.hann_window(WINDOW), persistent=False)

    def forward(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> Float[Tensor, "B M T"]:
        """(B, bins, window / 160); no utterance may be longer than the window."""
        waves = waves.masked_fill(~frame_mask(samples, waves.shape[1]), 0.0)[:, : self.samples]
        waves = nn.functional.pad(waves, (0, self.samples - waves.shape[1]))
        spectrum = torch.stft(waves, WINDOW, SHIFT, window=self.hann, return_complex=True)[..., :-1]
        mel = self.filters @ spectrum.abs().square()
        log = mel.clamp(min=1e-10).log10()
        return (torch.maximum(log, log.amax((1, 2), keepdim=True) - 8.0) + 4.0) / 4.0


def filter_banks(waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"], bins: int) -> Float[Tensor, "B T C"]:
    """w2v-BERT's input: Kaldi's log filter banks, each bin to zero mean and unit variance over the utterance, in pairs.

    Frame t of the (B, T, 2 bins) output is banks 2t and 2t + 1; an odd bank at the end counts for the statistics alone.
    """
    rows = []
    for wave, count in zip(waves, samples.tolist(), strict=True):
        # double: quiet bins beside loud ones lose their digits in single precision, and the logarithm shows it
        banks = torchaudio.compliance.kaldi.fbank(
            wave[None, :count].double() / INT16_SCALE, num_mel_bins=bins, sample_frequency=RATE_HZ, dither=0.0
        )
        banks = (banks - banks.mean(0)) / torch.sqrt(banks.var(0, correction=1) + 1e-7)
        rows.append(banks[: len(banks) // 2 * 2].reshape(-1, 2 * bins).float())
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)
