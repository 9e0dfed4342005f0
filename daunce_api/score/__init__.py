"""Models to log-probabilities: what is missing, requested in batches, stored as it arrives, checked."""
