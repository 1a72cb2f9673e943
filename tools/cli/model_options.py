"""Where and how a model runs: the options that verbs which run one share, as one value.

The options of whatever generates text: the fields of `GenerationOptions` that are asked of a person.

Loading a bundle as the engine options ask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ...runtime.names import DEVICES
from ..memory import running_memory
from ..output import Session, printable, progress_bar, size
from .options import MemorySize, OneOf, StopString, draft_options, verify_option

if TYPE_CHECKING:
    from ...runtime import BltModel
    from ...runtime.manifest import Manifest

__all__ = ["EngineOptions", "check_bundle_files", "engine_options", "load_model", "sampling_options"]

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


def sampling_options(function: F) -> F:
    """-n, --temperature and so on, as `GenerationOptions` takes them; passed by its fields' names."""
    options = [
        click.option(
            "-n",
            "--max-new-bytes",
            "--max-new-tokens",
            "max_new_bytes",
            type=int,
            default=256,
            show_default=True,
            metavar="N",
            help="Generate at most this many bytes.",
        ),
        click.option(
            "--temperature",
            "--temp",
            "temperature",
            type=float,
            default=0.0,
            show_default=True,
            metavar="X",
            help="Divide logits by it; 0 is greedy: the most likely byte, and the filters below don't "
            "matter.",
        ),
        click.option(
            "--top-k",
            type=int,
            default=0,
            show_default=True,
            metavar="N",
            help="Keep the N most likely bytes; 0 turns it off.",
        ),
        click.option(
            "--top-p",
            type=float,
            default=1.0,
            show_default=True,
            metavar="X",
            help="Keep the most likely bytes whose probabilities sum to X; 1 turns it off.",
        ),
        click.option(
            "--min-p",
            type=float,
            default=0.0,
            show_default=True,
            metavar="X",
            help="Keep bytes at least X times as likely as the most likely one; 0 turns it off.",
        ),
        click.option(
            "--repetition-penalty",
            type=float,
            default=1.0,
            show_default=True,
            metavar="X",
            help="Make bytes that are in the text already less likely; 1 turns it off.",
        ),
        click.option(
            "--seed",
            type=int,
            metavar="N",
            show_default="another one each time",
            help="Seed of the random numbers.",
        ),
        click.option(
            "--stop",
            type=StopString(),
            multiple=True,
            metavar="TEXT",
            help=r"End before this text; may be given several times. Escapes: \n \r \t \0 \\ \xNN \uNNNN.",
        ),
        draft_options,
    ]
    for option in reversed(options):
        function = option(function)
    return function


def load_model(
    session: Session, bundle: Path, engine: EngineOptions, *, positions: int | None = None
) -> BltModel:
    """Load a bundle; with `verify`, which may take minutes, show how far it is. Raises BltError.

    When the estimate for a text of `positions` ids (None: the trained context) is over `engine.max_memory`,
    nothing is loaded and ClickException raised.
    """
    from ...runtime import BltModel

    if engine.max_memory is not None:
        _check_memory(bundle, engine.max_memory, positions, engine.prefill_chunk)
    load = partial(
        BltModel.load,
        bundle,
        engine.device,
        engine.threads,
        prefill_chunk=engine.prefill_chunk,
        probe=engine.probe,
        provider_options=engine.provider_options,
    )
    if not engine.verify:
        return load()
    with progress_bar(session) as progress:
        return load(verify=True, progress=partial(progress, "checking files"))


def _check_memory(bundle: Path, limit: int, positions: int | None, prefill_chunk: int) -> None:
    from ...runtime.engines import find_engine
    from ...runtime.manifest import load_manifest

    manifest = load_manifest(bundle)
    prepared = find_engine(bundle, manifest).directory is not None
    wanted = manifest.model.trained_context if positions is None else positions
    chunk = max(1, min(prefill_chunk, wanted))
    parts = running_memory(manifest, prepared=prepared, positions=wanted, prefill_chunk=chunk)
    needed = sum(parts.values())
    if needed > limit:
        told = ", ".join(f"{name} {size(part)}" for name, part in parts.items())
        advice = "" if prepared else "blt-edge build, "
        raise click.ClickException(
            f"{bundle} would need about {size(needed)} ({told}), --max-memory allows {size(limit)}; "
            f"try {advice}blt-edge quantize, a smaller --prefill-chunk or a shorter text"
        )


def check_bundle_files(session: Session, bundle: Path, manifest: Manifest, full: bool) -> None:
    """Compare a bundle's files with its manifest, whole ones with `full`. Raises BundleError."""
    from ...runtime.integrity import check_files

    if not full:
        check_files(bundle, manifest)
        return
    with progress_bar(session) as progress:
        check_files(bundle, manifest, full=True, progress=partial(progress, "checking files"))
