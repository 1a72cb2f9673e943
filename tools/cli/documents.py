"""Inputs read whole, and documents and pictures written whole: the files that a verb is given by the user.

What a verb that writes a bundle says of it at the end: the path, or one document.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ...runtime.files import write_whole
from ..output import Messages, echo, is_terminal
from .options import STDIN, F, OutputFile


def read_input(path: Path, messages: Messages, what: str) -> bytes:
    """Everything in a file, or on stdin for `-`. Raises OSError."""
    if path != STDIN:
        return path.read_bytes()
    if sys.stdin is None:
        return b""
    if is_terminal(sys.stdin):
        messages.say(f"reading {what} from the terminal; end it with Ctrl-D on a line of its own")
    return sys.stdin.buffer.read()


def read_prompt(prompt: str | None, prompt_file: Path | None, messages: Messages) -> bytes | None:
    """What --prompt or --prompt-file give, `-` being stdin; None without either. Raises OSError."""
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("--prompt and --prompt-file are both given; give one of them")
    if prompt is not None and prompt != "-":
        return os.fsencode(prompt)
    if prompt is None and prompt_file is None:
        return None
    return read_input(prompt_file or STDIN, messages, "the prompt")


def shown_name(path: Path) -> str:
    """What to call an input."""
    return "stdin" if path == STDIN else str(path)


def output_option(flag: str, instead: str, text: str) -> Callable[[F], F]:
    """An option for a file to write; instead: what there is without it, such as "no picture"."""
    return click.option(flag, type=OutputFile(), metavar="FILE", show_default=instead, help=text)


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
            "--plot needs matplotlib, which is not installed: pip install 'blt-edge[plot]'"
        )


def json_line(document: Mapping[str, Any]) -> str:
    """The document on one line, without a newline after it."""
    return json.dumps(_finite(document))


def _finite(value: Any) -> Any:
    # JSON has no word for nan and infinity.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


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
            "precision": spec.precision,
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
        "validation": manifest.validation,
    }
