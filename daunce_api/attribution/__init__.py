"""``Attribution``: the losses of an ensemble and everything that can be asked of them."""

from .attribution import Attribution
from .labels import Labels, Side
from .score_files import ScoreFormat
from .token_table import TokenTable

__all__ = ["Attribution", "Labels", "ScoreFormat", "Side", "TokenTable"]
