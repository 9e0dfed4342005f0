"""Tinker: a training loop of the run's own on remote GPUs, and log-probabilities of any completion."""
