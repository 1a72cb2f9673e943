"""`blt-edge doctor`: versions, devices, and which engines really run here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..output import Session, print_fields, print_table, printable, size, status
from .documents import write_json
from .options import STDIN, BundleDirectory, json_option, verb

if TYPE_CHECKING:
    from ..doctor.report import Report

__all__ = ["command"]


@verb("doctor")
@click.option(
    "-m",
    "--model",
    type=BundleDirectory(),
    metavar="BUNDLE",
    show_default="none",
    help="Say, too, what this bundle would run from, and why not from something faster.",
)
@json_option
def command(session: Session, model: Path | None, json_file: Path | None) -> None:
    """Show versions, devices, and which engines really run here.

    Every engine is tried, in a process of its own: what a library was built with says little about what it
    can do here. Nothing is changed. What is missing comes with the commands that install it. The exit code
    is 0 when bundles run on the processor, 1 when not even that.
    """
    from ..doctor.report import examine

    with status(session) as say:
        report = examine(model, progress=say)
    if json_file is not None:
        write_json(json_file, report.to_dict())
    if json_file != STDIN:
        _show(report)
    if not report.cpu_works:
        raise click.ClickException(f"bundles can't run on the processor: {report.state.cpu.error}")


def _show(report: Report) -> None:
    _head("versions")
    print_fields([(name, version or "not installed") for name, version in report.versions.items()])
    _head("machine")
    print_fields(list(_machine(report)))
    _head("engines")
    print_table(("engine", "version", "works", "what happened"), list(_engines(report)))
    if report.bundle is not None:
        _head("bundle")
        print_fields(list(_bundle(report.bundle)))
    if report.advice:
        _head("what is missing, and what to do")
        _show_advice(report)


def _head(text: str) -> None:
    if text != "versions":
        click.echo()
    click.echo(click.style(text, bold=True))


# 1. The machine.


def _machine(report: Report) -> Iterator[tuple[str, str]]:
    processor = report.processor
    features = ", ".join(processor.features) or "no vector instructions that matter here"
    yield "processor", f"{processor.name}, {processor.cores} core{'s' * (processor.cores != 1)}: {features}"
    yield "memory", _memory(report)
    if report.jetson is not None:
        yield from _jetson(report)
    yield "GPU", _gpus(report)


def _memory(report: Report) -> str:
    memory = report.memory
    if memory.total is None:
        return "unknown"
    parts = [f"{size(memory.total)}, of it {size(memory.available or 0)} available"]
    if memory.container_limit is not None and memory.container_limit < memory.total:
        parts.append(f"{size(memory.container_limit)} for this container")
    parts.append(f"{size(memory.swap)} of swap" if memory.swap else "no swap")
    unified = report.jetson is not None or any(gpu.unified_memory for gpu in report.state.gpus)
    return ", ".join(parts) + (", shared with the GPU" if unified else "")


def _jetson(report: Report) -> Iterator[tuple[str, str]]:
    jetson = report.jetson
    assert jetson is not None
    yield "board", jetson.board
    yield "JetPack", f"{jetson.jetpack or 'unknown'} (Jetson Linux {jetson.l4t or 'unknown'})"
    full = {True: " (without limits)", False: " (limited)", None: ""}[jetson.full_power]
    yield "power mode", f"{jetson.power_mode}{full}" if jetson.power_mode else "unknown"
    clocks = [
        f"{clock.name} {clock.highest / 1e6:.0f} MHz, fixed"
        if clock.fixed
        else f"{clock.name} {clock.lowest / 1e6:.0f} to {clock.highest / 1e6:.0f} MHz"
        for clock in jetson.clocks
    ]
    yield "clocks", "; ".join(clocks) or "unknown"


def _gpus(report: Report) -> str:
    driver, state = report.driver, report.state
    version = f"driver {driver.version}" if driver.version else "no driver"
    if state.gpus:
        shown = [
            f"{gpu.name}, compute capability {gpu.compute_capability}, {size(gpu.memory_bytes)}"
            for gpu in state.gpus
        ]
        return f"{'; '.join(shown)} ({version}, CUDA {state.cuda})"
    if driver.cards or driver.version or report.jetson is not None:
        names = ", ".join(driver.models) or "NVIDIA's"
        return f"{names}, not usable ({version}): {state.gpu_error or 'the driver shows none'}"
    return "none of NVIDIA's"


# 2. Engines and bundles.


def _engines(report: Report) -> Iterator[tuple[str, str, str, str]]:
    for engine in report.state.engines:
        name = engine.name + (
            f", {engine.provider.removesuffix('ExecutionProvider')}" if engine.provider else ""
        )
        happened = engine.error or ""
        if engine.works:
            happened = (
                "computed a product itself, and right" if engine.provider else "loads and makes a builder"
            )
            if engine.provider is None and not report.state.gpus:
                happened += "; there is no GPU to run on"
        yield name, engine.version or "", "ok" if engine.works else "no", happened


def _bundle(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "bundle", str(facts["path"])
    if facts.get("error"):
        yield "problem", str(facts["error"])
        return
    yield "precision", ", ".join(f"{stage} {precision}" for stage, precision in facts["stages"].items())
    for form in facts["forms"]:
        if form["fits"]:
            yield form["target"], f"runs from {form['name']}"
        else:
            where = "portable graphs: " if form["target"] == "onnxruntime" else "not: "
            yield form["target"], f"{where}{form['reason']}"


def _show_advice(report: Report) -> None:
    for piece in report.advice:
        click.echo(printable(f"{piece.purpose}: {piece.reason}"))
        for line in piece.commands:
            click.echo(f"    {line}")
