"""The patches of one text, and why each begins: the data behind every way of showing them.

Positions are those of bytes in the text, from 0; the runtime's are one higher, because a text begins with
BOS. BOS is a patch of its own and appears nowhere here, so patches are numbered from 1. The entropy of a byte
is the patcher's uncertainty before it has seen that byte, in nats: it decides whether a patch starts there.
"""

from __future__ import annotations

import csv
import io
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.patching import PatchBoundaries, PatchingRule
from ...runtime.vocabulary import encode
from .clusters import Cluster, characters, clusters, escape

if TYPE_CHECKING:
    from ...runtime import BltModel

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PatchView:
    """A text of n >= 1 bytes and its patches."""

    data: bytes
    rule: PatchingRule
    """What cut it."""
    entropies: Floats | None
    """float32 [1 + n], nats: that of byte i at i, and after the text at n; None without a patcher."""
    starts: tuple[int, ...]
    """Positions that a patch starts at, rising from 0; never n."""
    reasons: tuple[str, ...]
    """Why each does: "first" (the rule always begins so), "entropy", "space", "static", "byte" or
    "max_patch_length"."""
    next_starts: bool
    """Whether a byte behind the text would start a patch; if not, the last patch is still open."""
    windows: tuple[int, ...] = (0,)
    """Positions where reading began anew, from BOS; a patch starts at each."""

    @cached_property
    def clusters(self) -> list[Cluster]:
        return clusters(self.data)

    @cached_property
    def start_set(self) -> frozenset[int]:
        """`starts`, to ask for one."""
        return frozenset(self.starts)

    @cached_property
    def lengths(self) -> list[int]:
        """Bytes of each patch; their sum is n."""
        ends = (*self.starts[1:], len(self.data))
        return [end - start for start, end in zip(self.starts, ends, strict=True)]

    @cached_property
    def patches(self) -> list[int]:
        """Of each byte the number of its patch, from 1."""
        return [number for number, length in enumerate(self.lengths, 1) for _ in range(length)]

    @cached_property
    def visible_patches(self) -> list[int]:
        """Of each cluster a number that differs from its neighbour's where their first bytes' patches do.

        A patch that lies inside one cluster takes no number, so even and odd ones alternate as clusters do.
        """
        numbers: list[int] = []
        number, last = -1, 0
        for cluster in self.clusters:
            number += self.patches[cluster.start] != last
            last = self.patches[cluster.start]
            numbers.append(number)
        return numbers

    def starts_with(self, cluster: Cluster) -> bool:
        return cluster.start in self.start_set

    def inner_starts(self, cluster: Cluster) -> int:
        """How many patches start inside a cluster, behind its first byte."""
        return bisect_right(self.starts, cluster.end - 1) - bisect_right(self.starts, cluster.start)

    @cached_property
    def has_inner_starts(self) -> bool:
        return any(map(self.inner_starts, self.clusters))

    @cached_property
    def top(self) -> float:
        """Where scales of entropy end: at least 1 nat, and no entropy or threshold of the text is over it."""
        if self.entropies is None:
            return 1.0
        finite = self.entropies[np.isfinite(self.entropies)]
        return max(1.0, self.level or 0.0, float(finite.max(initial=0.0)))

    @property
    def level(self) -> float | None:
        """The entropy over which a patch may start; None when the rule has no such level."""
        return self.rule.threshold if self.rule.needs_entropy and not self.rule.monotonic else None

    def entropy(self, cluster: Cluster) -> float | None:
        """The highest entropy of a cluster's bytes; None without a patcher."""
        if self.entropies is None:
            return None
        return float(self.entropies[cluster.start : cluster.end].max())

    def share(self, entropy: float) -> float:
        """An entropy's place on the scale from 0 to `top`, 0 to 1; 0 for NaN."""
        return min(max(entropy / self.top, 0.0), 1.0) if entropy == entropy else 0.0

    @cached_property
    def rises(self) -> Floats | None:
        """float32 [n]: how much higher each byte's entropy is than the one before; NaN where windows begin.

        None when the rule does not look at it.
        """
        if self.entropies is None or fixed_starts(self.rule) == 1:
            return None
        rises = np.diff(self.entropies[:-1], prepend=np.float32(np.nan))
        rises[list(self.windows)] = np.nan
        return rises

    @cached_property
    def over_threshold(self) -> NDArray[np.bool_] | None:
        """bool: whether each byte's entropy, or in a monotonic rule its rise, is over the threshold; without
        the bytes of the rule's fixed beginning. None when the rule has no threshold."""
        if self.entropies is None or not self.rule.needs_entropy or self.rule.threshold is None:
            return None
        seen = self.rises if self.rule.monotonic and self.rises is not None else self.entropies[:-1]
        decided = np.ones(len(self.data), np.bool_)
        for start in self.windows:
            decided[start : start + fixed_starts(self.rule)] = False
        over: NDArray[np.bool_] = seen[decided] > np.float32(self.rule.threshold)
        return over


def look(model: BltModel, data: bytes, rule: PatchingRule) -> PatchView:
    """Read `data` with the model's patcher, and with no other stage, and cut it by `rule`.

    A text that the model has no positions for is read in windows. Raises BundleError when the rule needs
    entropies and the model has no patcher.
    """
    needed = "patcher" in model.manifest.stages or rule.needs_entropy
    starts, views = [0], list[PatchView]()
    while not views or starts[-1] < len(data):
        end = _window_end(data, starts[-1], model.limits.max_positions - 1)
        window = data[starts[-1] : end]
        views.append(cut(window, rule, model.entropies(window) if needed else None))
        starts.append(end)
    return _joined(views, starts[:-1])


def _window_end(data: bytes, start: int, size: int) -> int:
    """Where a window of at most `size` bytes ends; inside a UTF-8 character only where that is longer."""
    end = start + size
    if end >= len(data):
        return len(data)
    character = next((end - back for back in range(4) if data[end - back] & 0xC0 != 0x80), end)
    return character if character > start else end


def _joined(views: Sequence[PatchView], starts: Sequence[int]) -> PatchView:
    """One view of windows that begin at `starts`."""
    last = views[-1]
    entropies = None
    if last.entropies is not None:
        parts = [view.entropies[:-1] for view in views if view.entropies is not None]
        entropies = np.concatenate([*parts, last.entropies[-1:]])
    return PatchView(
        b"".join(view.data for view in views),
        last.rule,
        entropies,
        tuple(start + own for start, view in zip(starts, views, strict=True) for own in view.starts),
        tuple(reason for view in views for reason in view.reasons),
        last.next_starts,
        tuple(starts),
    )


def cut(data: bytes, rule: PatchingRule, entropies: Floats | None) -> PatchView:
    """Cut `data` by `rule`; entropies as in `PatchView`. Raises ValueError for no bytes or no entropies."""
    if not data:
        raise ValueError("there is no patch in an empty text")
    starts = _starts(data, rule, entropies)
    unlimited = replace(rule, max_patch_length=None)
    by_rule = set(starts if unlimited == rule else _starts(data, unlimited, entropies))
    within = tuple(start for start in starts if start < len(data))
    reasons = tuple(
        "first" if start < fixed_starts(rule) else rule.mode if start in by_rule else "max_patch_length"
        for start in within
    )
    return PatchView(data, rule, entropies, within, reasons, starts[-1] == len(data))


def _starts(data: bytes, rule: PatchingRule, entropies: Floats | None) -> list[int]:
    """Positions in the text that start a patch, n among them if the next byte would."""
    boundaries = PatchBoundaries(rule)
    boundaries.extend(encode(data), entropies)
    return [start - 1 for start in boundaries.starts[1:]]


def fixed_starts(rule: PatchingRule) -> int:
    """How many first bytes start a patch whatever they are: 2 where a rule looks at rises, else 1."""
    return 2 if rule.needs_entropy and (rule.monotonic or rule.threshold_add is not None) else 1


def rule_words(rule: PatchingRule) -> str:
    """The rule as the end of a sentence: "a patch starts ..."."""
    threshold, add = f"{rule.threshold or 0.0:.4g}", rule.threshold_add
    words = {
        "entropy": f"where entropy is over {threshold} nats",
        "space": "behind the first of some spaces or signs",
        "static": f"every {rule.patch_size} bytes",
        "byte": "with every byte",
    }[rule.mode]
    if rule.mode == "entropy" and rule.monotonic:
        words = f"where entropy rises by more than {threshold} nats"
    elif rule.mode == "entropy" and add is not None:
        words += f" and rises by more than {add:.4g}"
    if rule.max_patch_length is not None:
        words += f", and after {rule.max_patch_length} bytes at the latest"
    return words


# 1. Figures.


@dataclass(frozen=True)
class Summary:
    """What is counted in a text; BOS and the patch it is alone in are left out."""

    bytes: int
    characters: int
    """Bytes that are no UTF-8 are not among them."""
    invalid_bytes: int
    """Bytes that are no UTF-8."""
    patches: int
    """The last one included, though it may not be complete."""
    mean_length: float
    """Bytes of a patch."""
    median_length: float
    longest: int
    """Bytes of the longest patch."""
    lengths: dict[int, int]
    """Patches by their length in bytes, rising."""
    mean_entropy: float | None
    """Nats a byte; None without a patcher."""
    over_threshold: float | None
    """Of the bytes that the threshold decides about, the share whose entropy (monotonic rules: its rise) is
    over it; None when it decides about none."""

    def __str__(self) -> str:
        """What there is how many of: "79 bytes, 75 characters, 22 patches"."""
        counts = [(self.bytes, "byte"), (self.characters, "character"), (self.invalid_bytes, "invalid byte")]
        parts = [f"{number:,} {what}{'s' * (number != 1)}" for number, what in counts]
        patches = f"{self.patches:,} patch{'es' * (self.patches != 1)}"
        return ", ".join([*(parts if self.invalid_bytes else parts[:2]), patches])


def summarize(view: PatchView) -> Summary:
    seen = [character.text for character in characters(view.data)]
    over = view.over_threshold
    return Summary(
        bytes=len(view.data),
        characters=sum(text is not None for text in seen),
        invalid_bytes=seen.count(None),
        patches=len(view.lengths),
        mean_length=mean(view.lengths),
        median_length=float(median(view.lengths)),
        longest=max(view.lengths),
        lengths=dict(sorted(Counter(view.lengths).items())),
        mean_entropy=None if view.entropies is None else float(np.mean(view.entropies[:-1])),
        over_threshold=float(over.mean()) if over is not None and len(over) else None,
    )


def histogram_rows(summary: Summary) -> list[tuple[str, int]]:
    """Lengths and how many patches have them: 1 to 8 one by one, longer ones in doubling ranges.

    Ends with the range of the longest patch; ranges before it may be empty.
    """
    ranges = [(length, length) for length in range(1, min(8, summary.longest) + 1)]
    while ranges[-1][1] < summary.longest:
        low = ranges[-1][1] + 1
        ranges.append((low, 2 * (low - 1)))
    return [
        (
            str(low) if low == high else f"{low}-{high}",
            sum(count for length, count in summary.lengths.items() if low <= length <= high),
        )
        for low, high in ranges
    ]


# 2. Tables for programs: one row a byte.

COLUMNS = (
    *("position", "byte", "character", "character_position"),
    *("entropy", "patch", "starts_patch", "reason"),
)
"""Of a row: position of the byte in the text, from 0; the byte; the character it belongs to (None: it is no
UTF-8) and the position of that character's first byte; entropy in nats before the byte (None: no patcher);
number of its patch, from 1 (the runtime's number 0 is that of BOS, which is left out); whether a patch starts
with it, and why (see `PatchView.reasons`), else None."""


def byte_rows(view: PatchView) -> Iterator[dict[str, Any]]:
    """A row for each byte, keys as in `COLUMNS`."""
    reasons = dict(zip(view.starts, view.reasons, strict=True))
    for character in characters(view.data):
        for position in range(character.start, character.end):
            values = (
                position,
                view.data[position],
                character.text,
                character.start,
                _entropy(view, position),
                view.patches[position],
                position in reasons,
                reasons.get(position),
            )
            yield dict(zip(COLUMNS, values, strict=True))


def csv_text(view: PatchView) -> str:
    r"""The rows with a header, each on one line. None is an empty cell; a character that can't be seen is
    written as \n, \x00, \u00a0 or \U000e0001 (a backslash itself is one backslash)."""
    out = io.StringIO()
    table = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    table.writeheader()
    for row in byte_rows(view):
        text = row["character"]
        if text is not None and text != " " and not text.isprintable():
            row["character"] = escape(text)
        row["starts_patch"] = int(row["starts_patch"])
        table.writerow(row)
    return out.getvalue()


def patch_document(view: PatchView) -> dict[str, Any]:
    """Everything: the text, the rule, the figures, a row for each byte, and what comes behind the text."""
    return {
        "text": view.data.decode("utf-8", "replace"),
        "conventions": "positions count the text's bytes from 0; BOS, a patch of its own, is left out, and "
        "patches count from 1; entropy is in nats, before the byte is known",
        "rule": asdict(view.rule),
        "windows": list(view.windows),
        "summary": asdict(summarize(view)),
        "next": {"entropy": _entropy(view, len(view.data)), "starts_patch": view.next_starts},
        "bytes": list(byte_rows(view)),
    }


def _entropy(view: PatchView, position: int) -> float | None:
    """Without the digits that float32 does not have."""
    return None if view.entropies is None else float(str(view.entropies[position]))
