"""The worked uses and the CI example as pages of the guide's site; they stay where they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

EXAMPLES = Path(__file__).parents[1]
SHOWN = {".ipynb", ".json", ".md", ".png", ".py", ".svg", ".yaml", ".yml"}


def on_files(files: Any, config: Any) -> Any:
    """Add them below the folders of their own names, so that their links among each other hold."""
    for folder in ("uses", "ci"):
        for path in sorted((EXAMPLES / folder).rglob("*")):
            if path.is_file() and path.suffix in SHOWN:
                uri = path.relative_to(EXAMPLES).as_posix()
                files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page of the guide lies two folders beside them on disk, and above them on the site."""
    return markdown.replace("](../../uses/", "](uses/").replace("](../../ci/", "](ci/")
