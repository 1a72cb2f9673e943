"""Pictures of a profile: one case's latencies and shares, or speed over several cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...runtime.errors import BltError, requirement
from .measure import Profile
from .statistics import OTHER, Case, Spread

_COLOURS = {
    "patcher": "#4c78a8",
    "encoder": "#72b7b2",
    "latent": "#f58518",
    "decoder": "#e45756",
    OTHER: "#bab0ac",
}
_MARKS = {"p50": "#333333", "p90": "#777777", "p99": "#aaaaaa"}


def draw_profile(profile: Profile, path: Path, kind: str) -> None:
    """Draw into `path`; kind: "png", "svg" or "pdf".

    Left the latency of bytes, or over several cases bytes/s; right the share of time by stage. Raises
    BltError when matplotlib is missing, OSError when the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BltError(f"a picture needs matplotlib: pip install {requirement('plot')}") from None
    single = len(profile.cases) == 1
    height = 4.2 if single else max(4.2, 1.6 + 0.34 * len(profile.cases))
    figure = Figure(figsize=(11.5, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    if single:
        _draw_latencies(left, profile.cases[0])
    elif len(profile.options.prompt_bytes) > 1:
        _draw_speed_over_context(left, profile)
    else:
        _draw_speeds(left, profile)
    _draw_shares(right, profile)
    machine = profile.machine
    where = f"{machine['processor']}, {machine['cpus']} CPUs, ONNX Runtime {machine['onnxruntime']}"
    which = f"; {profile.cases[0].name}" if single else ""
    figure.suptitle(f"{Path(profile.path).name} on {where}{which}", fontsize=10)
    figure.savefig(path, dpi=150, format=kind)


def _draw_latencies(panel: Any, case: Case) -> None:
    """How many bytes took how long; the longest percent is cut off and said in the title."""
    latency = case.decode.milliseconds_per_byte
    parts: dict[str, bool | None] = {"inside a patch": False, "ending a patch": True}
    if case.decode.inside_patch is None or case.decode.ending_patch is None:
        parts = {"every byte": None}
    every = [one for recording in case.rounds for one in recording.byte_latencies()]
    values = [
        [1000 * one.seconds for one in every if latent is None or one.latent == latent]
        for latent in parts.values()
    ]
    colours = [_COLOURS["latent" if latent else "patcher"] for latent in parts.values()]
    span = (latency.min, max(latency.p99, 1.01 * latency.min))
    panel.hist(values, bins=60, range=span, color=colours, label=list(parts), stacked=True)
    for name, colour in _MARKS.items():
        value = getattr(latency, name)
        panel.axvline(value, color=colour, linewidth=1.2, label=f"{name} {value:.3g} ms")
    mean = {"linestyle": "--", "linewidth": 1.2, "label": f"mean {latency.mean:.3g} ms"}
    panel.axvline(latency.mean, color="#e45756", **mean)
    longest = f"the longest took {latency.max:.3g} ms"
    _dress(panel, f"latency of {latency.count:,} bytes, up to p99 ({longest})", "ms a byte", "bytes")


def _draw_speed_over_context(panel: Any, profile: Profile) -> None:
    """A line for all cases that differ by context only."""
    lines: dict[str, list[Case]] = {}
    for case in sorted(profile.cases, key=lambda case: case.cost.positions):
        lines.setdefault(_short(case), []).append(case)
    for number, (name, cases) in enumerate(lines.items()):
        colour = f"C{number}"
        across = [case.cost.positions for case in cases]
        middle, errors = _error_bars([case.decode.bytes_per_second for case in cases])
        panel.errorbar(across, middle, errors, marker="o", capsize=3, color=colour, label=name)
        ceilings = [case.cost.ceiling_bytes_per_second for case in cases]
        panel.plot(across, ceilings, linestyle=":", linewidth=1.2, color=colour)
    panel.set_ylim(bottom=0)
    title = "decoding speed by context (dotted: ceiling by memory bandwidth)"
    _dress(panel, title, "positions read before the byte", "bytes/s")


def _draw_speeds(panel: Any, profile: Profile) -> None:
    names = [_short(case) for case in profile.cases]
    middle, errors = _error_bars([case.decode.bytes_per_second for case in profile.cases])
    panel.barh(names, middle, xerr=errors, color="#4c78a8", ecolor="#333333", capsize=3)
    mark = {"marker": "|", "markersize": 14, "markeredgewidth": 2, "color": "#e45756", "linestyle": ""}
    ceilings = [case.cost.ceiling_bytes_per_second for case in profile.cases]
    panel.plot(ceilings, range(len(ceilings)), label="ceiling by memory bandwidth", **mark)
    panel.invert_yaxis()
    panel.set_title(f"decoding speed after {profile.options.prompt_bytes[0]} bytes", fontsize=10)
    panel.set_xlabel("bytes/s")
    _legend_below(panel, "lower left")
    panel.grid(alpha=0.3, axis="x")


def _error_bars(speeds: list[Spread]) -> tuple[list[float], list[float]]:
    """Means and standard deviations."""
    return [speed.mean for speed in speeds], [speed.deviation for speed in speeds]


def _draw_shares(panel: Any, profile: Profile) -> None:
    rows: dict[str, dict[str, float]] = {}
    single = len(profile.cases) == 1
    for case in profile.cases:
        prompt = f", {case.prompt_bytes} B" if len(profile.options.prompt_bytes) > 1 else ""
        rows[_short(case) + prompt] = case.decode.shares
    if single:
        rows = {"prefill": profile.cases[0].prefill.shares, "decode": profile.cases[0].decode.shares}
    start = [0.0] * len(rows)
    for stage, colour in _COLOURS.items():
        shares = [100 * share.get(stage, 0.0) for share in rows.values()]
        if not any(shares):
            continue
        bars = panel.barh(list(rows), shares, left=start, color=colour, label=stage, height=0.6)
        texts = [f"{share:.0f}" if share >= 4 else "" for share in shares]
        panel.bar_label(bars, texts, label_type="center", fontsize=8)
        start = [before + share for before, share in zip(start, shares, strict=True)]
    panel.set_xlim(0, 100)
    panel.set_title("share of time by stage" + ("" if single else ", decode"), fontsize=10)
    panel.set_xlabel("percent")
    panel.set_ylim(len(rows) - 0.5, -0.5)
    _legend_below(panel, "lower right", ncols=5)


def _dress(panel: Any, title: str, across: str, up: str) -> None:
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(across)
    panel.set_ylabel(up)
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)


def _legend_below(panel: Any, where: str, **more: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    panel.figure.legend(handles, labels, fontsize=8, loc=f"outside {where}", frameon=False, **more)


def _short(case: Case) -> str:
    count = "" if case.threads is None else f"{case.threads} thread{'s' * (case.threads != 1)}"
    drafts = "" if case.draft == "none" and count else case.draft
    return ", ".join(filter(None, (count, drafts)))
