"""How a server is set up: what `blt-edge serve` was asked for."""

from __future__ import annotations

import ipaddress
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.options import GenerationOptions

if TYPE_CHECKING:
    from ...runtime import BltModel

TEMPERATURE = 1.0
"""Of requests that name none: OpenAI's, which clients count on that leave it out. `generate` is greedy, so
that a command gives the same text each time."""

MOST_PARALLEL = 256
"""Texts at work at a time, at most: each takes memory, and a thread of execution."""

KEY_NUMBER = "blt_edge.key_number"
"""Where `key_number` is in an ASGI scope."""


@dataclass(frozen=True)
class ServerSettings:
    """Limits and access. Seconds and bytes are plain numbers."""

    name: str
    """The model's id in the API."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8080
    """0: the system chooses one."""
    api_keys: tuple[str, ...] = ()
    """What /v1 and /metrics ask for, one of them; without any they ask for nothing."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may use the API; "*" is every one."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names to answer to besides the loopback ones, when the address is a loopback one."""
    parallel: int | None = None
    """Texts at work at a time; None is `parallel.usual_parallel`."""
    queue: int = 64
    """Requests that may wait while there is no room for another text; more are answered 429."""
    timeout: float = 600.0
    """For a whole request, from its first header to its last byte."""
    queue_timeout: float = 60.0
    """For the wait until a request begins to run."""
    grace: float = 10.0
    """For what was accepted, once the server is told to stop."""
    max_body: int = 1_000_000
    """Of a request."""
    cache_memory: int | None = None
    """For states of texts that were read, of all keys; 0 keeps none, None is the runtime's default."""
    cache_dir: Path | None = None
    """Where those states are kept from one run of the server to the next; None keeps them in memory only."""
    draft: str = "auto"
    """`GenerationOptions.draft` of requests that name none."""
    draft_length: int | None = None
    """`GenerationOptions.draft_length` likewise."""

    @property
    def url(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


def request_defaults(model: BltModel, settings: ServerSettings) -> GenerationOptions:
    """What a request gets that says nothing: OpenAI's defaults, over them the checkpoint's own, which its
    makers chose for it, and the server's for guesses.
    """
    guesses = {"draft": settings.draft, "draft_length": settings.draft_length}
    return GenerationOptions(**{"temperature": TEMPERATURE, **model.manifest.generation.options, **guesses})


def key_number(scope: MutableMapping[str, Any]) -> int:
    """Which of the `api_keys` an ASGI scope's request has sent; 0 where it need not send any."""
    number: int = scope.get(KEY_NUMBER, 0)
    return number


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches the address; host names other than localhost are not looked up."""
    try:
        number = ipaddress.ip_address(address.split("%", 1)[0])
    except ValueError:
        return address == "localhost" or address.endswith(".localhost")
    mapped = number.ipv4_mapped if isinstance(number, ipaddress.IPv6Address) else None
    return (mapped or number).is_loopback
