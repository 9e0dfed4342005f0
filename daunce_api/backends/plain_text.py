"""Examples as plain text, for servers that take no token ids.

Such a server tokenizes by itself, so its ids must come back and be those of the example; otherwise nothing is used.
"""

from __future__ import annotations

from ..dataset import Example
from ..tokens import Tokenizer
from ..tokens.literal import MARK


def text_of(example: Example, tokenizer: Tokenizer) -> str:
    """The whole text that :func:`daunce_api.tokens.encode_example` turns into ids."""
    if example.is_chat:
        # The marks keep a content from spelling a special token for our tokenizer. A server would read one in such a
        # content all the same; then its ids differ and the answer is refused.
        return tokenizer.render(example.messages).replace(MARK, "")
    begin = "" if example.prompt.startswith(tokenizer.begin) else tokenizer.begin
    return begin + example.prompt + example.completion + tokenizer.end
