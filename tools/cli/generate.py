"""`blt-edge generate`: text on stdout as it becomes certain, figures on stderr at the end."""

from __future__ import annotations

import base64
import sys
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...runtime.host import peak_resident
from ...runtime.options import GenerationOptions
from ..output import (
    Messages,
    TextOutput,
    WholeCharacters,
    counted,
    interrupt_sets,
    is_terminal,
    size,
    status,
)
from .documents import read_prompt, write_json
from .model_options import EngineOptions, asked_options, engine_options, load_model, sampling_options
from .options import STDIN, InputFile, json_option, model_option, needed, option, verb

if TYPE_CHECKING:
    from ...runtime import GenerationChunk, GenerationStats
    from ...runtime.engines import Engine
    from .prompt_cache import PromptCache


@verb(
    "generate",
    '-m demo-bundle -p "Once upon a time" --temperature 0.7 --seed 7',
    '-m demo-bundle -p "The hare is a " --choice cat --choice rabbit',
)
@model_option
@needed(click.option("-p", "--prompt", metavar="TEXT", help="Text to continue; - reads it from stdin."))
@click.option(
    "--prompt-file",
    type=InputFile(),
    metavar="FILE",
    help="Continue this file's bytes, exactly as they are (a last newline included).",
)
@click.option("--echo", is_flag=True, help="Print the prompt, too, before what continues it.")
@option(
    "--prompt-cache",
    type=click.Path(path_type=Path, readable=False),
    metavar="FILE",
    shown="none",
    help="Keep the state after the prompt in FILE; the next prompt that begins with FILE's text is read from "
    "there on. What is generated is the same.",
)
@option("--prompt-cache-ro", help="Use --prompt-cache FILE, and leave it as it is.")
@sampling_options
@engine_options
@json_option
def command(
    messages: Messages,
    model: Path,
    prompt: str | None,
    prompt_file: Path | None,
    echo: bool,
    prompt_cache: Path | None,
    prompt_cache_ro: bool,
    engine: EngineOptions,
    json_file: Path | None,
    **sampling: Any,
) -> None:
    """Continue a text, printed as it comes.

    stdout carries the new text's bytes as they are, a character as soon as its last byte is known. On a
    terminal, bytes that are no UTF-8 are shown as U+FFFD, and what it would obey as an escape. The model may
    end the text before --max-new-bytes. Figures follow on stderr. Where the checkpoint came with a
    generation_config.json, its values are the defaults; `inspect` shows them.
    """
    options = asked_options(model, sampling)
    data = read_prompt(prompt, prompt_file, model, messages)
    if data is None:
        raise click.UsageError("--prompt is missing; give a text, - for stdin, or --prompt-file FILE")
    cache = _prompt_cache(prompt_cache, prompt_cache_ro, model)
    positions = 1 + len(data) + options.max_new_bytes
    loaded = load_model(messages, model, engine, positions=positions)
    out, characters = TextOutput(shown=json_file != STDIN), WholeCharacters()
    if echo:
        out.write(characters.push(data))
    made, cancel = bytearray(), threading.Event()
    stream = loaded.stream if cache is None else partial(cache.stream, loaded)
    chunks = stream(data, options, cancel=cancel)
    slow = is_terminal(sys.stderr) and len(data) > 200
    try:
        with status(messages, f"reading the prompt, {len(data)} bytes") if slow else nullcontext():
            first = next(chunks)
        with interrupt_sets(cancel):
            for last in chain([first], chunks):
                out.write(characters.push(last.data))
                made += last.data
        out.write(characters.flush())
    except BrokenPipeError:  # nobody reads on: nothing more to say
        raise
    except BaseException:
        out.end_line()
        raise
    if not messages.quiet or last.finish_reason == "cancelled" or is_terminal(sys.stdout):
        out.end_line()
    assert last.stats is not None
    write_json(json_file, _document(model, data, bytes(made), last, options, loaded.engine))
    if not messages.quiet:
        ending = _ending(last, options)
        _figures(messages, last.stats, ending, loaded.engine, cache is not None)
    if last.finish_reason == "cancelled":
        raise KeyboardInterrupt
    if cache is not None and cache.failed:  # of which a warning has told
        raise click.exceptions.Exit(1)


def _prompt_cache(path: Path | None, read_only: bool, bundle: Path) -> PromptCache | None:
    """Raises UsageError, StateError, before anything is loaded."""
    if path is None:
        if read_only:
            raise click.UsageError("--prompt-cache-ro has nothing to read; give --prompt-cache FILE, too")
        return None
    from .prompt_cache import PromptCache  # imports numpy

    return PromptCache(path, bundle, read_only)


_ENDINGS = {
    "length": "--max-new-bytes reached",
    "eos": "the model ended the text",
    "stop": "a stop string came",
    "context": "the model has no more positions",
    "cancelled": "interrupted",
}


def _ending(last: GenerationChunk, options: GenerationOptions) -> str:
    """Why the text ended, in words, and whether it is what a constraint asks for."""
    told = _ENDINGS.get(str(last.finish_reason), str(last.finish_reason))
    if options.constraint is None:
        return told
    if last.finish_reason == "eos":
        return "the text is complete"
    return f"{told}, so the text may lack its end"


def _figures(messages: Messages, stats: GenerationStats, ending: str, engine: Engine, cached: bool) -> None:
    """ending: why the text ended. cached: whether there is a prompt cache."""
    patches = f"{stats.text_patches} {'patch' if stats.text_patches == 1 else 'patches'}"
    again = f" ({stats.reused_bytes} not read again)" if cached else ""
    messages.say(
        f"{stats.prompt_bytes} prompt bytes{again}, {stats.new_bytes} new bytes, {patches} "
        f"({stats.bytes_per_patch:.2f} bytes each); {ending}"
    )
    begun = "first byte" if stats.new_bytes else "prompt read"
    speed = f"{begun} after {1000 * stats.first_byte_seconds:.1f} ms"
    if stats.new_bytes > 1 and stats.decode_seconds > 0:
        speed += f", then {stats.bytes_per_second:.1f} bytes/s ({stats.milliseconds_per_byte:.2f} ms/byte)"
    messages.say(speed)
    if stats.rounds:
        messages.say(
            f"drafts: {stats.accepted} of {stats.drafted} guesses right ({stats.acceptance or 0:.0%}), "
            f"{stats.rounds} rounds of {stats.accepted / stats.rounds + 1:.1f} bytes; "
            f"{stats.calls_per_byte['decoder']:.2f} decoder calls a byte"
        )
    if stats.forced:
        messages.say(
            f"{counted(stats.forced, 'byte')} that nothing else could stand for, read together with others"
        )
    shares = stage_shares(stats.stage_seconds, stats.prefill_seconds + stats.decode_seconds)
    messages.say("time: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    messages.say(f"memory: {memory_told(stats.state_bytes)}")
    threads = "" if engine.threads is None else f"; {counted(engine.threads, 'thread')}"
    messages.say(f"engine: {engine}{threads}")


def stage_shares(stage_seconds: Mapping[str, float], total: float) -> dict[str, float]:
    """Shares of the whole time by stage, and "other": sampling, hashing, patching and Python."""
    shares = {name: seconds / total if total else 0.0 for name, seconds in stage_seconds.items()}
    return {**shares, "other": max(0.0, 1.0 - sum(shares.values()))}


def memory_told(state_bytes: int) -> str:
    """What a text's state takes, and this process in all."""
    peak = peak_resident()
    return f"{size(state_bytes)} of state" + (f", {size(peak)} at peak in all" if peak else "")


def _constraint_told(options: GenerationOptions) -> dict[str, Any] | None:
    constraint = options.constraint
    if constraint is None:
        return None
    texts = [text.decode("utf-8", "replace") for text in constraint.texts]
    return {"kind": constraint.kind, "source": constraint.source, "texts": texts}


def _document(
    model: Path,
    prompt: bytes,
    made: bytes,
    last: GenerationChunk,
    options: GenerationOptions,
    engine: Engine,
) -> dict[str, Any]:
    stats = last.stats
    assert stats is not None
    asked = {
        **asdict(options),
        "stop": [stop.decode("utf-8", "replace") for stop in options.stop_bytes],
        "constraint": _constraint_told(options),
    }
    return {
        "model": str(model),
        "prompt": prompt.decode("utf-8", "replace"),
        "text": made.decode("utf-8", "replace"),
        "data_base64": base64.b64encode(made).decode("ascii"),
        "finish_reason": last.finish_reason,
        "engine": {"name": engine.name, "device": engine.device, "reason": engine.reason},
        "options": asked,
        "stats": {
            **asdict(stats),
            "patches": stats.text_patches,
            "bytes_per_patch": stats.bytes_per_patch,
            "bytes_per_second": stats.bytes_per_second,
            "milliseconds_per_byte": stats.milliseconds_per_byte,
            "stage_shares": stage_shares(stats.stage_seconds, stats.prefill_seconds + stats.decode_seconds),
            "draft_acceptance": stats.acceptance or 0.0,
            "stage_calls_per_byte": stats.calls_per_byte,
            "peak_resident_bytes": peak_resident(),
        },
    }
