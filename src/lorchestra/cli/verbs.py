"""What all verbs have in common: how they end on Ctrl-C, and how a command line without its options is answered."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


class Verbs(TyperGroup):
    """The group of all verbs."""

    def invoke(self, ctx: Any) -> Any:
        """Ctrl-C ends with one line, which says what was kept, and exit code 130."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            print(str(stopped) or "stopped; nothing was written", file=sys.stderr)
            raise typer.Exit(130) from None


class Verb(TyperCommand):
    """One verb: everything that is missing is told at once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As usual, but that the first missing option brings the others with it."""
        words = list(args)  # parsing takes them away
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter:
            missing = self._missing(ctx, words)
            if len(missing) > 1:
                ctx.fail(f"Missing: {', '.join(missing)}.")
            raise

    def _missing(self, ctx: Any, args: list[str]) -> list[str]:
        given = self.make_parser(ctx).parse_args(args=args)[0]
        needed: list[Any] = [param for param in self.get_params(ctx) if param.required]
        absent = [param for param in needed if param.value_is_missing(param.consume_value(ctx, given)[0])]
        return [param.opts[0] if param.opts[0].startswith("-") else param.metavar or param.name for param in absent]
