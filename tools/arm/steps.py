"""What is typed on the processor that is tried, and what its output must say. No step measures speed."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...export.golden import GOLDEN_NAME, Golden
from ...export.quality import tolerances_of
from ...runtime.manifest import load_manifest
from ..steps import Check, Done, Step, greedy_check

PRECISIONS = {"int4": "int4", "int8": "int8", "int8w": "int8w", "fp16": "fp16,patcher=fp32"}
"""Bundles' names and mixes, each of which holds its bars on every processor: on Arm float16 is multiplied in
float16, and the patcher's entropies are then more than 0.05 nats off where they are large."""
_GREEDY_BYTES = 64
_CHUNKS = ("7", "64", "256")
_SAME_BITS = 1e-5
"""Bits per byte that a prompt's cutting into chunks may change: sums are taken in another order."""
_SERVER_SECONDS = 300
_TEXTS = ("--text", "alice.bin", "scripts.bin")


def steps_for(golden: Golden, bundles: Path, quick: str | None = None) -> list[Step]:
    """Commands in a folder with the float32 bundle b, its quantized forms, texts and the golden file.

    bundles: where the same bundles are, from which the bars go. quick: the one precision that a few minutes
    allow; None = all, and every step.
    """
    first = [
        Step("load, portable graphs, greedy text", _generate(), _greedy(golden, built=False)),
        # Proving packed graphs takes an emulator many minutes.
        Step("build fp32", _build("b", *(("--rows", "none") if quick else ())), _fused),
        Step("fp32 engine, greedy text", _generate(), _greedy(golden, built=True)),
    ]
    if quick:
        text = ("--text", "alice.bin", "--max-bytes", "600")
        return [
            *first,
            Step(
                f"build {quick}", _build(f"b-{quick}", "--rows", "none", *_prefill(quick)), _fused_for(quick)
            ),
            Step(f"{quick} beside fp32", _compare("b", f"b-{quick}", *text), _bars(bundles, short=True)),
        ]
    chunks: list[float] = []
    return [
        Step("portable graphs against transformers' values", _validate("b"), _passed),
        *first,
        Step("fp32 engine against transformers' values", _validate("b"), _passed),
        *(
            Step(f"greedy text by {draft} drafts", _generate("--draft", draft), _greedy(golden, built=True))
            for draft in ("lookup", "patcher", "decoder")
        ),
        *(
            Step(f"score in chunks of {size}", _score("--prefill-chunk", size), _same_bits(chunks))
            for size in _CHUNKS
        ),
        *(Step(f"build {precision}", _build(f"b-{precision}"), _fused) for precision in PRECISIONS),
        *(
            Step(f"{precision} engine against transformers' values", _validate(f"b-{precision}"), _passed)
            for precision in PRECISIONS
        ),
        Step("every precision beside fp32", compare_all(), _bars(bundles)),
        Step("build int4, chunks in int8", _build("b-int4", *_prefill("int4")), _fused_for("int4")),
        Step("int4, chunks in int8, beside fp32", _compare("b", "b-int4", *_TEXTS), _bars(bundles)),
        Step("quantize to int4", ("quantize", "b", "-o", "own-int4", "--precision", "int4")),
        Step(
            "quantize to int8", ("quantize", "b", "-o", "own-int8", "--precision", "int8", "--windows", "4")
        ),
    ]


def _generate(*more: str) -> tuple[str, ...]:
    count = str(_GREEDY_BYTES)
    return ("generate", "-m", "b", "--prompt-file", "prompt.bin", "-n", count, *more, "--json", "-")


def _score(*more: str) -> tuple[str, ...]:
    return ("score", "-m", "b", "scripts.bin", *more, "--json", "-")


def _build(bundle: str, *more: str) -> tuple[str, ...]:
    return ("build", bundle, *more, "--json", "-")


_PREFILL = {"int4": ["latent", "decoder"], "int8": ["encoder"]}
"""Stages in blocks that move no boundary: `build` tries products of integers for them."""


def _prefill(precision: str) -> tuple[str, ...]:
    return ("--int8-prefill", ",".join(_PREFILL[precision])) if precision in _PREFILL else ()


def _fused_for(precision: str) -> Check:
    def check(output: str) -> str | None:
        stages = json.loads(output)["int8_prefill"]
        return _fused(output) or (
            None if stages == _PREFILL.get(precision, []) else f"int8 prefill of {stages}"
        )

    return check


def _fused(output: str) -> str | None:
    """Of `build --json -`: whether the engine is what it should be, not only right."""
    found = json.loads(output)
    return "; ".join(found["not_fused"]) or (None if found["proven"] else "not proven")


def _validate(bundle: str) -> tuple[str, ...]:
    return ("validate", bundle, "--golden", GOLDEN_NAME, "--json", "-")


def compare_all() -> tuple[str, ...]:
    """Every precision beside float32, on both texts: typed on both machines."""
    return _compare("b", *(f"b-{precision}" for precision in PRECISIONS), *_TEXTS)


def _compare(*more: str) -> tuple[str, ...]:
    # Nothing is timed for its figure; a text of one byte is the least that is.
    least = ("--prompts", "1", "--prompt-bytes", "8", "--new-bytes", "1", "--repeat", "1")
    return ("compare", *more, *least, "--json", "-")


def _greedy(golden: Golden, built: bool) -> Check:
    return greedy_check(golden, _GREEDY_BYTES, built=built)


def _passed(output: str) -> str | None:
    report = json.loads(output)["validation"]
    failed = [row["check"] for row in report["rows"] if not row["ok"]]
    return None if report["passed"] else f"failed: {', '.join(failed)}"


def _same_bits(seen: list[float]) -> Check:
    def check(output: str) -> str | None:
        bits = json.loads(output)["total"]["bits_per_byte"]
        seen.append(bits)
        apart = max(seen) - min(seen)
        return None if apart <= _SAME_BITS else f"{bits:.6f} bits per byte, in other chunks {seen[0]:.6f}"

    return check


def _bars(bundles: Path, *, short: bool = False) -> Check:
    """Of `compare --json -`: what each precision may cost, on an engine that was built there.

    short: of a few hundred bytes, to which `validate` holds a bundle as it does here: more bits per byte say
    nothing of so few.
    """

    def check(output: str) -> str | None:
        for bundle in json.loads(output)["bundles"]:
            name, total = bundle["path"], bundle["total"]
            if not bundle["built"]:
                return f"{name} ran on {bundle['engine']}"
            limits = tolerances_of(load_manifest(bundles / name))
            more_bits = bundle["against_first"]["more_bits_per_byte"]
            if short:
                limits = limits.for_short_text()
            found = {
                "more bits per byte": (0.0 if short else more_bits, limits.bits),
                "mean KL": (total["mean_kl_bits"], limits.divergence),
                "false boundaries": (total["false_boundaries"], limits.boundaries),
                "missed boundaries": (total["missed_boundaries"], limits.boundaries),
            }
            for what, (value, most) in found.items():
                if not value <= most + 1e-9:
                    return f"{name}: {what} {value:.5f}, allowed {most:g}"
        return None

    return check


# The server, which is no command that ends.


def serve_one(program: Sequence[str | Path], variables: Mapping[str, str], folder: Path) -> Done:
    """Start it, ask for a completion and a streamed one, end it by SIGTERM."""
    started = time.monotonic()
    command = [*program, "serve", "-m", "b", "--port", "0"]
    fault, exit_code = "", None
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=dict(variables), stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert process.stdout is not None
        # A server that hangs while it loads writes no line and does not end.
        patience = threading.Timer(_SERVER_SECONDS, process.kill)
        patience.start()
        try:
            url = process.stdout.readline().strip()
        finally:
            patience.cancel()
        found = re.fullmatch(r"http://([^:]+):(\d+)", url)
        if found is None:
            fault = f"no address on stdout but {url!r}: {_tail(folder / 'server.log')}"
        else:
            fault = _ask(found[1], int(found[2]))
        process.send_signal(signal.SIGTERM)
        exit_code = process.wait(_SERVER_SECONDS)
    except (OSError, ValueError, LookupError, http.client.HTTPException, subprocess.TimeoutExpired) as error:
        fault = fault or f"{type(error).__name__}: {error}"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
    fault = fault or ("" if exit_code == 0 else f"exit code {exit_code}: {_tail(folder / 'server.log')}")
    traceback = "Traceback (most recent call last)" in (folder / "server.log").read_text(errors="replace")
    took = round(time.monotonic() - started, 1)
    return Done("server", exit_code, took, fault, 0, traceback, not fault and not traceback)


def _ask(host: str, port: int) -> str:
    """What is wrong with the answers, or ""."""
    connection = http.client.HTTPConnection(host, port, timeout=_SERVER_SECONDS)
    texts = []
    for streamed in (False, True):
        body = {"prompt": "The keeper of the", "max_tokens": 12, "temperature": 0, "stream": streamed}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        data = answer.read().decode()
        if answer.status != 200:
            return f"status {answer.status}: {data[:200]}"
        events = [line[6:] for line in data.splitlines() if line.startswith("data: {")]
        documents: list[Any] = [json.loads(event) for event in events] if streamed else [json.loads(data)]
        texts.append("".join(choice["text"] for one in documents for choice in one.get("choices", ())))
    if not texts[0] or texts[0] != texts[1]:
        return f"whole {texts[0]!r}, streamed {texts[1]!r}"
    return ""


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
