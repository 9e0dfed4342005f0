"""Query parameters of the lists."""

from __future__ import annotations

import re

from starlette.requests import Request

from .api_errors import invalid
from .state import Row

_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)


def integer(request: Request, name: str, default: int, largest: int) -> int:
    """A whole number from 1 to ``largest``. Raises ApiError 400."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= largest):
        raise invalid(f"Invalid value for '{name}': must be a whole number from 1 to {largest}.", param=name)
    return int(text)


def after(request: Request) -> str | None:
    """The id that the page before ended with."""
    return request.query_params.get("after") or None


def found(page: tuple[list[Row], bool] | None) -> tuple[list[Row], bool]:
    """Raises ApiError 400 where ``after`` named nothing."""
    if page is None:
        raise invalid("Invalid value for 'after': no such object.", param="after")
    return page


def metadata_filter(request: Request) -> tuple[str, list[str]]:
    """``metadata[k]=v`` (any number of them), or ``metadata=null``, as an SQL condition and its values."""
    conditions, values = ["1"], []
    for name, value in request.query_params.multi_items():
        match = _METADATA.fullmatch(name)
        if match is not None:
            conditions.append(
                "EXISTS (SELECT 1 FROM json_each(jobs.metadata) AS pair WHERE pair.key=? AND pair.value=?)"
            )
            values += [match[1], value]
        elif name == "metadata":
            if value != "null":
                raise invalid("Invalid value for 'metadata': use metadata[key]=value, or null.", param="metadata")
            conditions.append("metadata IS NULL")
    return " AND ".join(conditions), values
