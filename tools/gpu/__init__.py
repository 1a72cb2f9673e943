"""The proof to run wherever there is an NVIDIA GPU. Run from a checkout; not installed."""
