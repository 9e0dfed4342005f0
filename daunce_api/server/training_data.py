"""Reading a training file as a job does, with the codes that OpenAI's validation gives."""

from __future__ import annotations

from pathlib import Path

from ..data.dataset import Dataset
from ..data.tokenizers import EncodedExample, Tokenizer, encode_example
from ..errors import DataError

MIN_EXAMPLES = 10
"""OpenAI's minimum."""

SHOWN_PROBLEMS = 10


class TrainingFileError(Exception):
    """The job fails with this code and message; ``param`` is always ``training_file``."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def read_training_file(path: Path, tokenizer: Tokenizer, max_context: int) -> list[EncodedExample]:
    """The examples of a file as token ids with the positions that carry the loss.

    Assistant turns with ``weight: 0`` carry none, all others do. Raises TrainingFileError that names the lines.
    """
    try:
        dataset = Dataset.from_jsonl(path)
    except DataError as error:
        raise TrainingFileError("invalid_training_file", _list(error.problems or [str(error)])) from None
    if len(dataset) < MIN_EXAMPLES:
        raise TrainingFileError(
            "invalid_n_examples",
            f"Training file has {len(dataset)} example(s), but must have at least {MIN_EXAMPLES} examples",
        )
    encoded, problems = [], []
    for position, example in enumerate(dataset):
        try:
            item = encode_example(example, tokenizer, loss_on="all")
        except DataError as error:
            problems.append(f"{dataset.where(position)}: {error}")
            continue
        if len(item.ids) > max_context:
            problems.append(
                f"{dataset.where(position)}: has {len(item.ids)} tokens, the model's context length is {max_context}"
            )
        encoded.append(item)
    if problems:
        raise TrainingFileError("invalid_training_file", _list(problems))
    return encoded


def _list(problems: list[str] | tuple[str, ...]) -> str:
    shown = "; ".join(p[:300] for p in problems[:SHOWN_PROBLEMS])
    more = len(problems) - SHOWN_PROBLEMS
    return f"The training file has problems: {shown}" + (f"; and {more} more" if more > 0 else "")
