"""Inputs that a verb is given, read as far as they are needed; documents and pictures, written whole.

What a verb that writes a bundle says of it at the end: the path, or one document.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from ...runtime.errors import requirement
from ...runtime.files import write_whole
from ..output import Messages, echo, is_terminal, listed
from .options import STDIN, F, OutputFile, options

if TYPE_CHECKING:
    from ...runtime.quantization_spec import MixSpec
    from ...runtime.validation import ValidationRecord

MOST_READ = 1_000_000_000
"""Bytes of an input that has to be in memory: a device or a pipe may have no end."""


@contextmanager
def open_input(path: Path, messages: Messages, what: str) -> Iterator[BinaryIO]:
    """A file, or stdin for `-`. Raises OSError."""
    if path != STDIN:
        with path.open("rb") as file:
            yield file
        return
    if is_terminal(sys.stdin):
        messages.say(f"reading {what} from the terminal; end it with Ctrl-D on a line of its own")
    yield io.BytesIO() if sys.stdin is None else sys.stdin.buffer


def read_input(
    path: Path,
    messages: Messages,
    what: str,
    *,
    limit: int = MOST_READ,
    reason: str = "all that is held at once",
) -> bytes:
    """Everything in a file, or on stdin for `-`. Raises OSError, and UsageError for more than `limit` bytes,
    of which no more are read; reason: why that many.
    """
    with open_input(path, messages, what) as file:
        return read_all(file, shown_name(path), what, limit=limit, reason=reason)


def read_all(
    file: BinaryIO, name: str, what: str, *, limit: int = MOST_READ, reason: str = "all that is held at once"
) -> bytes:
    """Everything in an open file that is called `name`; as `read_input`."""
    data = bytearray()
    while len(data) <= limit and (piece := file.read(min(1 << 20, limit + 1 - len(data)))):
        data += piece
    if len(data) > limit:
        raise click.UsageError(f"{name}: {what} has more than {limit:,} bytes, {reason}; give a shorter one")
    return bytes(data)


def read_prompt(
    prompt: str | None, prompt_file: Path | None, model: Path, messages: Messages
) -> bytes | None:
    """What --prompt or --prompt-file give, `-` being stdin; None without either.

    Raises OSError, BundleError, and UsageError for more than the model in the bundle `model` can hold.
    """
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("--prompt and --prompt-file are both given; give one of them")
    if prompt is not None and prompt != "-":
        return os.fsencode(prompt)
    if prompt is None and prompt_file is None:
        return None
    from ...runtime.manifest import load_manifest

    positions = load_manifest(model).model.max_positions  # one is for BOS
    reason = "all that this model has positions for"
    return read_input(prompt_file or STDIN, messages, "the prompt", limit=positions - 1, reason=reason)


def with_folders(paths: Iterable[Path]) -> list[Path]:
    """The paths, in the place of each folder the texts in it. Raises OptionError for a folder of none."""
    from ...calibration.data import texts_in

    return [text for path in paths for text in (texts_in(path) if path.is_dir() else [path])]


def shown_name(path: Path) -> str:
    """What to call an input."""
    return "stdin" if path == STDIN else str(path)


def nothing_in(parameter: str, paths: Sequence[Path], to_do: str) -> click.UsageError:
    """The error of inputs that are all empty; to_do: what they were for."""
    what = f"{shown_name(paths[0])} is" if len(paths) == 1 else f"all {len(paths)} files are"
    return click.UsageError(f"{parameter}: {what} empty; there is nothing to {to_do}")


def output_option(flag: str, instead: str, text: str) -> Callable[[F], F]:
    """An option for a file to write; instead: what there is without it, such as "no picture"."""
    one = click.option(flag, type=OutputFile(), metavar="FILE", show_default=instead, help=text)
    return options(one, title="Output")


def write_json(target: Path | None, document: Mapping[str, Any]) -> None:
    """Write a document (None: nowhere; `-`: on stdout; else a file, whole or not at all). Raises OSError."""
    if target is None:
        return
    text = json.dumps(_finite(document), indent=2) + "\n"
    if target != STDIN:
        write_whole(target, lambda path: path.write_text(text, encoding="ascii"))
    elif sys.stdout is not None:
        sys.stdout.write(text)


def check_plot(plot: Path | None) -> None:
    """Refuse a picture that can't be drawn, before minutes of measuring. Raises ClickException."""
    if plot is None:
        return
    if plot == STDIN or plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise click.UsageError(f"--plot: got {plot}; give a file that ends with .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException(
            f"--plot needs matplotlib, which is not installed: pip install {requirement('plot')}"
        )


def write_text(target: Path, text: str) -> None:
    """Write a text in UTF-8 to a file, whole or not at all, or to stdout for `-`. Raises OSError."""
    if target != STDIN:
        write_whole(target, lambda path: path.write_bytes(text.encode()))
    elif sys.stdout is not None:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())


def _finite(value: Any) -> Any:
    # JSON has no word for nan and infinity.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


def blocks_told(block_size: int | None, by_stage: Mapping[str, Sequence[int]] | None) -> str | None:
    """How many weights share a scale, of what a bundle's manifest says of it; None without blocks."""
    if block_size is None:
        return None
    stages: dict[tuple[int, ...], list[str]] = {}
    for stage, sizes in (by_stage or {}).items():
        stages.setdefault(tuple(sizes), []).append(stage)
    parts = [f"{listed(sizes)} in {', '.join(names)}" for sizes, names in stages.items()]
    return f"{'; '.join(parts) or block_size} weights share a scale"


def mix_told(mix: MixSpec) -> str:
    """What a bundle's manifest says of a patcher that was searched."""
    narrow, matrices = len(mix.int4), len(mix.int4) + len(mix.int8w)
    kept = f"{mix.boundaries:.2%} of boundaries as in float32, {mix.target:.2%} asked for"
    return f"patcher: {narrow} of {matrices} matrices in 4 bits, {kept}"


def finish_written(
    messages: Messages, bundle: Path, json_file: Path | None, check: Callable[[], object] | None
) -> None:
    """Validate by `check` (None = --no-validate), then print the path and write the document.

    A bundle that differs is kept: the document says so, and what `check` raises goes on. Raises OSError.
    """
    passed = False
    try:
        if check is None:
            messages.say("not validated: --no-validate")
        else:
            check()
        passed = True
    finally:
        if json_file is not None:
            write_json(json_file, _document(bundle))
        if passed and json_file != STDIN:
            echo(str(bundle))


def _document(bundle: Path) -> dict[str, Any]:
    from ...runtime.manifest import load_manifest

    manifest = load_manifest(bundle)
    parts: dict[str, dict[str, Any]] = {
        stage: {
            "precision": "+".join(manifest.precisions_of(stage)),
            "parameters": spec.parameters,
            "bytes": sum(manifest.files[file].bytes for file in (spec.file, spec.data)),
        }
        for stage, spec in manifest.stages.items()
    }
    parts["tables"] = {
        "precision": manifest.embedding.precision,
        "parameters": manifest.model.parameters["tables"],
        "bytes": manifest.embedding.bytes,
    }
    return {
        "bundle": str(bundle),
        "source": manifest.source.name,
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "parts": parts,
        **validation_document(manifest.validation[-1] if manifest.validation else None),
    }


def validation_document(record: ValidationRecord | None) -> dict[str, Any]:
    """A validation's report, and what it was made on; both null without one."""
    return {"validation": record and record.report, "validated_on": record and record.machine}
