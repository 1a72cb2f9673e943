"""`blt-edge score`: bits per byte of texts, each told as soon as it is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...runtime.fields import checked_int
from ...runtime.names import MOST_ROWS
from ..output import Messages
from .documents import check_plot, output_option
from .model_options import EngineOptions, check_bundle_files, engine_options, load_model
from .options import STDIN, TextSource, json_option, model_option, option, options, verb
from .profile import CommaSeparated
from .rule_options import changed_rule, rule_options

if TYPE_CHECKING:
    from ...runtime.manifest import Manifest
    from .score_corpus import Scoring

_corpus_options = options(
    option(
        "--glob",
        multiple=True,
        type=str,
        metavar="PATTERN",
        shown="those that are text",
        help="Which files of folders are read: by their name, or with a slash by their path in the folder; "
        "may be given several times.",
    ),
    option(
        "--field",
        type=str,
        metavar="NAME",
        shown="a file is one text",
        help="Files that end in .jsonl or .ndjson have a JSON object a line, with its text under this key, or"
        " keys with dots between.",
    ),
    title="Texts",
)
_ray_option = options(
    option(
        "--ray",
        type=str,
        metavar="ADDRESS",
        shown="this process alone",
        help="Score on a Ray cluster: HOST:PORT of its head, local for one on this machine, auto for the one "
        "that is there, else local. Actors have one thread each, or --threads; device auto is cpu there.",
    ),
    title="Engine",
)
_rows_option = option(
    "--rows",
    type=int,
    default=1,
    help="Short texts that are read together in one pass, as many as the bundle has graphs for: faster below "
    "some 200 bytes a text, but figures may then depend on their company in the last digits.",
)
_outputs = options(
    output_option(
        "--jsonl", "no lines", "Write a JSON line to FILE for each text, as it is known; - is stdout."
    ),
    option(
        "--resume",
        help="Go on with what is in the FILE of --jsonl: texts that it tells of, by name and sha256, are not "
        "scored again.",
    ),
    output_option("--csv", "no table", "Write a table of all texts to FILE at the end; - is stdout."),
    output_option("--parquet", "no table", "Write the same table as Parquet, which needs pyarrow."),
    option(
        "--max-rows",
        type=int,
        shown="100 on a terminal, else all",
        help="Show at most N rows before the total.",
    ),
    title="Output",
)


@verb("score", "-m demo-bundle alice.txt", "-m demo-bundle texts/ --jsonl scores.jsonl --resume")
@model_option
@click.argument("files", type=TextSource(), nargs=-1, required=True, metavar="FILE...")
@option(
    "--context",
    type=int,
    shown="the trained context, from the bundle",
    help="Ids in a window, BOS included; each window is read from BOS.",
)
@rule_options
@option(
    "--sweep",
    type=CommaSeparated(click.FLOAT),
    metavar="X,...",
    shown="one threshold",
    help="Score all files once with the bundle's threshold and with each of these, in nats: what each costs.",
)
@_corpus_options
@output_option("--plot", "no picture", "With --sweep: draw bits per byte over bytes per patch into FILE.")
@_rows_option
@engine_options
@_ray_option
@json_option
@_outputs
def command(
    messages: Messages,
    model: Path,
    files: tuple[Path, ...],
    context: int | None,
    sweep: tuple[float, ...] | None,
    plot: Path | None,
    glob: tuple[str, ...],
    field: str | None,
    rows: int,
    engine: EngineOptions,
    ray: str | None,
    json_file: Path | None,
    jsonl: Path | None,
    resume: bool,
    csv: Path | None,
    parquet: Path | None,
    max_rows: int | None,
    **changes: Any,
) -> None:
    """Measure bits per byte of files.

    FILE may be - for stdin, or a folder: its texts at any depth, without hidden ones and links. What ends
    in .gz, .bz2, .xz or .zst is decompressed. Bits are over all 260 classes; lower is better. Every byte is
    scored once, in windows without overlap. A row comes as soon as its text is read, so Ctrl-C loses no
    other; --json is written then, too, with "complete" false. Perplexity is 2 to the bits of a byte, or of a
    word, which is a longest run of bytes that are no white space.

    --mode, --threshold and what follows them cut patches by another rule than the bundle's: the difference is
    what that costs.
    """
    others = {
        "ray": ray,
        "field": field,
        "jsonl": jsonl,
        "csv": csv,
        "parquet": parquet,
        "max_rows": max_rows,
        "rows": None if rows == 1 else rows,
    }
    _check_asked(sweep is not None, plot, {**changes, **others})
    checked_int("rows", rows, 1, MOST_ROWS)
    from ..corpus.sources import find_sources
    from .score_corpus import Outputs, Scoring, result_lines

    outputs = Outputs(json_file, jsonl, csv, parquet, max_rows, resume)
    outputs.check(files)
    sources = find_sources(
        [None if path == STDIN else path for path in files],
        glob,
        lines=field is not None,
        without=outputs.files(),
    )
    from ...runtime.manifest import load_manifest
    from ..corpus.engines import local_engine
    from ..corpus.lines import described_run

    manifest = load_manifest(model)
    rule = changed_rule(manifest.patching, changes)
    if sweep is not None:
        from .score_sweep import show_sweep

        loaded = load_model(messages, model, engine, positions=context, reads_only=True)
        show_sweep(messages, loaded, sources, sweep, context, json_file, plot)
        return
    window = manifest.model.trained_context if context is None else context
    lines = result_lines(outputs, described_run(str(model), replace(manifest, patching=rule), window, field))
    scoring = Scoring(messages, sources, field or "", outputs, lines)
    if ray is not None:
        of_rule = replace(manifest, patching=rule)
        _score_on_cluster(messages, scoring, ray, model, of_rule, engine, window, rows)
        return
    loaded = load_model(messages, model, engine, positions=context, reads_only=True).with_patching(rule)
    scoring.run(local_engine(loaded, context, rows), loaded.window(context))


def _check_asked(sweeps: bool, plot: Path | None, others: Mapping[str, Any]) -> None:
    """Raise UsageError or OptionError for what is wrong without looking at a file; others: options that a
    sweep does not take."""
    check_plot(plot)
    if plot is not None and not sweeps:
        raise click.UsageError("--plot draws a sweep; add --sweep X,...")
    for name, value in others.items():
        if sweeps and value is not None:
            flag = "--" + name.replace("_", "-")
            raise click.UsageError(f"{flag} and --sweep are both given; give one of them")
    if others["max_rows"] is not None:
        checked_int("max_rows", others["max_rows"], 0)
    if others["field"] == "":
        raise click.UsageError("--field is empty; give a key of the JSON lines")


def _score_on_cluster(
    messages: Messages,
    scoring: Scoring,
    ray: str,
    bundle: Path,
    manifest: Manifest,
    engine: EngineOptions,
    window: int,
    rows: int,
) -> None:
    from ..corpus.cluster import cluster_engine

    if engine.max_memory is not None:
        raise click.UsageError("--max-memory has no effect with --ray; leave it out")
    checked_int("context", window, 2, manifest.model.max_positions)
    check_bundle_files(messages, bundle, manifest, engine.verify)
    given = {name: getattr(engine, name) for name in ("device", "threads", "prefill_chunk", "probe")}
    scorer = {
        **given,
        "bundle": bundle,
        "provider_options": engine.provider_options,
        "context": window,
        "rows": rows,
        "rule": manifest.patching,
        "fingerprint": manifest.fingerprint,
    }
    messages.say(f"connecting to Ray ({ray}), which takes some seconds")
    with cluster_engine(ray, scorer) as on_cluster:
        scoring.run(on_cluster, window)
