"""All arrays of an instance, handed to compiled code as one reference.

Some 130 arrays come with each call; to take them out of their tuples one by one costs 20 us, as a bundle 3 us.
"""

from __future__ import annotations

from numba import njit, types
from numba.experimental import structref


@structref.register
class _BundleType(types.StructRef):
    """The type of a bundle in compiled code."""

    def preprocess_fields(self, fields):  # type: ignore[no-untyped-def]
        """Fields by type, whatever value one has."""
        return tuple((name, types.unliteral(of)) for name, of in fields)  # type: ignore[no-untyped-call]


class Bundle(structref.StructRefProxy):
    """`Book`, `Groups`, `Rules`, groups of requests, `Prices`, `StepWork`, `Scratch` and `Timeline` of an instance."""


structref.define_proxy(  # type: ignore[no-untyped-call]
    Bundle, _BundleType, ["book", "groups", "rules", "group_Q", "prices", "work", "scratch", "timeline"]
)


@njit(cache=True)
def bundled(book, groups, rules, group_Q, prices, work, scratch, timeline):  # type: ignore[no-untyped-def]
    """A bundle of what is given; it holds the arrays themselves, and numbers as they are now."""
    return Bundle(book, groups, rules, group_Q, prices, work, scratch, timeline)  # type: ignore[no-untyped-call]
