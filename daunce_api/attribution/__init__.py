"""``Attribution``: the losses of an ensemble and everything that can be asked of them."""

from daunce_api.attribution.attribution import Attribution
from daunce_api.attribution.labels import Labels, Side
from daunce_api.attribution.score_files import ScoreFormat
from daunce_api.attribution.tokens import TokenTable

__all__ = ["Attribution", "Labels", "ScoreFormat", "Side", "TokenTable"]
