"""What a threshold costs: bits per byte and bytes per patch of texts cut by one threshold after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.errors import BltError, OptionError, requirement

if TYPE_CHECKING:
    from ...runtime import BltModel
    from ...runtime.patching import PatchingRule

Progress = Callable[[str, int, int], None]
"""progress(what is being done, bytes done, bytes in all)."""
Display = Callable[[], AbstractContextManager[Progress]]
"""Shows progress while one point is scored."""


@dataclass(frozen=True)
class SweepPoint:
    """All texts together at one threshold."""

    threshold: float
    """Nats."""
    bits_per_byte: float
    bytes_per_patch: float
    bytes_per_second: float
    bundles: bool
    """Whether it is the bundle's own threshold."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def sweep(
    model: BltModel,
    texts: Sequence[bytes],
    thresholds: Sequence[float],
    *,
    context: int | None = None,
    display: Display = lambda: nullcontext(lambda *_: None),
) -> Iterator[SweepPoint]:
    """Score the texts (none empty) at the model's own threshold, then at each other, rising; points come as
    they are known.

    Raises OptionError for a rule without a threshold or a threshold that no rule takes, and what
    `BltModel.score` raises.
    """
    rule = model.manifest.patching
    if rule.mode != "entropy" or rule.threshold is None:
        raise OptionError(f"sweep: mode {rule.mode} has no threshold; take a bundle of mode entropy")
    try:
        others = [replace(rule, threshold=one) for one in sorted({*thresholds} - {rule.threshold})]
    except OptionError as error:
        raise OptionError(f"sweep: {error}") from None
    return _points(model, texts, [rule, *others], context, display)


def _points(
    model: BltModel,
    texts: Sequence[bytes],
    rules: Sequence[PatchingRule],
    context: int | None,
    display: Display,
) -> Iterator[SweepPoint]:
    for changed in rules:
        threshold, other = changed.threshold or 0.0, model.with_patching(changed)
        name = f"threshold {threshold:.4g}"
        with display() as progress:
            told = partial(progress, name)
            scores = [other.score(text, context=context, progress=told) for text in texts]
        size = sum(score.bytes for score in scores)
        # BOS is alone in one patch of each window.
        patches = sum(score.patches - score.windows for score in scores)
        yield SweepPoint(
            threshold=threshold,
            bits_per_byte=sum(score.bits_per_byte * score.bytes for score in scores) / size,
            bytes_per_patch=size / max(1, patches),
            bytes_per_second=size / max(1e-9, sum(score.seconds for score in scores)),
            bundles=changed == model.manifest.patching,
        )


def draw_sweep(points: Sequence[SweepPoint], path: Path, kind: str, title: str) -> None:
    """Draw bits per byte over bytes per patch into `path`; kind: "png", "svg" or "pdf".

    Raises BltError when matplotlib is missing, OSError when the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BltError(f"a picture needs matplotlib: pip install {requirement('plot')}") from None
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    panel = figure.subplots()
    ordered = sorted(points, key=lambda point: point.bytes_per_patch)
    across, up = [one.bytes_per_patch for one in ordered], [one.bits_per_byte for one in ordered]
    panel.plot(across, up, marker="o", color="#4c78a8", zorder=2)
    for point in ordered:
        panel.annotate(
            f"{point.threshold:.3g}",
            (point.bytes_per_patch, point.bits_per_byte),
            xytext=(9, 3),
            textcoords="offset points",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
            zorder=4,
        )
        if point.bundles:
            label = f"the bundle's threshold, {point.threshold:.4g} nats"
            panel.plot(
                point.bytes_per_patch, point.bits_per_byte, "*", ms=14, color="#e45756", zorder=3, label=label
            )
    panel.set_xscale("log")  # one threshold more may make patches ten times as long
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    # Between powers of ten every number has room on a short axis only.
    near = max(across) < 10 * min(across)
    panel.xaxis.set_minor_formatter(lambda value, _: f"{value:,g}" if near or f"{value:e}"[0] in "25" else "")
    panel.margins(x=0.08, y=0.12)
    panel.ticklabel_format(axis="y", useOffset=False)
    panel.set_title(title, fontsize=10, parse_math=False)
    panel.set_xlabel("bytes per patch (over the points: threshold in nats)")
    panel.set_ylabel("bits per byte")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=150, format=kind)
