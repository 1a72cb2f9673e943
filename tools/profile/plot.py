"""Pictures of a profile: one case's latencies and shares, or speed over several cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...runtime.errors import BltError
from .measure import Case, Profile
from .statistics import OTHER

__all__ = ["draw_profile"]

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
        raise BltError("a picture needs matplotlib: pip install 'blt-edge[plot]'") from None
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
    latency = case.figures.byte_latency.scaled(1000)
    parts: dict[str, bool | None] = {"inside a patch": False, "ending a patch": True}
    if case.figures.inside_patch is None or case.figures.ending_patch is None:
        parts = {"every byte": None}
    values = [
        [1000 * value.seconds for value in case.byte_latencies if latent is None or value.latent == latent]
        for latent in parts.values()
    ]
    colours = [_COLOURS["latent" if latent else "patcher"] for latent in parts.values()]
    span = (latency.min, max(latency.p99, 1.01 * latency.min))
    panel.hist(values, bins=60, range=span, color=colours, label=list(parts), stacked=True)
    for name, colour in _MARKS.items():
        value = getattr(latency, name)
        panel.axvline(value, color=colour, linewidth=1.2, label=f"{name} {value:.3g} ms")
    panel.axvline(
        latency.mean, color="#e45756", linestyle="--", linewidth=1.2, label=f"mean {latency.mean:.3g} ms"
    )
    panel.set_title(
        f"latency of {latency.count:,} bytes, up to p99 (the longest took {latency.max:.3g} ms)", fontsize=10
    )
    panel.set_xlabel("ms a byte")
    panel.set_ylabel("bytes")
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)


def _draw_speed_over_context(panel: Any, profile: Profile) -> None:
    for number, ((threads, draft), cases) in enumerate(_lines(profile).items()):
        colour = f"C{number}"
        across = [case.cost.positions for case in cases]
        speeds = [case.figures.decode for case in cases]
        name = _short(threads, draft)
        low = [speed.median - speed.low for speed in speeds]
        high = [speed.high - speed.median for speed in speeds]
        middle = [speed.median for speed in speeds]
        panel.errorbar(across, middle, (low, high), marker="o", capsize=3, color=colour, label=name)
        ceilings = [case.cost.ceiling for case in cases]
        panel.plot(across, ceilings, linestyle=":", linewidth=1.2, color=colour)
    panel.set_ylim(bottom=0)
    panel.set_title("decoding speed by context (dotted: ceiling by memory bandwidth)", fontsize=10)
    panel.set_xlabel("positions read before the byte")
    panel.set_ylabel("bytes/s")
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)


def _draw_speeds(panel: Any, profile: Profile) -> None:
    names = [_short(case.threads, case.draft) for case in profile.cases]
    speeds = [case.figures.decode for case in profile.cases]
    middle = [speed.median for speed in speeds]
    low = [speed.median - speed.low for speed in speeds]
    high = [speed.high - speed.median for speed in speeds]
    panel.barh(names, middle, xerr=(low, high), color="#4c78a8", ecolor="#333333", capsize=3)
    for place, case in enumerate(profile.cases):
        mark = {"marker": "|", "markersize": 14, "markeredgewidth": 2, "color": "#e45756", "linestyle": ""}
        panel.plot([case.cost.ceiling], [place], label="" if place else "ceiling by memory bandwidth", **mark)
    panel.invert_yaxis()
    panel.set_title(f"decoding speed after {profile.options.prompt_bytes[0]} bytes", fontsize=10)
    panel.set_xlabel("bytes/s")
    panel.figure.legend(
        *panel.get_legend_handles_labels(), fontsize=8, loc="outside lower left", frameon=False
    )
    panel.grid(alpha=0.3, axis="x")


def _draw_shares(panel: Any, profile: Profile) -> None:
    rows: list[tuple[str, dict[str, float]]] = []
    if len(profile.cases) == 1:
        figures = profile.cases[0].figures
        rows = [("prefill", figures.prefill_shares), ("decode", figures.decode_shares)]
    else:
        rows = [(_label(profile, case), case.figures.decode_shares) for case in profile.cases]
    names = [name for name, _ in rows]
    start = [0.0] * len(rows)
    for stage, colour in _COLOURS.items():
        shares = [100 * share.get(stage, 0.0) for _, share in rows]
        if not any(shares):
            continue
        bars = panel.barh(names, shares, left=start, color=colour, label=stage, height=0.6)
        texts = [f"{share:.0f}" if share >= 4 else "" for share in shares]
        panel.bar_label(bars, texts, label_type="center", fontsize=8)
        start = [before + share for before, share in zip(start, shares, strict=True)]
    panel.set_xlim(0, 100)
    panel.set_title("share of time by stage" + ("" if len(profile.cases) == 1 else ", decode"), fontsize=10)
    panel.set_xlabel("percent")
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.figure.legend(
        *panel.get_legend_handles_labels(), fontsize=8, ncols=5, loc="outside lower right", frameon=False
    )


def _lines(profile: Profile) -> dict[tuple[int | None, str], list[Case]]:
    """Cases that differ by context only, those of a line, by context."""
    lines: dict[tuple[int | None, str], list[Case]] = {}
    for case in sorted(profile.cases, key=lambda case: case.cost.positions):
        lines.setdefault((case.threads, case.draft), []).append(case)
    return lines


def _short(threads: int | None, draft: str) -> str:
    count = "default threads" if threads is None else f"{threads} thread{'s' * (threads != 1)}"
    return count if draft == "none" else f"{count}, {draft}"


def _label(profile: Profile, case: Case) -> str:
    parts = [_short(case.threads, case.draft)]
    if len(profile.options.prompt_bytes) > 1:
        parts.append(f"{case.figures.prompt_bytes} B")
    return ", ".join(parts)
