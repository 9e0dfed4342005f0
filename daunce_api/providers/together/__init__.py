"""Together: fine-tuning jobs through its SDK, log-probabilities through its completions with echo."""
