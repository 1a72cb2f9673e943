"""Texts scored column by column, for whoever spreads a corpus over processes and machines.

A `Scorer` is a plain callable object that can be pickled: Ray Data, Spark, Dask and multiprocessing send it
to their workers as it stands. What is sent is where the bundle is and how it is to be run, never the model,
which each process loads when it scores its first batch and keeps for the next ones. A text's row depends on
nothing but the text, so batches may be cut anywhere. What it does not know: where texts come from, and who
runs it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .engines import MOST_THREADS
from .errors import BundleError, OptionError
from .fields import checked_bytes, checked_flag, checked_int, shown
from .manifest import load_manifest
from .model import BltModel
from .names import DEVICES, MOST_ROWS
from .patching import PatchingRule
from .scoring import Score
from .words import count_words

__all__ = ["COLUMNS", "Scorer"]

Column = npt.NDArray[Any]

COLUMNS: dict[str, str] = {
    "bits_per_byte": "float64",
    "bits": "float64",
    "bytes": "int64",
    "words": "int64",
    "patches": "int64",
    "windows": "int64",
    "error": "object",
}
"""The columns that a `Scorer` adds, with their numpy dtypes; those of `error` are str."""

_KEPT = 2
_loading = threading.Lock()


class Scorer:
    """Adds to columns of texts what scoring them gives. Can be pickled, before its first batch and after.

    Of each text (over all 260 classes, in windows of `context` ids, each from BOS):

    - bits_per_byte float64: mean negative log2 probability of its bytes, nan where there is an error;
    - bits float64: of all its bytes together. `math.fsum` of this column over any number of batches, in any
      order, is the same number to the last bit;
    - bytes int64: its length, that of its UTF-8 for a str;
    - words int64: longest runs of bytes that are no white space (see `words`);
    - patches int64: patches of its bytes, without the one of each window that BOS is alone in;
    - windows int64: windows that it was scored in;
    - error object (str): why it has no score, on one line, "" where it has one. An empty text has none, nor
      has what is no text; the numbers beside it are 0.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        device: str = "auto",
        threads: int | None = None,
        context: int | None = None,
        rows: int = 1,
        text: str = "text",
        rule: PatchingRule | None = None,
        prefill_chunk: int = 256,
        probe: bool = True,
        provider_options: Mapping[str, str] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """bundle: a directory that every process can read under this path; a relative one is taken from here.

        device, threads, prefill_chunk, probe and provider_options as `BltModel.load` takes them, context and
        rows as `BltModel.score_many`: with 1 a text's figures are the same whatever batch it is in, with more
        short texts share passes, and last digits may differ. text: the column that holds the texts, str or
        bytes each. rule: cuts patches in the place of the bundle's own. fingerprint: `Manifest.fingerprint`
        of the bundle that is meant, so that another machine's copy can't be another one; None takes what is
        there.

        Raises OptionError. That the bundle is there is looked at when the first batch comes.
        """
        if not isinstance(bundle, (str, os.PathLike)) or isinstance(os.fspath(bundle), bytes):
            raise OptionError(f"bundle is {shown(bundle)}; allowed is the directory of a bundle")
        if context is not None:
            checked_int("context", context, 2)
        checked_int("rows", rows, 1, MOST_ROWS)
        if not isinstance(text, str) or not text or text in COLUMNS:
            taken = ", ".join(COLUMNS)
            raise OptionError(f"text is {shown(text)}; allowed is a column's name, but none of {taken}")
        given = {} if provider_options is None else provider_options
        if not isinstance(given, Mapping) or not all(map(_is_text, (*given, *given.values()))):
            raise OptionError(f"provider_options is {shown(given)}; allowed is a dict of text to text")
        self.text, self.context, self.rows = text, context, rows
        self._asked = _Asked(
            bundle=os.path.abspath(bundle),  # noqa: PTH100 - links are left to who reads there
            device=device,
            threads=threads,
            prefill_chunk=prefill_chunk,
            probe=probe,
            provider_options=tuple(sorted(given.items())),
            rule=rule,
            fingerprint=fingerprint,
        )

    def __repr__(self) -> str:
        return f"<Scorer of column {self.text!r} with {self._asked.bundle!r}>"

    def __call__(self, batch: Mapping[str, Column]) -> dict[str, Column]:
        """The batch's columns as they are and those of `COLUMNS`; every column has one value for each text.

        batch: arrays [n] of one length, n >= 0, the texts as objects (str or bytes) or in fixed width ("S",
        "U"), which numpy keeps without the zeros at their end. Nothing in it is changed.

        Raises OptionError for a batch without the texts or with a column of a name in `COLUMNS`, BundleError
        and BackendError as `BltModel.load`.
        """
        columns = self._checked(batch)
        texts = columns[self.text]
        added = {name: np.zeros(len(texts), dtype) for name, dtype in COLUMNS.items()}
        added["error"][:] = ""
        added["bits_per_byte"][:] = np.nan
        places, data = _readable(texts, added["error"])
        for index, found in self._scores(data):
            place, text = places[index], data[index]
            if isinstance(found, Exception):
                added["error"][place] = str(found)
                continue
            added["bits_per_byte"][place], added["bits"][place] = found.bits_per_byte, found.bits
            added["bytes"][place], added["words"][place] = len(text), count_words(text)
            added["patches"][place], added["windows"][place] = found.patches - found.windows, found.windows
        return {**columns, **added}

    def _checked(self, batch: Mapping[str, Column]) -> dict[str, Column]:
        if not isinstance(batch, Mapping):
            raise OptionError(f"batch is {shown(batch)}; allowed is a dict of columns")
        columns = {name: np.asarray(column) for name, column in batch.items()}
        if self.text not in columns:
            there = ", ".join(map(str, columns)) or "none"
            raise OptionError(f"there is no column {self.text!r} of texts; the columns are: {there}")
        if taken := [name for name in columns if name in COLUMNS]:
            raise OptionError(f"column {taken[0]!r} is one that scoring adds; rename it")
        texts = columns[self.text]
        if texts.ndim != 1 or texts.dtype.kind not in "OSU":
            told = f"an array of {texts.ndim} axes and dtype {texts.dtype}"
            raise OptionError(f"column {self.text!r} is {told}; allowed is one axis of str or bytes")
        for name, column in columns.items():
            if column.ndim < 1 or len(column) != len(texts):
                raise OptionError(f"column {name!r} has not one value for each of the {len(texts)} texts")
        return columns

    def _scores(self, texts: list[bytes]) -> Iterator[tuple[int, Score | OptionError]]:
        if texts:  # a model is not loaded for none
            yield from self.model.score_many(texts, context=self.context, rows=self.rows)

    @property
    def model(self) -> BltModel:
        """The model as this process has it, loaded where it is not there yet. Raises as `__call__`."""
        with _loading:  # two threads would load it twice
            return _loaded(self._asked, os.getpid())


@dataclass(frozen=True)
class _Asked:
    """How a model is to be loaded: what two scorers have to agree in to share one."""

    bundle: str
    device: str
    threads: int | None
    prefill_chunk: int
    probe: bool
    provider_options: tuple[tuple[str, str], ...]
    rule: PatchingRule | None
    fingerprint: str | None

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise OptionError(f"device is {shown(self.device)}; allowed are {', '.join(DEVICES)}")
        if self.threads is not None:
            checked_int("threads", self.threads, 1, MOST_THREADS)
        checked_int("prefill_chunk", self.prefill_chunk, 1)
        checked_flag("probe", self.probe)
        if self.rule is not None and not isinstance(self.rule, PatchingRule):
            raise OptionError(f"rule is {shown(self.rule)}; allowed is a PatchingRule, or None")
        if self.fingerprint is not None and not _is_text(self.fingerprint):
            raise OptionError(f"fingerprint is {shown(self.fingerprint)}; allowed is a text, or None")


# A pool of processes unpickles its function for every task: what one has loaded is there for the next. The
# process is a part of the key since sessions do not live through a fork.
@lru_cache(maxsize=_KEPT)
def _loaded(asked: _Asked, process: int) -> BltModel:
    manifest = load_manifest(asked.bundle)
    if asked.fingerprint not in (None, manifest.fingerprint):
        raise BundleError(
            f"{asked.bundle} is another bundle here: its fingerprint is {manifest.fingerprint[:16]}, meant "
            f"is {str(asked.fingerprint)[:16]}; give every machine the same one"
        )
    model = BltModel.load(
        asked.bundle,
        asked.device,
        asked.threads,
        prefill_chunk=asked.prefill_chunk,
        probe=asked.probe,
        provider_options=dict(asked.provider_options),
    )
    return model if asked.rule is None else model.with_patching(asked.rule)


def _readable(texts: Column, errors: Column) -> tuple[list[int], list[bytes]]:
    """Places and bytes of what is text; `errors` gets the reasons of what is none."""
    places, data = [], []
    for place, text in enumerate(texts):
        try:
            data.append(checked_bytes("the text", text))
        except OptionError as error:
            errors[place] = str(error)
            continue
        places.append(place)
    return places, data


def _is_text(value: object) -> bool:
    return isinstance(value, str)
