"""`blt-edge inspect`: what is in a bundle, from its manifest; no graph is loaded."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..output import Session, count, print_fields, print_table, printable, progress_bar, size
from .documents import write_json
from .model_options import check_bundle_files
from .options import STDIN, OneOf, bundle_argument, json_option, verb, verify_option

if TYPE_CHECKING:
    from ...export.lint_tensorrt import Finding
    from ...runtime.engines import Engine
    from ...runtime.manifest import EmbeddingSpec, Manifest
    from ...runtime.patching import PatchingRule
    from ..memory import StateMemory

__all__ = ["LINTS", "command"]

LINTS = ("tensorrt-10.3", "tensorrt-11", "tensorrt-rtx")
"""The linter's rule sets; repeated here because asking it would import onnx."""


@verb("inspect")
@bundle_argument
@verify_option
@click.option(
    "--lint",
    type=OneOf(LINTS),
    show_default="no lint",
    metavar="TARGET",
    help=f"List what TARGET would refuse in the graphs: {', '.join(LINTS)}. JetPack 6.2 has tensorrt-10.3.",
)
@json_option
def command(session: Session, bundle: Path, verify: bool, lint: str | None, json_file: Path | None) -> None:
    """Show what is in a bundle and how much memory it takes.

    Source, stages, tables, axes, memory of a text's state, and the last validation. The files are checked
    against the manifest; if they differ, or --lint finds something, the exit code is 1.
    """
    from ...runtime.manifest import load_manifest
    from ..memory import state_memory

    manifest = load_manifest(bundle)
    fault = _fault(bundle, manifest, verify, session)
    state = state_memory(manifest)
    # A form lies inside the bundle: with links in there, nothing is looked at.
    engine = _engine(session, bundle, manifest, verify) if fault is None else None
    findings = _findings(bundle, manifest, lint) if lint is not None and fault is None else None
    if json_file is not None:
        document = _document(bundle, manifest, state, engine, verify, fault)
        if lint is not None:
            document["lint"] = {"target": lint, "findings": findings and list(map(asdict, findings))}
        write_json(json_file, document)
    if json_file != STDIN:
        _show(bundle, manifest, state, engine, verify, fault)
        if lint is not None and findings is not None:
            _show_findings(lint, findings)
    if fault is not None:
        raise click.ClickException(fault)
    if findings:
        stages = ", ".join(dict.fromkeys(finding.stage for finding in findings))
        raise click.ClickException(f"{_title(str(lint))} would refuse {bundle}: {stages}")


def _findings(bundle: Path, manifest: Manifest, lint: str) -> list[Finding]:
    from ...export.lint_tensorrt import lint_bundle

    return lint_bundle(bundle, manifest, lint)


def _title(lint: str) -> str:
    from ...export.lint_tensorrt import RULES

    return RULES[lint].title


def _without_node(finding: Finding) -> tuple[str, str, str, str]:
    return finding.stage, finding.operator, finding.reason, finding.remedy


def _show_findings(lint: str, findings: list[Finding]) -> None:
    """Findings that differ in their node only are one."""
    click.echo()
    if not findings:
        click.echo(f"{_title(lint)} would refuse nothing that can be seen in the graphs")
        return
    click.echo(f"{_title(lint)} would refuse")
    alike = Counter(map(_without_node, findings))
    first = {_without_node(finding): finding.node for finding in reversed(findings)}
    for group, times in alike.items():
        stage, operator, reason, remedy = map(printable, group)
        what = f"{times} x {operator}, first {first[group]}" if operator else first[group]
        click.echo(f"  {stage}: {printable(what)}")
        click.echo(f"    {reason}; {remedy}")


def _fault(bundle: Path, manifest: Manifest, verify: bool, session: Session) -> str | None:
    from ...runtime.errors import BundleError

    try:
        check_bundle_files(session, bundle, manifest, verify)
    except BundleError as error:
        return str(error)
    return None


def _engine(session: Session, bundle: Path, manifest: Manifest, verify: bool) -> Engine:
    from ...runtime.engines import find_engine

    if not verify:
        return find_engine(bundle, manifest)
    with progress_bar(session) as progress:
        return find_engine(bundle, manifest, full=True, progress=partial(progress, "checking the form"))


def _document(
    bundle: Path,
    manifest: Manifest,
    state: StateMemory,
    engine: Engine | None,
    verify: bool,
    fault: str | None,
) -> dict[str, Any]:
    return {
        "bundle": str(bundle),
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "check": {"whole_files": verify, "fault": fault},
        "engine": engine and {"name": engine.name, "reason": engine.reason},
        "state_memory": {**asdict(state), "at_full_length": state.at_full_length},
        "manifest": manifest.to_dict(),
    }


def _show(
    bundle: Path,
    manifest: Manifest,
    state: StateMemory,
    engine: Engine | None,
    verify: bool,
    fault: str | None,
) -> None:
    total = sum(record.bytes for record in manifest.files.values())
    checked = "whole files" if verify else "fast check; --verify reads whole files"
    source, model = manifest.source, manifest.model
    print_fields(
        [
            ("bundle", f"{bundle}, written by blt-edge {manifest.generator}"),
            ("source", f"{source.name} ({source.layout} layout), sha256 {source.sha256[:16]}"),
            (
                "files",
                f"{len(manifest.files)}, {size(total)}: " + ("DAMAGED" if fault else f"ok ({checked})"),
            ),
            (
                "model",
                f"width {model.width}, {model.cross_attn_k} vectors a patch, vocabulary {model.vocab_size}",
            ),
            ("tables", _tables(manifest.embedding)),
            ("patches", _rule(manifest.patching)),
            ("positions", f"{model.max_positions:,}, trained on {model.trained_context:,}"),
            ("validation", _validation(manifest.validation)),
            ("engine", "not looked for, the bundle is damaged" if engine is None else str(engine)),
        ]
    )
    for table in (_stages, _axes):
        click.echo()
        table(manifest)
    click.echo()
    print_fields(_memory(state))


def _rule(rule: PatchingRule) -> str:
    text = {
        "entropy": f"start where the entropy is over {rule.threshold or 0.0:.6g} nats",
        "space": "start after spaces and punctuation",
        "static": f"have {rule.patch_size} bytes",
        "byte": "are single bytes",
    }[rule.mode]
    if rule.mode == "entropy" and rule.monotonic:
        text = f"start where the entropy rises by over {rule.threshold or 0.0:.6g} nats"
    elif rule.mode == "entropy" and rule.threshold_add is not None:
        text += f" and rises by over {rule.threshold_add:.6g}"
    return text + (f", and have at most {rule.max_patch_length} bytes" if rule.max_patch_length else "")


def _validation(report: dict[str, Any] | None) -> str:
    if report is None:
        return "none; blt-edge validate compares the bundle with its reference"
    rows = report.get("rows")
    rows = rows if isinstance(rows, list) else []
    failed = [str(row.get("check")) for row in rows if isinstance(row, dict) and not row.get("ok")]
    what = f"{len(rows)} checks against {report.get('against')}, {report.get('data_bytes')} bytes of text"
    return f"FAILED ({', '.join(failed)}), {what}" if not report.get("passed") else f"passed, {what}"


def _stages(manifest: Manifest) -> None:
    rows = [
        (
            name,
            spec.precision,
            str(spec.layers),
            f"{spec.kv_heads} x {spec.head_dim}",
            "all" if spec.window is None else str(spec.window),
            count(spec.parameters),
            size(manifest.files[spec.file].bytes + manifest.files[spec.data].bytes),
            spec.file,
        )
        for name, spec in manifest.stages.items()
    ]
    table = manifest.embedding
    parameters = count(table.rows * table.width)
    rows.append(("tables", table.precision, "", "", "", parameters, size(table.bytes), table.file))
    columns = ("stage", "precision", ">layers", ">kv heads", ">window", ">parameters", ">size", "file")
    print_table(columns, rows, total=True)


def _tables(table: EmbeddingSpec) -> str:
    rows = f"{table.rows:,} rows of {table.width}: {table.byte_rows} bytes"
    if table.hash.tables:
        groups = ", ".join(map(str, table.group_sizes))
        rows += f", {table.hash.tables} x {table.hash_vocab:,} hashes of {groups} bytes"
    read = size((table.hash.tables + 1) * table.bytes // table.rows)
    return f"{rows}; memory-mapped, a byte of text reads {read}"


def _axes(manifest: Manifest) -> None:
    rows = [
        (name, *(f"{value:,}" for value in asdict(axis).values())) for name, axis in manifest.axes.items()
    ]
    print_table(("axis", ">min", ">opt", ">max"), rows)


def _memory(state: StateMemory) -> list[tuple[str, str]]:
    patch = f"{state.bytes_per_patch:g} byte{'s' * (state.bytes_per_patch != 1)}"
    return [
        (
            "state memory",
            f"{size(state.per_byte)} a byte within the windows, {size(state.per_patch)} a patch",
        ),
        (
            "at full length",
            f"about {size(state.at_full_length)} for {state.positions:,} positions, at {patch} a patch",
        ),
        (
            "open patch",
            f"up to {size(state.open_patch)} more, if one patch had {state.longest_patch:,} bytes",
        ),
    ]
