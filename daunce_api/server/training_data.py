"""Reading a training file as a job does, with the codes that OpenAI's validation gives."""

from __future__ import annotations

from pathlib import Path

from ..data.dataset import Dataset
from ..data.tokenizers import EncodedExample, Tokenizer, encode_training
from ..errors import DataError

MIN_EXAMPLES = 10
"""OpenAI's minimum."""

SHOWN_PROBLEMS = 10


class JobError(Exception):
    """A job failed: message, code and parameter as its ``error`` has them."""

    def __init__(self, message: str, code: str = "server_error", param: str | None = None) -> None:
        super().__init__(message, code, param)
        self.message, self.code, self.param = message[:2000], code, param


def read_training_file(path: Path, tokenizer: Tokenizer, max_context: int) -> list[EncodedExample]:
    """The examples of a file as token ids with the positions that carry the loss.

    Assistant turns with ``weight: 0`` carry none, all others do. Raises JobError that names the lines.
    """
    try:
        dataset = Dataset.from_jsonl(path)
        if len(dataset) < MIN_EXAMPLES:
            message = f"Training file has {len(dataset)} example(s), but must have at least {MIN_EXAMPLES} examples"
            raise JobError(message, "invalid_n_examples", "training_file")
        return encode_training(dataset, tokenizer, max_context)
    except DataError as error:
        problems = error.problems or [str(error)]
        shown = "; ".join(p[:300] for p in problems[:SHOWN_PROBLEMS])
        more = len(problems) - SHOWN_PROBLEMS
        rest = f"; and {more} more" if more > 0 else ""
        message = f"The training file has problems: {shown}{rest}"
        raise JobError(message, "invalid_training_file", "training_file") from None
