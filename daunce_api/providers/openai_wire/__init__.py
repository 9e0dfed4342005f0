"""OpenAI's wire format on the official SDK: trainer, scorers, and what they share (client, answer contract, probe)."""
