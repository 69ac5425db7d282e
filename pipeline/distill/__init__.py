"""The second half: targets and waveforms from the disk in, a trained student out."""
