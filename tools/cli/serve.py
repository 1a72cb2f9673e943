"""`blt-edge serve`: a model behind an HTTP address. The address goes to stdout, everything else to stderr."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...runtime.options import GenerationOptions
from ...runtime.paths import folder_name
from ..memory import state_memory
from ..output import Messages, counted, crash_line, error_line, foreseen_line, printable, show_traceback, size
from ..server.settings import MOST_PARALLEL, ServerSettings, is_loopback
from .model_options import EngineOptions, engine_options, load_model
from .options import F, MemorySize, draft_options, model_option, option, verb

if TYPE_CHECKING:
    from ...runtime import BltModel
    from ..server.connections import Listener
    from ..server.service import Service

_SECONDS = click.FloatRange(min=0, min_open=True, max=86_400)

_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f.]*(:[0-9A-Fa-f.]*){2,}")
"""A name or an address, without a port."""


def _setting(flag: str, kind: Any, metavar: str, text: str) -> Callable[[F], F]:
    """An option that is a field of `ServerSettings`, with its default."""
    return option(flag, of=ServerSettings, type=kind, metavar=metavar, help=text)


def _several(flag: str, name: str, metavar: str, text: str) -> Callable[[F], F]:
    return option(flag, name, type=str, multiple=True, metavar=metavar, shown="none", help=text)


@verb("serve", "-m demo-bundle", "-m demo-bundle --host 0.0.0.0 --port 8000")
@model_option
@_setting(
    "--host",
    str,
    "ADDRESS",
    "Listen here; the default is reached from this machine only, 0.0.0.0 from everywhere.",
)
@_setting("--port", click.IntRange(0, 65535), "N", "Listen on this port; 0 takes a free one.")
@option(
    "--name", type=str, metavar="NAME", shown="the bundle directory's name", help="The model's id in the API."
)
@option(
    "--api-key",
    "api_keys",
    type=str,
    multiple=True,
    metavar="KEY",
    envvar="BLT_EDGE_API_KEY",
    show_envvar=True,
    shown="no key",
    help="Ask for this key on /v1 and /metrics. Can be given often: each key has a memory of its own. Give "
    "it in the environment, several with spaces between: others see a command line.",
)
@_several(
    "--cors-origin",
    "cors_origins",
    "ORIGIN",
    "Let web pages of this origin (https://example.org) use the API; * lets all. Can be given often.",
)
@_several(
    "--allow-host",
    "allowed_hosts",
    "NAME",
    "On a loopback address, answer to this host name, too: a proxy's. Can be given often.",
)
@option(
    "--parallel",
    type=click.IntRange(1, MOST_PARALLEL),
    metavar="N",
    shown="as many as one pass takes, if they fit into memory",
    help="Texts at work at a time; with 1, a request waits until those before it have ended. By default as "
    "many as the bundle has packed graphs for (8, after `blt-edge build`; 4 that take turns where it has "
    "none), fewer where so many of all positions would not fit into memory.",
)
@_setting(
    "--queue",
    click.IntRange(0, 100_000),
    "N",
    "Requests that may wait while so many are at work; more are answered 429.",
)
@_setting("--timeout", _SECONDS, "SECONDS", "For a whole request, from its first byte to its last.")
@_setting("--queue-timeout", _SECONDS, "SECONDS", "For its wait in the queue.")
@_setting(
    "--grace",
    click.FloatRange(0, 86_400),
    "SECONDS",
    "For what was accepted, after SIGTERM or Ctrl-C; then it is cut off.",
)
@option(
    "--max-body",
    type=MemorySize(),
    default="1MB",
    metavar="SIZE",
    help="Of a request; longer ones are answered 413.",
)
@option(
    "--cache-memory",
    type=MemorySize("0 keeps none"),
    metavar="SIZE",
    shown="a quarter of what is free, at most 2GB",
    help="Keep the states of texts in so much memory, of all keys together, so that what comes again is not "
    "read again; 0 keeps none.",
)
@option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    shown="memory only",
    help="Have the same states in DIR, too, for the next start; a folder that others can't read, made where "
    "there is none. They are written at the end and, on a CPU, every ten minutes.",
)
@draft_options
@engine_options
def command(messages: Messages, model: Path, engine: EngineOptions, **asked: Any) -> None:
    """Answer HTTP completions and chats, and show a page.

    POST /v1/completions as OpenAI's clients send it, bytes in the place of tokens; /v1/chat/completions where
    the bundle has a chat template (export --chat-template); GET /v1/models, /healthz and /metrics; a page at
    /. Several texts are generated at a time, others wait. stdout gets the address,
    stderr a line for each request. --draft and --draft-length are for requests that name none.
    """
    GenerationOptions(draft=asked["draft"], draft_length=asked["draft_length"])  # raises OptionError
    keys = asked["api_keys"] = tuple(dict.fromkeys(asked["api_keys"]))
    if not keys and not os.environ.get("BLT_EDGE_API_KEY", "-").strip():
        raise click.UsageError("BLT_EDGE_API_KEY is empty; give it a key, or unset it to serve without one")
    if not all(re.fullmatch(r"[!-~]+", key) for key in keys):
        raise click.UsageError(
            "--api-key is empty or has characters that headers don't carry; give letters and digits"
        )
    if asked["cache_dir"] is not None and asked["cache_memory"] == 0:
        raise click.UsageError("--cache-dir and --cache-memory 0 are both given; leave one of them out")
    for origin in asked["cors_origins"]:
        if origin != "*" and not re.fullmatch(r"https?://[^/\s?#@]+", origin):
            got = printable(origin)
            raise click.UsageError(
                f"--cors-origin: got {got}; give a scheme and a host such as https://example.org"
            )
    for host in asked["allowed_hosts"]:
        if not _HOST.fullmatch(host):
            got = printable(host)
            raise click.UsageError(f"--allow-host: got {got}; give a name alone, such as example.org")
    name = asked.pop("name") or folder_name(model)
    name = name.encode("utf-8", "backslashreplace").decode("utf-8")  # JSON has no word for other bytes
    settings = ServerSettings(name=name, **asked)
    from ..server.run import bind  # needs what the extra "serve" installs

    try:
        bound = bind(settings.host, settings.port)
    except OSError as error:
        raise click.ClickException(
            f"can't listen on {printable(settings.url)}: {error.strerror}; choose another --host or --port"
        ) from None
    with bound:
        _serve(messages, load_model(messages, model, engine), settings, bound)


def _serve(messages: Messages, model: BltModel, settings: ServerSettings, bound: Listener) -> None:
    from ..server.run import run_server
    from ..server.service import Service

    host, port = bound.getsockname()[:2]
    settings = replace(settings, host=host, port=port, allowed_hosts=(*settings.allowed_hosts, settings.host))

    def say(line: str) -> None:
        with _whoever_reads():
            messages.say(line)

    def report(error: Exception) -> None:
        with _whoever_reads():
            if messages.verbose:
                show_traceback(error)
        error_line(foreseen_line(error) or crash_line(error, messages.verbose))

    def started() -> None:
        if sys.stdout is not None:
            sys.stdout.write(settings.url + "\n")
            sys.stdout.flush()
        with _whoever_reads():
            _introduce(messages, model, service)

    service = Service(model, settings, report)
    if settings.cache_dir is not None:
        loaded = service.stores.open(settings.cache_dir, report)
        messages.say(f"{counted(loaded.states, 'state')} restored from {settings.cache_dir}")
        if loaded.dropped:
            files = counted(len(loaded.dropped), "file")
            messages.note(f"blt-edge: {files} there could not be used, such as {loaded.dropped[0]}")
    run_server(service, bound, say=say, started=started)
    say("stopped")


@contextmanager
def _whoever_reads() -> Iterator[None]:
    """Lines of the log in the block: a server goes on when its log can't."""
    try:
        yield
    except BrokenPipeError:  # for good; the interpreter must not try again at its end
        if sys.stderr is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    except OSError:
        pass


def _tell_parallel(messages: Messages, model: BltModel, service: Service) -> None:
    from ..server.parallel import text_memory

    parallel, rows = service.parallel, max(model.rows, default=1)
    together = f", {'all' if parallel <= rows else rows} of them in one pass" if rows > 1 < parallel else ""
    taking = ", which take turns" if rows == 1 < parallel else ""
    messages.say(f"{counted(parallel, 'text')} at work at a time{together}{taking} (--parallel)")
    needed, available = parallel * text_memory(model), model.available_memory()
    free = max(0, (available or 0) - service.stores.memory)
    if available is not None and needed > free:
        messages.note(
            f"blt-edge: warning: {counted(parallel, 'text')} of all positions take {size(needed)}, and "
            f"{size(free)} are free beside --cache-memory; long ones may fail, give a smaller --parallel"
        )


def _introduce(messages: Messages, model: BltModel, service: Service) -> None:
    positions, settings = model.limits.max_positions, service.settings
    messages.say(f"{settings.name}: {positions} positions; engine: {model.engine}")
    _tell_parallel(messages, model, service)
    memory, keys = service.stores.memory, len(settings.api_keys)
    shared = f", an equal part for each of {keys} keys" if keys > 1 else ""
    kept = f"texts that were read are kept in up to {size(memory)}{shared}" if memory else "no text is kept"
    messages.say(f"{kept} (--cache-memory)")
    share, windows = memory // max(1, keys), state_memory(model.manifest).windowed
    if 0 < share < windows:
        messages.note(
            f"blt-edge: warning: --cache-memory leaves a key {size(share)} and a long text's state takes "
            f"{size(windows)} and more, so such texts are read again each time; give more, or 0"
        )
    host = settings.host
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    key = ' -H "Authorization: Bearer $BLT_EDGE_API_KEY"' if settings.api_keys else ""
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 64, "temperature": 0.7})
    messages.say(f"try: curl {replace(settings, host=host).url}/v1/completions{key} \\")
    messages.say(f"       -H 'Content-Type: application/json' -d '{body}'")
    if service.chat is not None:
        messages.say("chats, by the bundle's chat template: the same with messages, at /v1/chat/completions")
    messages.say("a page is at the same address; Ctrl-C ends it")
    if not is_loopback(settings.host) and not settings.api_keys:
        messages.note(
            f"blt-edge: warning: anybody who reaches {settings.host} may use this server; "
            "set BLT_EDGE_API_KEY, or leave --host at 127.0.0.1"
        )
