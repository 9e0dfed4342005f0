"""Backends: who fine-tunes (``Trainer``) and who scores (``Scorer``)."""
