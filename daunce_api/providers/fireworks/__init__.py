"""Fireworks: fine-tuning jobs through its SDK, log-probabilities through completions with echo on one deployment."""
