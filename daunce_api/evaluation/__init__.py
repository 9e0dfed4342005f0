"""How good an attribution is: LDS, retrieval, removal, and baselines that read nothing but text."""

from .interchange import from_dattri, load_truth, save_truth, to_dattri
from .lds import LDS, lds

__all__ = ["LDS", "from_dattri", "lds", "load_truth", "save_truth", "to_dattri"]
