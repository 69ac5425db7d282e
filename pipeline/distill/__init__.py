"""Distillation: stored targets and waveforms in, a trained student out; no teacher in the process."""
