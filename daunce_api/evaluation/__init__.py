"""How good an attribution is: LDS, retrieval, removal, and baselines that read nothing but text."""

from daunce_api.evaluation.lds import LDS, lds

__all__ = ["LDS", "lds"]
