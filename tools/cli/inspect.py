"""`blt-edge inspect`: what is in a bundle, from its manifest, or in a saved state; no graph is loaded."""

from __future__ import annotations

import base64
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...runtime.errors import BundleError
from ...runtime.names import CHAT_TEMPLATE_NAME
from ..output import Messages, count, counted, echo, escaped, listed, printable, progress_bar, size
from ..tables import print_fields, print_table
from .documents import blocks_told, mix_told, write_json
from .model_options import check_bundle_files
from .options import STDIN, BundleDirectory, OneOf, json_option, option, verb, verify_option
from .verbs import DemoBundle

if TYPE_CHECKING:
    from ...export.lint_tensorrt import Finding
    from ...runtime.embedding_spec import EmbeddingSpec
    from ...runtime.engines import Engine
    from ...runtime.generation_spec import GenerationSpec
    from ...runtime.manifest import Manifest
    from ...runtime.patching import PatchingRule
    from ...runtime.quantization_spec import QuantizationSpec
    from ...runtime.validation import ValidationRecord
    from ..memory import StateMemory

LINTS = ("tensorrt-10.3", "tensorrt-11", "tensorrt-rtx")
"""The linter's rule sets; repeated here because asking it would import onnx."""


class BundleOrState(BundleDirectory):
    """A bundle's directory, or whatever else is there: then what reads states says what is wrong with it."""

    offered = "file"

    def read(self, text: str) -> Path | DemoBundle:
        path = Path(text)
        return path if os.path.lexists(path) and not path.is_dir() else super().read(text)


@verb("inspect", "demo-bundle", "demo-bundle --verify --json -")
@click.argument("bundle", type=BundleOrState(), metavar="BUNDLE|STATE")
@verify_option
@option(
    "--lint",
    type=OneOf(LINTS),
    shown="no lint",
    metavar="TARGET",
    help=f"List what TARGET would refuse in the graphs: {', '.join(LINTS)}. JetPack 6.2 has tensorrt-10.3.",
)
@json_option
def command(messages: Messages, bundle: Path, verify: bool, lint: str | None, json_file: Path | None) -> None:
    """Show what is in a bundle and how much memory it takes, or what a saved state is.

    Of a bundle: source, stages, tables, axes, memory of a text's state, and the last validation on each kind
    of processor. The files are checked against the manifest; if they differ, or --lint finds something, the
    exit code is 1. Of a state, a file that chat's /save or generate --prompt-cache wrote: which bundle it
    fits, its text, and the engine that it is from.
    """
    if not bundle.is_dir():
        if lint is not None:
            raise click.UsageError("--lint is of a bundle's graphs; a state has none")
        _inspect_state(bundle, verify, json_file)
        return
    from ...runtime.manifest import load_manifest
    from ..memory import state_memory

    manifest = load_manifest(bundle)
    fault = engine = findings = None
    try:
        check_bundle_files(messages, bundle, manifest, verify)
    except BundleError as error:
        # Engines lie inside the bundle: with links in there, nothing is looked at.
        fault = str(error)
    else:
        engine = _engine(messages, bundle, manifest, verify)
        if lint is not None:
            from ...export.lint_tensorrt import lint_bundle

            findings = lint_bundle(bundle, manifest, lint)
    state = state_memory(manifest)
    document: dict[str, Any] = {
        "bundle": str(bundle),
        "bytes": manifest.total_bytes,
        "check": {"whole_files": verify, "fault": fault},
        "engine": engine and {"name": engine.name, "reason": engine.reason},
        "state_memory": {**asdict(state), "at_full_length": state.at_full_length},
        "manifest": manifest.to_dict(),
    }
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


def _inspect_state(path: Path, verify: bool, json_file: Path | None) -> None:
    from ...runtime.state_file import describe

    state = describe(path, verify=verify)
    patches = max(0, state.patches - 1)  # without the one that BOS is
    document = asdict(state) | {"made": state.made.isoformat(), "patches": patches}
    document["text_bytes"] = document.pop("length") - 1
    for name, data in (("beginning", state.beginning), ("end", state.end)):
        document[name] = data.decode("utf-8", "replace")
        document[f"{name}_base64"] = base64.b64encode(data).decode("ascii")
    write_json(json_file, {"state": str(path), "check": {"whole_file": verify}, **document})
    if json_file == STDIN:
        return
    text = f"{counted(state.length - 1, 'byte')} in {patches} {'patch' if patches == 1 else 'patches'}"
    print_fields(
        [
            ("state", f"{path}, written {state.made:%Y-%m-%d %H:%M} UTC"),
            ("bundle", f"{state.model}, fingerprint {state.bundle[:16]}"),
            ("engine", state.engine),
            ("patching", state.patching),
            ("file", f"{size(state.bytes)}: ok ({_checked(verify)})"),
            ("text", text),
            ("begins with", escaped(state.beginning)),
            ("ends with", escaped(state.end)),
        ]
    )


def _engine(messages: Messages, bundle: Path, manifest: Manifest, verify: bool) -> Engine:
    from ...runtime.engines import find_engine

    if not verify:
        return find_engine(bundle, manifest)
    with progress_bar(messages) as progress:
        return find_engine(bundle, manifest, full=True, progress=partial(progress, "checking the engine"))


def _title(lint: str) -> str:
    from ...export.lint_tensorrt import RULES

    return RULES[lint].title


def _show_findings(lint: str, findings: list[Finding]) -> None:
    """Findings that differ in their node only are one."""
    echo()
    if not findings:
        echo(f"{_title(lint)} would refuse nothing that can be seen in the graphs")
        return
    echo(f"{_title(lint)} would refuse")
    nodes: dict[tuple[str, ...], list[str]] = {}
    for one in findings:
        nodes.setdefault((one.stage, one.operator, one.reason, one.remedy), []).append(one.node)
    for (stage, operator, reason, remedy), names in nodes.items():
        what = f"{len(names)} x {operator}, first {names[0]}" if operator else names[0]
        echo(f"  {printable(stage)}: {printable(what)}")
        echo(f"    {printable(reason)}; {printable(remedy)}")


def _show(
    bundle: Path,
    manifest: Manifest,
    state: StateMemory,
    engine: Engine | None,
    verify: bool,
    fault: str | None,
) -> None:
    source, model = manifest.source, manifest.model
    files = f"{len(manifest.files)}, {size(manifest.total_bytes)}"
    widths = f"width {model.width}, {model.cross_attn_k} vectors a patch"
    print_fields(
        [
            ("bundle", f"{bundle}, written by blt-edge {manifest.generator}"),
            ("source", f"{source.name} ({source.layout} layout), sha256 {source.sha256[:16]}"),
            ("files", f"{files}: {'DAMAGED' if fault else f'ok ({_checked(verify)})'}"),
            ("model", f"{widths}, vocabulary {model.vocab_size}"),
            ("tables", _tables(manifest.embedding)),
            *_integers(manifest.quantization),
            ("patches", _rule(manifest.patching)),
            ("positions", f"{model.max_positions:,}, trained on {model.trained_context:,}"),
            ("generation", _generation(manifest.generation)),
            ("chat", _chat(manifest)),
            *_validations(manifest),
            ("engine", "not looked for, the bundle is damaged" if engine is None else str(engine)),
        ]
    )
    echo()
    _show_stages(manifest)
    echo()
    axes = [
        (name, *(f"{value:,}" for value in asdict(axis).values())) for name, axis in manifest.axes.items()
    ]
    print_table(("axis", ">min", ">opt", ">max"), axes)
    echo()
    patch = f"{state.bytes_per_patch:g} byte{'s' * (state.bytes_per_patch != 1)}"
    growth = f"{size(state.per_byte)} a byte within the windows, {size(state.per_patch)} a patch"
    if engine is not None and engine.caches == "int8":
        growth += "; a quarter of it while a text goes on"
    longest = f"up to {size(state.open_patch)} more, if one patch had {state.longest_patch:,} bytes"
    full = f"about {size(state.at_full_length)} for {state.positions:,} positions, at {patch} a patch"
    print_fields([("state memory", growth), ("at full length", full), ("open patch", longest)])


def _checked(verify: bool) -> str:
    return "whole files" if verify else "fast check; --verify reads whole files"


def _show_stages(manifest: Manifest) -> None:
    rows = [
        (
            name,
            "+".join(manifest.precisions_of(name)),
            str(spec.layers),
            f"{spec.kv_heads} x {spec.head_dim}",
            "all" if spec.window is None else str(spec.window),
            count(spec.parameters),
            size(manifest.stage_bytes(name)),
            spec.file,
        )
        for name, spec in manifest.stages.items()
    ]
    table = manifest.embedding
    parameters = count(table.rows * table.width)
    rows.append(("tables", table.precision, "", "", "", parameters, size(table.bytes), table.file))
    columns = ("stage", "precision", ">layers", ">kv heads", ">window", ">parameters", ">size", "file")
    print_table(columns, rows, total=True)
    if manifest.rows:
        total = sum(manifest.files[name].bytes for name in manifest.packed_files)
        echo(f"packed graphs for {listed(manifest.rows)} texts at once, over the same weights: {size(total)}")


def _rule(rule: PatchingRule) -> str:
    over = f"{rule.threshold or 0.0:.6g} nats"
    text = {
        "entropy": f"start where the entropy {'rises by' if rule.monotonic else 'is'} over {over}",
        "space": "start after spaces and punctuation",
        "static": f"have {rule.patch_size} bytes",
        "byte": "are single bytes",
    }[rule.mode]
    if rule.mode == "entropy" and not rule.monotonic and rule.threshold_add is not None:
        text += f" and rises by over {rule.threshold_add:.6g}"
    return text + (f", and have at most {rule.max_patch_length} bytes" if rule.max_patch_length else "")


def _generation(spec: GenerationSpec) -> str:
    ends = "ends at id" + ("s" if len(spec.end_ids) > 1 else "") + " " + ", ".join(map(str, spec.end_ids))
    own = ", ".join(f"{name} {value!r}" for name, value in spec.options.items())
    left_out = f"; without effect: {', '.join(spec.left_out)}" if spec.left_out else ""
    return f"{ends}; defaults: {own or 'greedy'}{left_out}"


def _chat(manifest: Manifest) -> str:
    if manifest.chat is None:
        return "no template; blt-edge export --chat-template FILE adds one"
    ends = "" if manifest.chat.eos is None else f"; {manifest.chat.eos!r} ends an answer"
    return f"{CHAT_TEMPLATE_NAME}, {size(manifest.files[CHAT_TEMPLATE_NAME].bytes)}{ends}"


def _integers(spec: QuantizationSpec | None) -> list[tuple[str, str]]:
    if spec is None:
        return []
    found = {"mse": "scales by squared error", "rtn": "scales by the largest weight"}[spec.search]
    parts = [found, blocks_told(spec.block_size, spec.block_sizes)]
    ranges = spec.calibration
    if ranges is not None:
        texts = f"{ranges.windows} windows of {counted(len(ranges.texts), 'text')}"
        parts.append(f"ranges by {ranges.method} of {texts}")
    mix = [("", mix_told(spec.mix))] if spec.mix else []
    return [("integers", ", ".join(filter(None, parts))), *mix]


def _validations(manifest: Manifest) -> list[tuple[str, str]]:
    """A line for each record, this processor's first, the others from the newest on."""
    if not manifest.validation:
        return [("validation", "none; blt-edge validate compares the bundle with its reference")]
    from ...runtime.kernels import kernel_family

    here = kernel_family()
    records = list(reversed(manifest.validation))
    records.sort(key=lambda one: one.kernels != here)
    return [("" if number else "validation", _validation(one)) for number, one in enumerate(records)]


def _validation(record: ValidationRecord) -> str:
    report, failed = record.report, record.failed_checks
    rows = report.get("rows")
    count = len(rows) if isinstance(rows, list) else 0
    verdict = f"FAILED ({', '.join(failed)})" if failed else "passed"
    what = f"{count} checks against {report.get('against')}, {report.get('data_bytes')} bytes of text"
    version = record.onnxruntime and f"ONNX Runtime {record.onnxruntime}"
    machine = ", ".join(filter(None, (record.processor, version)))
    return f"{verdict}, {what}, on {record.name}" + (f" ({machine})" if machine else "")


def _tables(table: EmbeddingSpec) -> str:
    rows = f"{table.rows:,} rows of {table.width}: {table.byte_rows} bytes"
    if table.hash.tables:
        groups = ", ".join(map(str, table.group_sizes))
        rows += f", {table.hash.tables} x {table.hash_vocab:,} hashes of {groups} bytes"
    read = size((table.hash.tables + 1) * table.bytes // table.rows)
    return f"{rows}; memory-mapped, a byte of text reads {read}"
