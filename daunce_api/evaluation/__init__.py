"""How good an attribution is: LDS, retrieval, removal, and baselines that read nothing but text."""
