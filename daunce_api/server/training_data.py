"""Reading a training file as a job does, with the codes that OpenAI's validation gives."""

from __future__ import annotations

from pathlib import Path

from ..data.dataset import Dataset
from ..data.tokenizers import EncodedExample, Tokenizer, encode_training
from ..errors import DataError

MIN_EXAMPLES = 10
"""OpenAI's minimum."""

SHOWN_PROBLEMS = 10


class TrainingFileError(Exception):
    """The job fails with this message and code; the parameter is always ``training_file``."""

    def __init__(self, message: str, code: str = "invalid_training_file") -> None:
        super().__init__(message, code)
        self.message, self.code = message, code


def read_training_file(path: Path, tokenizer: Tokenizer, max_context: int) -> list[EncodedExample]:
    """The examples of a file as token ids with the positions that carry the loss.

    Assistant turns with ``weight: 0`` carry none, all others do. Raises TrainingFileError that names the lines.
    """
    try:
        dataset = Dataset.from_jsonl(path)
        if len(dataset) < MIN_EXAMPLES:
            raise TrainingFileError(
                f"Training file has {len(dataset)} example(s), but must have at least {MIN_EXAMPLES} examples",
                "invalid_n_examples",
            )
        return encode_training(dataset, tokenizer, max_context)
    except DataError as error:
        problems = error.problems or [str(error)]
        shown = "; ".join(p[:300] for p in problems[:SHOWN_PROBLEMS])
        more = len(problems) - SHOWN_PROBLEMS
        rest = f"; and {more} more" if more > 0 else ""
        raise TrainingFileError(f"The training file has problems: {shown}{rest}") from None
