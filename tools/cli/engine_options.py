"""Where and how a model runs: the options that verbs which run one share, as one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import click

from .messages import printable
from .options import DEVICES, MemorySize, OneOf, verify_option

__all__ = ["EngineOptions", "engine_options"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class EngineOptions:
    """What `BltModel.load` is told, and what is checked before it."""

    device: str = "auto"
    """One of `DEVICES`."""
    threads: int | None = None
    """CPU threads; None leaves it to the engine."""
    prefill_chunk: int = 256
    """Bytes that one pass takes at most."""
    max_memory: int | None = None
    """Bytes that running may take by the estimate; None = no limit."""
    verify: bool = False
    """Compare the sha256 of whole files."""
    probe: bool = True
    """Let an engine repeat what it gave when it was built before it is used."""
    provider_options: dict[str, str] = field(default_factory=dict)
    """Options of ONNX Runtime's GPU provider."""


def engine_options(function: F) -> Callable[..., Any]:
    """The options of `EngineOptions`, passed to the function as `engine`."""

    @wraps(function)
    def gathered(*args: Any, **asked: Any) -> Any:
        own = {name: asked.pop(name) for name in EngineOptions.__dataclass_fields__}
        own["provider_options"] = dict(own["provider_options"])
        return function(*args, engine=EngineOptions(**own), **asked)

    command: Callable[..., Any] = gathered
    for option in reversed([*_options(), verify_option, _provider_option()]):
        command = option(command)
    return command


def _options() -> list[Callable[[Any], Any]]:
    return [
        click.option(
            "--device",
            type=OneOf(DEVICES),
            default="auto",
            show_default=True,
            help="Where to run; auto takes engines for this GPU where the bundle has any, else cuda where it "
            "works, else cpu. Any other is used or refused.",
        ),
        click.option(
            "--threads",
            type=int,
            metavar="N",
            show_default="as many as the engine likes",
            help="CPU threads.",
        ),
        click.option(
            "--prefill-chunk",
            type=int,
            default=256,
            show_default=True,
            metavar="N",
            help="Bytes read in one pass; memory grows with it, the result does not change.",
        ),
        click.option(
            "--max-memory",
            type=MemorySize(),
            metavar="SIZE",
            show_default="no limit",
            help="Refuse to load when the estimate is over this, such as 800MB or 2GB; the memory-mapped "
            "tables are not counted.",
        ),
        click.option(
            "--no-probe",
            "probe",
            is_flag=True,
            flag_value=False,
            default=True,
            help="Use the engine that build made without repeating its self-test, which takes milliseconds.",
        ),
    ]


def _provider_option() -> Callable[[Any], Any]:
    return click.option(
        "--provider-option",
        "provider_options",
        type=_Setting(),
        multiple=True,
        metavar="NAME=VALUE",
        show_default="none",
        help="An option of ONNX Runtime's provider, with device cuda, ort-tensorrt or ort-tensorrt-rtx; "
        "repeatable.",
    )


class _Setting(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic from click 8.2 on
    """NAME=VALUE."""

    name = "setting"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """The two."""
        if isinstance(value, tuple):
            return value
        name, equals, setting = str(value).partition("=")
        if not equals or not name.strip():
            self.fail(f"got {printable(str(value))!r}; give NAME=VALUE, such as use_tf32=1", param, ctx)
        return name.strip(), setting
