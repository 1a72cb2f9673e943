"""`blt-edge doctor`: versions, devices, and which engines really run here."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..output import PROSE_WIDTH, Messages, counted, echo, is_terminal, printable, size, status
from ..tables import print_fields, print_table
from .documents import write_json
from .options import STDIN, BundleDirectory, json_option, verb

if TYPE_CHECKING:
    from ..doctor.report import MachineReport


@verb("doctor", "", "-m demo-bundle --json doctor.json")
@click.option(
    "-m",
    "--model",
    type=BundleDirectory(),
    metavar="BUNDLE",
    show_default="none",
    help="Say, too, what this bundle would run from, and why not from something faster.",
)
@json_option
def command(messages: Messages, model: Path | None, json_file: Path | None) -> None:
    """Show versions, devices, and which engines really run here.

    Every engine is tried, in a process of its own: what a library was built with says little about what it
    can do here. Nothing is changed. What is missing comes with the commands that install it. The exit code
    is 0 when bundles run on the processor, 1 when not even that.
    """
    from ..doctor.report import examine

    with status(messages) as say:
        report = examine(model, progress=say)
    write_json(json_file, report.to_dict())
    if json_file != STDIN:
        _show(report)
    if not report.cpu_works:
        raise click.ClickException(f"bundles can't run on the processor: {report.software.cpu.error}")


def _show(report: MachineReport) -> None:
    click.secho("versions", bold=True)
    print_fields([(name, version or "not installed") for name, version in report.versions.items()])
    click.secho("\nmachine", bold=True)
    print_fields(list(_machine(report)), prose=True)
    click.secho("\nengines", bold=True)
    rows = []
    for engine in report.software.engines:
        name, happened = engine.name, "loads and makes a builder"
        if engine.provider:
            name = f"{name}, {engine.provider.removesuffix('ExecutionProvider')}"
            happened = "computed a product itself, and right"
        elif not report.software.gpus:
            happened += "; there is no GPU to run on"
        works = "ok" if engine.works else "no"
        rows.append((name, engine.version or "", works, happened if engine.works else engine.error or ""))
    print_table(("engine", "version", "works", "what happened"), rows, prose=True)
    if report.bundle is not None:
        click.secho("\nbundle", bold=True)
        print_fields(list(_bundle(report.bundle)), prose=True)
    if report.advice:
        click.secho("\nwhat is missing, and what to do", bold=True)
    width = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else PROSE_WIDTH
    for piece in report.advice:
        told = printable(f"{piece.purpose}: {piece.reason}")
        echo(textwrap.fill(told, width, subsequent_indent="  ", break_long_words=False))
        for line in piece.commands:
            echo(f"    {line}")


def _machine(report: MachineReport) -> Iterator[tuple[str, str]]:
    processor, jetson = report.processor, report.jetson
    features = ", ".join(processor.features) or "no vector instructions that matter here"
    yield "processor", f"{processor.name}, {counted(processor.cores, 'core')}: {features}"
    yield "memory", _memory(report)
    if jetson is not None:
        yield "board", jetson.board
        yield "JetPack", f"{jetson.jetpack or 'unknown'} (Jetson Linux {jetson.l4t or 'unknown'})"
        full = {True: " (without limits)", False: " (limited)", None: ""}[jetson.full_power]
        yield "power mode", f"{jetson.power_mode}{full}" if jetson.power_mode else "unknown"
        yield "clocks", "; ".join(f"{name} {clock}" for name, clock in jetson.clocks.items()) or "unknown"
    yield "GPU", _gpus(report)
    yield "telemetry", f"of ONNX Runtime: {report.telemetry}"


def _memory(report: MachineReport) -> str:
    memory = report.memory
    if memory.total is None:
        return "unknown"
    parts = [f"{size(memory.total)}, of it {size(memory.available or 0)} available"]
    if memory.container_limit is not None and memory.container_limit < memory.total:
        parts.append(f"{size(memory.container_limit)} for this container")
    parts.append(f"{size(memory.swap)} of swap" if memory.swap else "no swap")
    if report.jetson is not None or any(gpu.unified_memory for gpu in report.software.gpus):
        parts.append("shared with the GPU")
    return ", ".join(parts)


def _gpus(report: MachineReport) -> str:
    driver, software = report.driver, report.software
    version = f"driver {driver.version}" if driver.version else "no driver"
    if software.gpus:
        shown = [
            f"{gpu.name}, compute capability {gpu.compute_capability}, {size(gpu.memory_bytes)}"
            for gpu in software.gpus
        ]
        return f"{'; '.join(shown)} ({version}, CUDA {software.cuda})"
    if driver.cards or driver.version or report.jetson is not None:
        names = ", ".join(driver.models) or "NVIDIA's"
        return f"{names}, not usable ({version}): {software.gpu_error or 'the driver shows none'}"
    return "none of NVIDIA's"


def _bundle(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "bundle", str(facts["path"])
    if facts.get("error"):
        yield "problem", str(facts["error"])
        return
    yield "precision", ", ".join(f"{stage} {precision}" for stage, precision in facts["stages"].items())
    for engine in facts["forms"]:
        target = engine["target"]
        where = "portable graphs: " if target == "onnxruntime" else "not: "
        yield target, f"runs from {engine['name']}" if engine["fits"] else f"{where}{engine['reason']}"
