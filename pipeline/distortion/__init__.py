"""Distortion: clean waveforms in, the same in noise, rooms and other voices out; what pretraining and distillation share."""
