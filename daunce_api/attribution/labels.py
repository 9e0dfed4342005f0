"""Labels that scores are summed over: the sources of a data set, or whatever the caller has."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias, cast

from ..data.dataset import Dataset
from ..data.records import plain_cell
from ..errors import ConfigurationError, DataError

Side = Literal["train", "test"]
Label: TypeAlias = str | int
Labels: TypeAlias = Literal["source"] | Mapping[str, Hashable] | Sequence[Hashable]
"""``"source"``, a label for every id, or one for every example in the data set's order."""

NONE = "(none)"
_NAMED = 5


def labels_of(dataset: Dataset, by: Labels) -> list[Label]:
    """The label of each example in the data set's order; ``"(none)"`` where it has none.

    Args:
        dataset: N examples.
        by: ``"source"``; a mapping from id to label, which may hold more ids than the data set; or N labels in the
            data set's order. A label is a text or a whole number; None and what tables have for it stand for no label.

    Raises:
        DataError: an example is not in the mapping, the sequence has another length, or a label is something else.
        ConfigurationError: a text other than "source".
    """
    if isinstance(by, str):
        if by != "source":
            raise ConfigurationError(
                f'Scores cannot be summed by {by!r}: give "source", a mapping from id to label, or one label for every '
                "example in the data's order."
            )
        given: list[Hashable] = list(dataset.sources)
    elif hasattr(by, "keys"):  # mappings, and series of pandas, whose order need not be the data's
        label_of = cast("Mapping[str, Hashable]", by)
        missing = [i for i in dataset.ids if i not in label_of]
        if missing:
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            named = ", ".join(map(repr, missing[:_NAMED]))
            raise DataError(
                f"The labels lack {len(missing)} of {len(dataset)} examples of {dataset.name}: {named}{more}. Give "
                "every id a label; None stands for no label."
            )
        given = [label_of[i] for i in dataset.ids]
    else:
        given = list(by)
        if len(given) != len(dataset):
            raise DataError(
                f"{len(given)} labels were given for the {len(dataset)} examples of {dataset.name}; a sequence needs "
                "one for each, in the data's order. A mapping from id to label needs no order."
            )
    return [_label(label, dataset, position) for position, label in enumerate(given)]


def in_order(labels: Iterable[Label]) -> list[Label]:
    """Each label once: numbers, then texts, both ascending."""
    return sorted(set(labels), key=lambda label: (isinstance(label, str), label))


def _label(given: Hashable, dataset: Dataset, position: int) -> Label:
    label = plain_cell(given)
    if isinstance(label, float) and label.is_integer():  # what tables make of whole numbers where some are missing
        label = int(label)
    if label is None:
        return NONE
    if isinstance(label, str | int) and not isinstance(label, bool):
        return label
    raise DataError(
        f"The label of {dataset.ids[position]!r} in {dataset.name} is {label!r}; a label is a text or a whole number, "
        "or None for no label."
    )
