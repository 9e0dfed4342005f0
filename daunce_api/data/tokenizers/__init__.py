"""Tokenizers, and the one place that decides which tokens of an example carry its loss.

The ids and the boundary are fixed once per example and used for training, for every member's scoring and for
counting. A prompt and its completion are encoded together, because encoding them apart and joining the ids gives
other tokens (``"def f" + "oo"``).

Content that spells a special token (``<|end|>`` in a user's message) is encoded as the ordinary characters it is
written with: no chat message can end its own turn or open another one. A prompt/completion record is the user's own
rendering of a text and is encoded as written, special tokens included.
"""

from ..encoded import (
    Encode,
    EncodedExample,
    SpellingTokenizer,
    Tokenizer,
    encode_dataset,
    encode_example,
    encode_training,
)
from .folder import LocalTokenizer
from .openai_models import TiktokenTokenizer, tiktoken_encoding_name

__all__ = [
    "Encode",
    "EncodedExample",
    "LocalTokenizer",
    "SpellingTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "encode_dataset",
    "encode_example",
    "encode_training",
    "tiktoken_encoding_name",
]
