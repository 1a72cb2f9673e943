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
    from ..doctor.raspberry_pi import RaspberryPi
    from ..doctor.report import MachineReport
    from ..doctor.storage import Storage


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
    if report.processor.features:
        click.secho("\nprocessor features", bold=True)
        features = [
            (f"{one.name} ({one.flag})", "yes" if one.present else "no", one.purpose)
            for one in report.processor.features
        ]
        print_table(("feature", "here", "for"), features)
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
        print_fields(list(_bundle(report.bundle, report.storage)), prose=True)
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
    yield "processor", f"{processor.name}, {counted(processor.cores, 'core')}"
    yield "memory", _memory(report)
    if jetson is not None:
        yield "board", jetson.board
        yield "JetPack", f"{jetson.jetpack or 'unknown'} (Jetson Linux {jetson.l4t or 'unknown'})"
        full = {True: " (without limits)", False: " (limited)", None: ""}[jetson.full_power]
        yield "power mode", f"{jetson.power_mode}{full}" if jetson.power_mode else "unknown"
        yield "clocks", "; ".join(f"{name} {clock}" for name, clock in jetson.clocks.items()) or "unknown"
    if report.raspberry_pi is not None:
        yield from _raspberry_pi(report.raspberry_pi)
    yield "GPU", _gpus(report)
    yield "telemetry", f"of ONNX Runtime: {report.telemetry}"


def _raspberry_pi(board: RaspberryPi) -> Iterator[tuple[str, str]]:
    yield "board", board.board
    held, heat = board.throttling, board.temperature_celsius
    state = [] if heat is None else [f"{heat:.1f} °C"]
    if held is None:
        state.append("vcgencmd does not say whether it is held back")
    else:
        state.append(f"now: {', '.join(held.now)}" if held.now else "not held back")
        if held.since_start:
            state.append(f"since the start: {', '.join(held.since_start)}")
    yield "state", "; ".join(state)
    fan = board.fan_levels
    yield "fan", "none that the system drives" if fan is None else f"level {fan[0]} of {fan[1]}"
    bits = f"{board.userland_bits}-bit programs" if board.userland_bits else "programs of unknown width"
    pages = f"pages of {board.page_bytes // 1024} KB" if board.page_bytes else "pages of unknown size"
    yield "system", f"governor {board.governor or 'unknown'}, {bits}, {pages}"


def _memory(report: MachineReport) -> str:
    memory = report.memory
    if memory.total is None:
        return "unknown"
    parts = [f"{size(memory.total)}, of it {size(memory.available or 0)} available"]
    if memory.container_limit is not None and memory.container_limit < memory.total:
        parts.append(f"{size(memory.container_limit)} for this container")
    compressed = sum(space.bytes for space in memory.swap_spaces if space.compressed)
    inside = f" ({size(compressed)} of it in compressed memory)" if compressed else ""
    parts.append(f"{size(memory.swap)} of swap{inside}" if memory.swap else "no swap")
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


def _bundle(facts: dict[str, Any], storage: Storage | None) -> Iterator[tuple[str, str]]:
    yield "bundle", str(facts["path"])
    if storage is not None:
        device = f" ({storage.device})" if storage.device else ""
        yield "storage", f"{storage.kind}{device}, {storage.filesystem} at {storage.mount}"
    if facts.get("error"):
        yield "problem", str(facts["error"])
        return
    yield "precision", ", ".join(f"{stage} {precision}" for stage, precision in facts["stages"].items())
    for engine in facts["forms"]:
        target = engine["target"]
        where = "portable graphs: " if target == "onnxruntime" else "not: "
        yield target, f"runs from {engine['name']}" if engine["fits"] else f"{where}{engine['reason']}"
