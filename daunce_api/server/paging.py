"""Query parameters of the lists, and their shape."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .api_errors import invalid
from .inject import Kind
from .requests import MAX_METADATA
from .service import Service
from .state import Row, Table

_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)


def page(
    service: Service,
    request: Request,
    table: Table,
    view: Callable[[Row], dict[str, Any]],
    *,
    where: str = "1",
    values: Sequence[Any] = (),
    usual: int = 20,
    largest: int = 100,
    ascending: bool = False,
    kind: Kind | None = None,
) -> Response:
    """One page of a list, newest first unless ``ascending``, by the request's ``limit`` (default ``usual``) and
    ``after``; what an injected lag hides of a ``kind`` is left out. Raises ApiError 400."""
    given = request.query_params.get("limit", str(usual))
    limit = int(given) if given.isascii() and given.isdecimal() and len(given) < 10 else 0
    if not 1 <= limit <= largest:
        raise invalid(f"Invalid value for 'limit': must be a whole number from 1 to {largest}.", param="limit")
    conditions, bound = [where], list(values)
    if kind is not None and (hidden := service.injector.unlisted(kind)):
        conditions.append(f"id NOT IN ({', '.join('?' * len(hidden))})")
        bound += hidden
    after = request.query_params.get("after")
    if after:
        either = "? IN (id, checkpoint_id)" if table == "models" else "? = id"
        found = service.state.rows(f"SELECT seq FROM {table} WHERE {either}", [after])
        if not found:
            raise invalid("Invalid value for 'after': no such object.", param="after")
        conditions.append("seq > ?" if ascending else "seq < ?")
        bound.append(found[0]["seq"])
    condition = " AND ".join(f"({c})" for c in conditions)
    order = "ASC" if ascending else "DESC"
    query = f"SELECT * FROM {table} WHERE {condition} ORDER BY seq {order} LIMIT ?"
    rows = service.state.rows(query, [*bound, limit + 1])
    data = [view(r) for r in rows[:limit]]
    first, last = (data[0]["id"], data[-1]["id"]) if data else ("", "")
    more = len(rows) > limit
    return JSONResponse({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more})


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
    if len(conditions) > MAX_METADATA + 1:
        raise invalid(f"Invalid value for 'metadata': at most {MAX_METADATA} conditions.", param="metadata")
    return " AND ".join(conditions), values
