"""One encoder and two heads, trained end to end on keyword spotting and speaker verification together."""
