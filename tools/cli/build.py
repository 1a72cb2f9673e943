"""`blt-edge build`: a bundle's engine for this device: ONNX Runtime's own graphs, or TensorRT's plans."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from ...runtime.host import available_memory
from ...runtime.names import CACHES
from ..output import Messages, counted, echo, is_terminal, listed, printable, progress_bar, size, status
from ..tables import print_table
from .documents import write_json
from .engine_lines import caches_line, packed_line, prefill_line
from .options import (
    STDIN,
    MemorySize,
    OneOf,
    Rows,
    StageNames,
    bundle_argument,
    json_option,
    option,
    options,
    verb,
)

if TYPE_CHECKING:
    from ...export.build_tensorrt import BuildPlan, Part, TensorRtBuild, TensorRtOptions
    from ...export.tensorrt_worker import Moment
    from ...runtime.manifest import Axis

TARGETS = ("onnxruntime", "tensorrt", "tensorrt-rtx")

_tensorrt_options = options(
    option(
        "--compute-capability",
        type=str,
        multiple=True,
        metavar="X.Y",
        shown="this machine's GPU",
        help="TensorRT-RTX: build for a GPU that need not be here, such as 8.6; repeat it for several.",
    ),
    option("--max-bytes", type=int, shown="all the model has", help="TensorRT: longest text."),
    option(
        "--max-patches",
        type=int,
        shown="all the model was made for",
        help="TensorRT: most patches of a text; fewer take less GPU memory.",
    ),
    option(
        "--max-patch-length",
        type=int,
        shown="the patching rule's, else 512",
        help="TensorRT: longest patch in bytes.",
    ),
    option("--max-batch", type=int, shown="1", help="TensorRT: texts at a time."),
    option("--prefill-chunk", type=int, shown="256", help="TensorRT: bytes that one pass takes at most."),
    option(
        "--workspace",
        type=MemorySize(),
        metavar="SIZE",
        shown="no limit",
        help="TensorRT: GPU memory that a layer may use to work in, such as 512MB.",
    ),
    option(
        "--optimization-level", type=int, shown="TensorRT's own", help="TensorRT: how hard it tries, 0 to 5."
    ),
    title="TensorRT",
)
"""What TensorRT's engines are built for, by the fields of `TensorRtOptions`; None is the default there."""


@verb("build", "demo-bundle", "demo-bundle --target tensorrt-rtx --compute-capability 8.6")
@bundle_argument
@option("--target", type=OneOf(TARGETS), default="onnxruntime", help="Engine to prepare the graphs for.")
@option(
    "--rows",
    type=Rows(),
    metavar="N,N,...",
    shown="2,4,8; TensorRT: none",
    help="For how many texts at once the engine gets packed graphs, each 2 to 64, or none. onnxruntime's "
    "share its weights and take kilobytes; TensorRT's are plans, which hold the weights once more each, on "
    "disk and on the GPU, and take minutes to build.",
)
@option(
    "--cache-precision",
    type=OneOf(CACHES),
    shown="as the engine has them; a new one: float32",
    help="onnxruntime: what keys and values are kept as while a text goes on. int8 reads a quarter of the "
    "bytes at each step, and a text takes less memory; results are rounded further, by scales that are "
    "measured on texts now: a bundle of float32 weights no longer passes validate. Prompts are read in "
    "float32.",
)
@option(
    "--int8-prefill",
    type=StageNames(),
    metavar="STAGE,STAGE,...",
    shown="as the engine has them; a new one: none",
    help="onnxruntime: stages in int4 or int8w that read prompts in products of 8-bit integers, in passes of "
    "34 positions and more; latent,decoder round hardly more for it. A byte more of disk for each weight. "
    "With all, the patcher's rounding moves patch boundaries, and bundles may no longer pass validate.",
)
@option("--force", help="Build again what is there already.")
@option(
    "--prune",
    help="Afterwards remove this target's engines that nothing can use, or that this machine had before; "
    "portable graphs and other machines' engines stay.",
)
@option("--dry-run", help="Print what would be written and needed, and write nothing.")
@_tensorrt_options
@json_option
def command(
    messages: Messages,
    bundle: Path,
    target: str,
    rows: tuple[int, ...] | None,
    cache_precision: str | None,
    int8_prefill: tuple[str, ...] | None,
    force: bool,
    prune: bool,
    dry_run: bool,
    json_file: Path | None,
    **tensorrt: Any,
) -> None:
    """Prepare a bundle for a device: runs and loads faster, takes less memory.

    Writes BUNDLE/engines/TARGET-FINGERPRINT. For onnxruntime: the stages optimized, attention fused, weights
    as this processor's kernels want them, and packed graphs that take several texts at once. It is used from
    then on, on machines like this one with the same version of ONNX Runtime; elsewhere the portable graphs
    are, with the same results.

    For tensorrt and tensorrt-rtx: a plan for each stage, with a profile for prompts and one for decoding, and
    with --rows 2,4 further ones that take a few new bytes of 2 or 4 texts in one pass.
    They run on GPUs of the compute capability and with the version that they were built for. tensorrt builds
    on the device itself; tensorrt-rtx also where there is no GPU. Building takes minutes and 3 to 5 times the
    largest stage's weights in memory.

    Before the engine is published its stages run beside the portable graphs; one that computes something else
    is not kept. The engine appears whole or not at all. stdout carries its path.
    """
    given = {name: value for name, value in tensorrt.items() if value not in (None, ())}
    if target == "onnxruntime" and given:
        flag = "--" + next(iter(given)).replace("_", "-")
        raise click.UsageError(f"{flag} is for --target tensorrt and tensorrt-rtx; leave it out")
    for flag, value in (("--cache-precision", cache_precision), ("--int8-prefill", int8_prefill)):
        if target != "onnxruntime" and value is not None:
            raise click.UsageError(f"{flag} is for --target onnxruntime; leave it out")
    if dry_run and json_file is not None:
        raise click.UsageError("--json is for what was built; leave it or --dry-run out")
    options = None
    if target != "onnxruntime":
        from ...export.build_tensorrt import TensorRtOptions

        options = TensorRtOptions(target=target, rows=rows, **given)
    if dry_run:
        if options:
            engine, line = _plan_tensorrt(messages, bundle, options, force)
        else:
            engine, line = _plan_onnxruntime(bundle, int8_prefill)
        echo(f"{line}; {size(shutil.disk_usage(bundle).free)} of disk are free")
        if engine.is_dir():
            _tidy(messages, bundle, engine, prune=False)
        return
    if options:
        engine = _build_tensorrt(messages, bundle, options, force)
    else:
        engine = _build_onnxruntime(messages, bundle, rows, cache_precision, int8_prefill, force)
    _tidy(messages, bundle, engine, prune)
    slower = _spelled_out(bundle) if target == "onnxruntime" else ()
    for what in slower:
        messages.note(f"warning: not fused: {what}; results are right, steps slower")
    if json_file is not None:
        write_json(json_file, {**_document(engine, target), "not_fused": list(slower)})
    if json_file != STDIN:
        echo(str(engine))


def _tidy(messages: Messages, bundle: Path, engine: Path, prune: bool) -> None:
    """Say what other engines there are, and what all takes on disk; remove the unnecessary if asked to."""
    from ...export import prune as pruning
    from ...runtime.files import bytes_on_disk

    others = pruning.other_engines(bundle, engine)
    if prune:
        pruning.prune(others)
        if not any(other.unnecessary for other in others):
            messages.say("--prune: there is nothing to remove")
    for other in others:
        state = "unnecessary; --prune removes it" if other.unnecessary else "kept"
        state = "removed" if other.unnecessary and prune else state
        messages.say(printable(f"{other.path.name}, {size(other.bytes)}: {state}: {other.why}"))
    total, built = bytes_on_disk(bundle), bytes_on_disk(bundle / "engines")
    portable = size(total - built)
    messages.say(f"{bundle} takes {size(total)} on disk: {portable} portable, {size(built)} engines")


def _spelled_out(bundle: Path) -> tuple[str, ...]:
    from ...export.build_ort import spelled_out
    from ...runtime.manifest import load_manifest

    return spelled_out(load_manifest(bundle))


def _document(engine: Path, target: str) -> dict[str, Any]:
    from ...runtime.engines import ENGINE_NAME, caches_of, prefill_of, read_description, rows_of, was_proven

    files = {path.name: path.stat().st_size for path in sorted(engine.iterdir()) if path.name != ENGINE_NAME}
    return {
        "form": str(engine),  # the name that documents have had from the first
        "target": target,
        "bytes": sum(files.values()),
        "proven": was_proven(engine),
        "rows": list(rows_of(engine)),
        "caches": caches_of(engine),
        "int8_prefill": list(prefill_of(engine)),
        "files": files,
        "built_for": read_description(engine),
    }


def _would_write(engine: Path, needed: str) -> str:
    there = " again, with --force (it is there already)" if engine.is_dir() else ""
    return f"would write {engine}{there}: {needed}"


def _plan_onnxruntime(bundle: Path, int8_prefill: tuple[str, ...] | None) -> tuple[Path, str]:
    """Print what building would do; returns the engine's directory, and a line about what it would write."""
    from ...export.build_ort import engine_bytes
    from ...export.operators import check_version
    from ...export.prefill import check_prefill, prefill_bytes
    from ...runtime.engines import describe_engine, engine_path, prefill_of
    from ...runtime.manifest import load_manifest

    check_version("building an engine")
    manifest = load_manifest(bundle)
    rows = [
        (f"{stage} graph", "+".join(manifest.precisions_of(stage)), size(manifest.stage_bytes(stage)))
        for stage in manifest.stages
    ]
    print_table(("part", "precision", ">portable"), rows, sys.stdout)
    engine = engine_path(bundle, describe_engine(manifest))
    line = _would_write(engine, f"at most {size(engine_bytes(manifest))}")
    stages = check_prefill(manifest, int8_prefill or ())
    if missing := [stage for stage in stages if stage not in prefill_of(engine)]:
        added = f"{size(prefill_bytes(manifest, missing))} for int8 prefill of {listed(missing)}"
        line = f"would add {added} to {engine}" if engine.is_dir() else f"{line}, and {added}"
    return engine, line


def _build_onnxruntime(
    messages: Messages,
    bundle: Path,
    rows: tuple[int, ...] | None,
    caches: str | None,
    int8_prefill: tuple[str, ...] | None,
    force: bool,
) -> Path:
    from ...export.build_ort import DEFAULT_ROWS, build_engine
    from ...runtime.engines import data_file, find_engine, graph_file
    from ...runtime.manifest import load_manifest

    manifest = load_manifest(bundle)
    before = None if force else find_engine(bundle, manifest)
    wanted = DEFAULT_ROWS if rows is None else rows
    refused: list[str] = []
    with progress_bar(messages) as progress:
        engine = build_engine(
            bundle,
            rows=wanted,
            caches=caches,
            int8_prefill=int8_prefill,
            force=force,
            progress=progress,
            warn=refused.append,
        )
    for line in refused:
        messages.note(f"warning: {line}")
    directory = engine.directory
    assert directory is not None
    if before is not None and before.directory is not None:
        messages.say("it is there already, and sound; --force builds it again")
        if engine.rows != before.rows:
            messages.say(packed_line(engine, manifest))
        if engine.caches != before.caches:
            messages.say(caches_line(engine, manifest))
        if engine.int8_prefill != before.int8_prefill:
            messages.say(prefill_line(engine))
        return directory
    messages.say(packed_line(engine, manifest))
    if engine.caches != "float32":
        messages.say(caches_line(engine, manifest))
    if engine.int8_prefill:
        messages.say(prefill_line(engine))
    if engine.threads is not None:
        messages.say(f"fastest here with {counted(engine.threads, 'thread')}, which is now the default")
    if not messages.quiet and sys.stderr is not None:
        table = []
        for stage in manifest.stages:
            own = sum((directory / file(stage)).stat().st_size for file in (graph_file, data_file))
            words = "+".join(manifest.precisions_of(stage))
            table.append((f"{stage} graph", words, size(manifest.stage_bytes(stage)), size(own)))
        print_table(("part", "precision", ">portable", ">this engine"), table, sys.stderr)
    return directory


def _plan_tensorrt(
    messages: Messages, bundle: Path, options: TensorRtOptions, force: bool
) -> tuple[Path, str]:
    """Print what building would do; returns the engine's directory, and a line about what it would write."""
    from ...export.build_tensorrt import plan_tensorrt

    plan = plan_tensorrt(bundle, options)
    _warn_of_refusals(messages, bundle, plan)
    added = plan.missing if plan.there and not force else ()
    _show_estimate(plan, added or plan.parts, sys.stdout)
    rows = [
        (stage, name, _range(axis), _range(decode[name]))
        for stage, (prefill, decode) in plan.profiles.stages.items()
        for name, axis in prefill.items()
    ]
    print_table(("part", "axis", "prefill", "decode"), rows, sys.stdout)
    if plan.rows:
        echo(_packed_plans(plan))
    if plan.timing_cache is not None:
        echo(f"what it learns about kernels would be kept in {plan.timing_cache}")
    if not added:
        return plan.directory, _would_write(plan.directory, f"about {size(plan.plan_bytes)}")
    texts = listed(sorted({part.rows for part in added}))
    needed = size(sum(plan.parts[part].plan for part in added))
    return plan.directory, f"would add plans for {texts} texts at once to {plan.directory}: about {needed}"


def _range(axis: Axis) -> str:
    return str(axis.min) if axis.min == axis.max else f"{axis.min} to {axis.max}, tuned for {axis.opt}"


def _build_tensorrt(messages: Messages, bundle: Path, options: TensorRtOptions, force: bool) -> Path:
    from ...export.build_tensorrt import build_engines, plan_tensorrt
    from ...runtime.engines import rows_of

    plan = plan_tensorrt(bundle, options)
    shown = not messages.quiet and sys.stderr is not None
    before = rows_of(plan.directory) if plan.there else ()
    parts = tuple(plan.parts) if force else plan.missing
    if parts:
        _warn_of_refusals(messages, bundle, plan)
        if shown:
            _show_estimate(plan, parts, sys.stderr)
    terminal = is_terminal(sys.stderr)
    with status(messages) as say:

        def watch(part: Part, moment: Moment | None) -> None:
            line = str(part)
            if moment is not None:
                if not terminal:  # a log has no use for a line each moment
                    return
                memory = "" if moment.memory is None else f", {size(moment.memory)}"
                step = f" {moment.done}/{moment.steps}" if moment.steps > 1 else ""
                what = moment.phase[:1].lower() + moment.phase[1:]
                line += f" ({plan.parts[part].precision}), {moment.seconds:.0f} s{memory}: {what}{step}"
            say(line)

        result = build_engines(bundle, options, force=force, watch=watch)
    if shown and result.facts:
        _show_result(plan, result, sys.stderr)
        if not result.proven:
            capabilities = " or ".join(plan.capabilities)
            messages.say(
                f"not run yet: this machine has no GPU of compute capability {capabilities}; where they are "
                "loaded, they are compared with what the portable graphs gave here"
            )
    elif shown and plan.rows != before:
        gone = [count for count in before if count not in plan.rows]
        messages.say(f"removed the plans for {listed(gone)} texts at once")
    elif shown:
        messages.say("they are there already, and sound; --force builds them again")
    return plan.directory


def _packed_plans(plan: BuildPlan) -> str:
    """A line about the plans for several texts."""
    most = [plan.profiles.packed_positions(stage) for stage in ("decoder", "latent")]
    return (
        f"for {listed(plan.rows)} texts at once: up to {most[0]} new bytes and {most[1]} closed patches of "
        "each; longer pieces of a prompt run alone"
    )


def _warn_of_refusals(messages: Messages, bundle: Path, plan: BuildPlan) -> None:
    """Say what an old TensorRT refuses as far as is known; whether it does, only building shows."""
    from ...export.lint_tensorrt import lint_bundle, rules_of_old
    from ...graphs.precision import format_precision
    from ...runtime.manifest import load_manifest

    rules = None if plan.trt.ahead_of_time else rules_of_old(plan.trt.version)
    findings = [] if rules is None else lint_bundle(bundle, load_manifest(bundle), rules)
    if not findings:
        return
    stages = list(dict.fromkeys(finding.stage for finding in findings))
    mix = {
        part.stage: "fp16" if part.stage in stages else each.precision
        for part, each in plan.parts.items()
        if part.rows == 1
    }
    line = (
        f"warning: {plan.trt.name} {plan.trt.version} will probably refuse {' and '.join(stages)}: "
        f"{findings[0].reason} ({findings[0].node}{'' if len(findings) == 1 else ' and others'}); "
        f"export or quantize with --precision {format_precision(mix)}"
    )
    messages.note(line)


def _show_estimate(plan: BuildPlan, parts: Iterable[Part], file: IO[str]) -> None:
    echo(f"{plan.trt.name} {plan.trt.version}, compute capability {' and '.join(plan.capabilities)}", file)
    found = {part: plan.parts[part] for part in parts}
    rows = [
        (str(part), each.precision, size(each.weights), size(each.plan), size(each.peak_memory))
        for part, each in found.items()
    ]
    weights = sum(plan.parts[part].weights for part in plan.parts if part.rows == 1)
    plans = sum(each.plan for each in found.values())
    most = max(each.peak_memory for each in found.values())
    rows.append(("engines", "", size(weights), size(plans), size(most)))
    print_table(
        ("part", "precision", ">weights", ">engine, about", ">memory to build, about"), rows, file, total=True
    )
    available = available_memory()
    if available is not None and available < most:
        echo(
            f"only {size(available)} of memory are available: building may fail; close other programs, or "
            "add swap space",
            file,
        )


def _show_result(plan: BuildPlan, result: TensorRtBuild, file: IO[str]) -> None:
    parts = [(str(part), plan.parts[part].precision, [facts]) for part, facts in result.facts.items()]
    parts.append(("engines", "", list(result.facts.values())))
    rows = [
        (
            part,
            precision,
            size(sum(one.bytes for one in facts)),
            f"{sum(one.seconds for one in facts):.1f} s",
            _most(one.peak_memory for one in facts),
            _most(one.activations for one in facts),
        )
        for part, precision, facts in parts
    ]
    columns = ("part", "precision", ">engine", ">time", ">memory to build", ">GPU memory to work in")
    print_table(columns, rows, file, total=True)
    limits = plan.profiles.limits
    echo(
        f"for texts of up to {limits.max_bytes} bytes and {limits.max_patches} patches, patches of up to "
        f"{limits.max_patch_length} bytes, {limits.prefill_chunk} bytes a pass",
        file,
    )
    if plan.rows:
        echo(_packed_plans(plan), file)


def _most(amounts: Iterable[int | None]) -> str:
    return size(max((amount for amount in amounts if amount is not None), default=None))
