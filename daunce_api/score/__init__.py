"""Models to log-probabilities: what is missing, asked for in batches, kept as it arrives, checked."""
