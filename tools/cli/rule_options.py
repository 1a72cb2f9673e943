"""The options that try another patching rule than the bundle's, which stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ...runtime.errors import OptionError
from ...runtime.names import PATCHING_MODES
from .options import F, OneOf, option, options

if TYPE_CHECKING:
    from ...runtime.patching import PatchingRule


def _rule_option(flag: str, kind: Any, text: str) -> Callable[[F], F]:
    return option(flag, type=kind, default=None, shown="the bundle's", help=text)


rule_options = options(
    _rule_option(
        "--mode",
        OneOf(PATCHING_MODES),
        "What patches go by: the patcher's entropy, spaces, a fixed size, or none (each byte is one).",
    ),
    _rule_option("--threshold", float, "Mode entropy: start a patch where entropy is over X nats."),
    _rule_option(
        "--threshold-add",
        float,
        "Mode entropy: only where it also rises by more than X nats; 0 turns it off.",
    ),
    _rule_option(
        "--monotonic/--no-monotonic",
        None,
        "Mode entropy: start a patch where entropy rises by more than --threshold, however high it is.",
    ),
    _rule_option("--patch-size", int, "Mode static: bytes of a patch."),
    _rule_option(
        "--max-patch-length", int, "Any mode: start a patch after N bytes at the latest; 0 turns it off."
    ),
)
"""Passed by the names of `PatchingRule`'s fields; None = not given."""


def changed_rule(own: PatchingRule, changes: dict[str, Any]) -> PatchingRule:
    """The bundle's rule with what is given in its place; what would have no effect is refused."""
    given = {name: value for name, value in changes.items() if value is not None}
    used = given.get("mode", own.mode)
    belongs = dict.fromkeys(("threshold", "threshold_add", "monotonic"), "entropy")
    for name, needed in {**belongs, "patch_size": "static"}.items():
        if name in given and used != needed:
            flag = "--" + name.replace("_", "-")
            raise click.UsageError(f"{flag} has no effect in mode {used}; add --mode {needed}, or omit it")
    if given.get("threshold_add") and given.get("monotonic", own.monotonic):
        raise click.UsageError("--threshold-add has no effect in a monotonic rule; add --no-monotonic")
    if given.get("max_patch_length") == 0:
        given["max_patch_length"] = None
    try:
        return replace(own, **given)
    except OptionError as error:
        # The option's name in front, as `VerbCommand` looks for it.
        raise OptionError(str(error).removeprefix("patching ")) from error
