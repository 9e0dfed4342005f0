"""Tokenizers for the tests of this folder."""

from __future__ import annotations

from functools import lru_cache

import pytest
from tokenizer_folders import EMBEDDED, GetTokenizer, chatml, llama_like, tiktoken_files

from daunce_api.data.tokenizers import LocalTokenizer, TiktokenTokenizer, Tokenizer, openai_models


@pytest.fixture(scope="session")
def tokenizers_of(tmp_path_factory: pytest.TempPathFactory) -> GetTokenizer:
    """A tokenizer by name: embedded, chatml, llama, o200k_base, cl100k_base (skipped without rank files)."""

    @lru_cache
    def get(name: str) -> Tokenizer:
        if name == "embedded":
            return LocalTokenizer(EMBEDDED)
        if name in ("chatml", "llama"):
            make = chatml if name == "chatml" else llama_like
            return LocalTokenizer(make(tmp_path_factory.mktemp(name) / name))
        folder = tiktoken_files()
        if folder is None:
            pytest.skip("no package with tiktoken's rank files is installed (llama-index-core)")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
            openai_models._load.cache_clear()
            tokenizer = TiktokenTokenizer(name)
        openai_models._load.cache_clear()
        return tokenizer

    return get


@pytest.fixture(scope="session")
def tokenizer(request: pytest.FixtureRequest, tokenizers_of: GetTokenizer) -> Tokenizer:
    """The one whose name the test is parametrized with."""
    return tokenizers_of(request.param)
