"""Options of the verbs that run a model: where and how it runs and generates; loading it as they ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ...runtime.names import DEVICES
from ...runtime.options import GenerationOptions
from ..memory import running_memory
from ..output import Messages, printable, progress_bar, size
from .constraint_options import constraint_options, take_constraint
from .options import (
    DEFAULT_THREADS,
    MemorySize,
    OneOf,
    StopString,
    Value,
    draft_options,
    option,
    options,
    verify_option,
)

if TYPE_CHECKING:
    from ...runtime import BltModel
    from ...runtime.manifest import Manifest


@dataclass(frozen=True)
class EngineOptions:
    """What `BltModel.load` is told, and what is checked before it; `engine_options` has the defaults."""

    device: str
    threads: int | None
    """CPU threads; None as `BltModel.load` takes it."""
    prefill_chunk: int
    """Bytes that one pass takes at most."""
    max_memory: int | None
    """Bytes that running may take by the estimate; None = no limit."""
    verify: bool
    """Compare the sha256 of whole files."""
    probe: bool
    """Let an engine repeat what it gave when it was built before it is used."""
    provider_options: dict[str, str]
    """Options of ONNX Runtime's GPU provider."""


class _Setting(Value):
    """NAME=VALUE, as the two."""

    name = "setting"

    def read(self, text: str) -> tuple[str, str]:
        name, equals, setting = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"got {printable(text)!r}; give NAME=VALUE, such as use_tf32=1")
        return name.strip(), setting


_engine = options(
    option(
        "--device",
        type=OneOf(DEVICES),
        default="auto",
        help="Where to run; auto takes engines for this GPU where the bundle has any, else cuda where it "
        "works, else cpu. Any other is used or refused.",
    ),
    option("-t", "--threads", type=int, shown=DEFAULT_THREADS, help="CPU threads."),
    option(
        "--prefill-chunk",
        type=int,
        default=256,
        help="Bytes read in one pass; memory grows with it, the result does not change but with int8 caches "
        "or prefill.",
    ),
    option(
        "--max-memory",
        type=MemorySize(),
        metavar="SIZE",
        shown="no limit",
        help="Refuse to load when the estimate is over this, such as 800MB or 2GB; the memory-mapped "
        "tables are not counted.",
    ),
    option(
        "--no-probe",
        "probe",
        flag_value=False,
        default=True,
        help="Use the engine that build made without repeating its self-test, which takes milliseconds.",
    ),
    verify_option,
    option(
        "--provider-option",
        "provider_options",
        type=_Setting(),
        multiple=True,
        metavar="NAME=VALUE",
        shown="none",
        help="An option of ONNX Runtime's provider, with device cuda, ort-tensorrt or ort-tensorrt-rtx; "
        "repeatable.",
    ),
    title="Engine",
)


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `EngineOptions`, passed to the function as `engine`."""

    @wraps(function)
    def gathered(*args: Any, **asked: Any) -> Any:
        own = {name: asked.pop(name) for name in EngineOptions.__dataclass_fields__}
        own["provider_options"] = dict(own["provider_options"])
        return function(*args, engine=EngineOptions(**own), **asked)

    return _engine(gathered)


sampling_options = options(
    option(
        "-n",
        "--max-new-bytes",
        "--max-new-tokens",
        "--max-tokens",
        "max_new_bytes",
        of=GenerationOptions,
        type=int,
        help="Generate at most this many bytes.",
    ),
    option(
        "--temperature",
        "--temp",
        "temperature",
        of=GenerationOptions,
        type=float,
        help="Divide logits by it; 0 is greedy: the most likely byte, the filters below don't matter, and "
        "small models soon repeat themselves; 0.7 is a good start.",
    ),
    option("--top-k", of=GenerationOptions, type=int, help="Keep the N most likely bytes; 0 turns it off."),
    option(
        "--top-p",
        of=GenerationOptions,
        type=float,
        help="Keep the most likely bytes whose probabilities sum to X; 1 turns it off.",
    ),
    option(
        "--min-p",
        of=GenerationOptions,
        type=float,
        help="Keep bytes at least X times as likely as the most likely one; 0 turns it off.",
    ),
    option(
        "--repetition-penalty",
        of=GenerationOptions,
        type=float,
        help="Make bytes that are in the text already less likely; 1 turns it off.",
    ),
    option("--seed", type=int, shown="another one each time", help="Seed of the random numbers."),
    option(
        "--stop",
        type=StopString(),
        multiple=True,
        metavar="TEXT",
        help=r"End before this text; may be given several times. Escapes: \n \r \t \0 \\ \xNN \uNNNN.",
    ),
    draft_options,
    constraint_options,
    title="Sampling",
)
"""-n, --temperature and so on, by the names of `GenerationOptions`' fields, and `constraint_options`."""


def asked_options(bundle: Path, sampling: dict[str, Any]) -> GenerationOptions:
    """What the `sampling_options` that were given ask for, over the bundle's own defaults.

    Raises BundleError, OptionError; the latter, too, for a constraint that can't be used.
    """
    from ...runtime.guide import new_guide
    from ...runtime.manifest import load_manifest

    constraint = take_constraint(sampling)
    asked = GenerationOptions(**sampling, constraint=constraint)  # what is wrong with them needs no bundle
    if constraint is not None:
        new_guide(asked)
    source = click.get_current_context().get_parameter_source
    given = {name: value for name, value in sampling.items() if source(name) is not ParameterSource.DEFAULT}
    return replace(load_manifest(bundle).generation.defaults, **given, constraint=constraint)


def load_model(
    messages: Messages,
    bundle: Path,
    engine: EngineOptions,
    *,
    positions: int | None = None,
    reads_only: bool = False,
) -> BltModel:
    """Load a bundle; with `verify`, which may take minutes, show how far it is. Raises BltError.

    When the estimate for a text of `positions` ids (None: the trained context) is over `engine.max_memory`,
    nothing is loaded and ClickException raised. reads_only: no byte will be added, so that every free core
    helps, also where one thread is best for that.
    """
    from ...runtime import BltModel
    from ...runtime.processors import free_cores

    if reads_only and engine.threads is None and engine.device in ("auto", "cpu"):
        engine = replace(engine, threads=free_cores())

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
    with progress_bar(messages) as progress:
        return load(verify=True, progress=partial(progress, "checking files"))


def _check_memory(bundle: Path, limit: int, positions: int | None, prefill_chunk: int) -> None:
    from ...runtime.engines import find_engine
    from ...runtime.manifest import load_manifest

    manifest = load_manifest(bundle)
    engine = find_engine(bundle, manifest)
    prepared = engine.directory is not None
    wanted = manifest.model.trained_context if positions is None else positions
    chunk = max(1, min(prefill_chunk, wanted))
    parts = running_memory(
        manifest,
        prepared=prepared,
        positions=wanted,
        prefill_chunk=chunk,
        int8_prefill=engine.int8_prefill,
    )
    needed = sum(parts.values())
    if needed > limit:
        told = ", ".join(f"{name} {size(part)}" for name, part in parts.items())
        advice = "" if prepared else "blt-edge build, "
        raise click.ClickException(
            f"{bundle} would need about {size(needed)} ({told}), --max-memory allows {size(limit)}; "
            f"try {advice}blt-edge quantize, a smaller --prefill-chunk or a shorter text"
        )


def check_bundle_files(messages: Messages, bundle: Path, manifest: Manifest, full: bool) -> None:
    """Compare a bundle's files with its manifest, whole ones with `full`. Raises BundleError."""
    from ...runtime.integrity import check_files

    if not full:
        check_files(bundle, manifest)
        return
    with progress_bar(messages) as progress:
        check_files(bundle, manifest, full=True, progress=partial(progress, "checking files"))
