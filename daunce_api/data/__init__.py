"""The examples: read from files, drawn into subsets, encoded as token ids."""
