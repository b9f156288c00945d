"""A routing shape on the command line."""

from __future__ import annotations

import click


class RoutingShape(click.ParamType):  # type: ignore[type-arg]
    """MoE layers x experts x experts a token, `58x256x8`."""

    name = "LxExK"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        """The three numbers."""
        parts = str(value).split("x")
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            self.fail(
                f"{value!r} is no shape; write MoE layers x experts x experts a token, as in 58x256x8", param, ctx
            )
        layers, experts, top_k = map(int, parts)
        return layers, experts, top_k


SHAPE = RoutingShape()
