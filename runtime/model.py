"""A loaded bundle: the public way to score, inspect and generate text."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .backends.base import StageBackend
from .batch import Batch, can_batch
from .choices import joined_choices, stream_choices
from .costs import CostTable
from .devices import LoadRequest, open_device, portable_stages
from .embedding import EmbeddingTable
from .engines import MOST_THREADS, PORTABLE, Engine
from .errors import (
    BackendError,
    BltError,
    BltWarning,
    BundleError,
    OptionError,
    ran_out_of_memory,
)
from .fields import checked_bytes, checked_call, checked_flag, checked_int, checked_texts, shown
from .generation import GenerationChunk, GenerationResult, joined, stream
from .guide import new_guide
from .integrity import check_files
from .kernels import kernel_family
from .lanes import LANE
from .load_checks import checked_settings, warn_of_threads, warn_of_validation
from .manifest import Manifest, load_manifest
from .many import joined_many, run_many
from .names import MOST_ROWS
from .options import GenerationOptions, asked_options
from .patching import PatchBoundaries, PatchingRule
from .processors import usable_cores
from .score_many import score_many
from .scoring import Score, score
from .sequence import PatcherState, Sequence, SequenceLimits
from .stages import Observer
from .state import TextState, new_state
from .state_file import read_state
from .vocabulary import encode

__all__ = ["BltModel"]

Floats = npt.NDArray[np.float32]


class BltModel:
    """A BLT bundle on a device. Thread-safe as long as each thread uses its own `Sequence`."""

    def __init__(
        self,
        manifest: Manifest,
        backends: dict[str, StageBackend],
        table: EmbeddingTable,
        limits: SequenceLimits,
        path: Path,
        engine: Engine = PORTABLE,
        portable: Callable[[], tuple[dict[str, StageBackend], Engine]] | None = None,
    ) -> None:
        """portable: opens what goes on when the engine fails while it runs; None = nothing does."""
        self.manifest = manifest
        self.limits = limits
        self.path = path
        self.engine = engine
        self.observer: Observer | None = None
        """Told of every run of a stage in sequences made from now on; None = nobody."""
        self._costs, self._pass_costs = CostTable(), CostTable()
        self._backends = backends
        self._table = table
        self._portable, self._switching = portable, threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: str = "auto",
        threads: int | None = None,
        *,
        verify: bool = False,
        prefill_chunk: int = 256,
        rollback: int = 64,
        portable: bool = False,
        probe: bool = True,
        provider_options: Mapping[str, str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> BltModel:
        """Load the bundle directory `path`.

        device: one of `DEVICES` (`devices` says what each is); auto takes the best there is, another is used
        or refused. threads: CPU threads; None takes what others leave free, and no more than were best when
        `blt-edge build` measured it (`engine.threads` tells). verify: read every file and compare its sha256
        (`progress(bytes done, bytes in all)`); otherwise large files are compared by samples. prefill_chunk:
        bytes that one pass takes at most (memory grows with it). rollback: bytes that can be taken back
        without computing again. portable: run the portable graphs even where the bundle has an
        engine for this device (`blt-edge build`). probe: let such an engine repeat what it gave when it was
        built, and use it only where that comes out again. provider_options: options of ONNX Runtime's
        provider, for the devices that are one. `engine` of the model tells what it runs from and on, and why.

        Raises BundleError (missing, damaged or unsafe bundle), BackendError (no engine), OptionError. Warns
        of a bundle that failed its last validation (FailedValidationWarning) or had none on kernels like
        these (NotValidatedHereWarning), of more threads than cores (BltWarning), and later when an engine
        fails while it runs and the portable graphs go on in its place.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise OptionError(f"path is {shown(path)}; allowed is the directory of a bundle")
        directory = Path(path)
        threads = None if threads is None else checked_int("threads", threads, 1, MOST_THREADS)
        for name, flag in (("verify", verify), ("portable", portable), ("probe", probe)):
            checked_flag(name, flag)
        checked_call("progress", progress)
        given = checked_settings(provider_options)
        manifest = load_manifest(directory)
        check_files(directory, manifest, full=verify, progress=progress)
        longest = manifest.axes["bytes"].max
        prefill_chunk = checked_int("prefill_chunk", prefill_chunk, 1, longest)
        rollback = checked_int("rollback", rollback, 0, longest)
        if threads is not None and threads > usable_cores():
            warn_of_threads(threads)
        table = EmbeddingTable.open(directory, manifest.embedding)
        request = LoadRequest(
            directory,
            manifest,
            device,
            threads,
            prefill_chunk,
            rollback,
            given,
            portable,
            table,
            probe,
            verify,
            progress,
        )

        def made(backends: dict[str, StageBackend], engine: Engine, **others: Any) -> BltModel:
            positions = min(manifest.model.max_positions, engine.max_bytes or manifest.model.max_positions)
            limits = SequenceLimits(prefill_chunk, rollback, positions, manifest.model.max_positions)
            return cls(manifest, backends, table, limits, directory, engine, **others)

        backends, engine = open_device(request, lambda *opened: made(*opened).probe())
        model = made(backends, engine, portable=portable_stages(request, engine))
        warn_of_validation(directory, manifest, model.kernels)
        return model

    def __repr__(self) -> str:
        manifest = self.manifest
        precision = "+".join(dict.fromkeys(stage.precision for stage in manifest.stages.values()))
        graphs = sum(map(manifest.stage_bytes, manifest.stages))
        sizes = f"{graphs / 1e6:.1f} MB of graphs, {manifest.embedding.bytes / 1e6:.1f} MB of tables"
        return (
            f"<BltModel {str(self.path)!r}: {precision}, tables {manifest.embedding.precision}; {sizes}; "
            f"{self.limits.max_positions} positions; {replace(self.engine, reason=None)}>"
        )

    @property
    def kernels(self) -> str:
        """Family of the kernels that compute: a validation tells of these alone."""
        return self.engine.kernels or kernel_family()

    def probe(self) -> None:
        """Run every stage once, whatever the device says of itself. Raises BackendError when that fails."""
        sequence = self.sequence()
        sequence.append(encode(b" "))  # which closes the patch that BOS is
        if not np.isfinite(sequence.logits).all():
            raise BackendError(f"{self.engine.device} computes no finite numbers; see blt-edge doctor")

    @property
    def costs(self) -> CostTable:
        """What runs of the stages have cost so far, which automatic drafting goes by; in a batch, its own."""
        lane = LANE.get()
        return self._costs if lane is None else lane.costs

    @property
    def rows(self) -> tuple[int, ...]:
        """Numbers of texts that there are graphs for, which take so many in one pass, ascending."""
        return self._backends["encoder"].rows

    @property
    def defaults(self) -> GenerationOptions:
        """Options of who asks for none: those of the checkpoint's `generation_config.json`, else greedy."""
        return self.manifest.generation.defaults

    def with_patching(self, rule: PatchingRule) -> BltModel:
        """The same model, its stages shared, cut by another rule. Raises BundleError without the patcher."""
        if rule.needs_entropy and "patcher" not in self._backends:
            raise BundleError(f"mode {rule.mode} needs an entropy patcher, and this model has none")
        other = copy(self)
        other.manifest = replace(self.manifest, patching=rule)
        other._costs, other._pass_costs, other._switching = CostTable(), CostTable(), threading.Lock()
        return other

    def sequence(self) -> Sequence:
        """A new, empty sequence; the first id it reads must be BOS (`vocabulary.encode` puts it there)."""
        return self._sequence(None)

    def restore(self, path: str | os.PathLike[str]) -> Sequence:
        """The sequence that `Sequence.save` wrote to the file at `path`, of this bundle on any engine.

        It goes on where the saved one stood, with the same numbers on the same engine; on another one with
        what that one rounds otherwise from there on. Raises StateError for a file that is missing, damaged or
        of another bundle or patching rule, or whose text is too long here, BackendError.
        """
        backends = self._backends
        state = new_state(self.manifest, backends, self.limits.cache)
        read_state(path, self.manifest, self.limits.max_positions, state)
        return self._sequence(state, backends)

    def _sequence(self, state: TextState | None, backends: dict[str, StageBackend] | None = None) -> Sequence:
        return Sequence(
            self.manifest,
            backends or self._backends,
            self._table,
            self.limits,
            self._observers,
            self._fall_back,
            state=state,
            engine=lambda: str(replace(self.engine, reason=None)),
        )

    def fork(self, sequence: Sequence) -> Sequence:
        """`Sequence.fork` of one of this model's, whose runs count where it goes on: in a batch, or not."""
        return sequence.fork(observers=self._observers)

    @property
    def _observers(self) -> tuple[Observer, ...]:
        return (self.costs.observe,) if self.observer is None else (self.costs.observe, self.observer)

    def goes_on(self, sequence: Sequence) -> bool:
        """Whether a sequence runs on what the model runs on now: not one that was begun before an engine
        failed, until it has come to that itself."""
        return sequence.runs_on(self._backends)

    def available_memory(self) -> int | None:
        """Bytes to be had now where texts' states are, the device's or the host's; None where unknown."""
        return self._backends["encoder"].memory.available()

    def _fall_back(self, error: BackendError, failed: dict[str, StageBackend]) -> dict[str, StageBackend]:
        """What goes on where `failed` did: the portable graphs, of which a warning tells once.

        Raises the error where they are what failed, or memory was short: they would need more.
        """
        with self._switching:
            if self._backends is not failed:
                return self._backends
            if self._portable is None or ran_out_of_memory(error):
                raise error
            try:
                backends, engine = self._portable()
            except (BltError, OSError, MemoryError) as too:
                raise BackendError(f"{error}; the portable graphs can't be loaded instead: {too}") from error
            failed_one = replace(self.engine, reason=None)
            self._backends, self._portable = backends, None
            self.engine = replace(engine, reason=f"{failed_one} failed: {error.told}")
        on_cpu = failed_one.device == PORTABLE.device
        remedy = f"blt-edge build --force {self.path} makes it again" if on_cpu else "see blt-edge doctor"
        told = f"{failed_one} failed, the portable graphs go on in its place; {remedy} ({error.told})"
        warnings.warn(told, BltWarning, stacklevel=2)
        return backends

    def logits(self, data: str | bytes) -> Floats:
        """float32 [1 + n, 260] for n bytes: row i follows BOS and the first i bytes."""
        return np.concatenate([result.logits for result in self.sequence().append(encode(data))])

    def entropies(self, data: str | bytes) -> Floats:
        """float32 [1 + n], nats: the patcher's uncertainty of the next byte after the same prefixes.

        Raises BundleError when the model has no entropy patcher, PromptTooLongError.
        """
        backends, ids, step = self._backends, encode(data), self.limits.prefill_chunk
        if "patcher" not in backends:
            raise BundleError("this model has no entropy patcher (patch_in_forward is false): no entropies")
        self.limits.check_positions(len(ids))

        def read(patcher: PatcherState) -> Floats:
            chunks = (ids[start : start + step] for start in range(0, len(ids), step))
            return np.concatenate([patcher.extend(chunk).copy() for chunk in chunks])

        try:
            return read(PatcherState(backends["patcher"], self.limits))
        except BackendError as error:
            return read(PatcherState(self._fall_back(error, backends)["patcher"], self.limits))

    def patch_lengths(self, data: str | bytes) -> list[int]:
        """Lengths (> 0) of the patches of BOS and the n bytes; their sum is 1 + n. PromptTooLongError."""
        boundaries, ids = PatchBoundaries(self.manifest.patching), encode(data)
        self.limits.check_positions(len(ids))
        boundaries.extend(ids, self.entropies(data) if self.manifest.patching.needs_entropy else None)
        return boundaries.patch_lengths()

    def trace(self, data: str | bytes) -> dict[str, Floats]:
        """Every stage's output over BOS and the n bytes, for comparing with a reference.

        byte_states [1+n, D]; patch_values [closed patches, V]; logits [1+n, 260]; and with an entropy patcher
        entropies [1+n] and patcher_logits [1+n, 260].
        """
        sequence = self.sequence()
        parts: dict[str, list[Floats]] = {"byte_states": [], "patch_values": [], "logits": []}
        for result in sequence.extend(encode(data)):
            parts["byte_states"].append(np.array(result.byte_states))
            parts["patch_values"].append(sequence.patch_values(result.closed))
            parts["logits"].append(result.logits.copy())
            if sequence.patcher is not None and result.entropies is not None:
                assert sequence.patcher.last_logits is not None
                parts.setdefault("entropies", []).append(result.entropies.copy())
                parts.setdefault("patcher_logits", []).append(sequence.patcher.last_logits.copy())
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def score(
        self,
        data: str | bytes | BinaryIO,
        *,
        context: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Score:
        """Bits per byte of `data` over all 260 classes, in windows of `context` ids, each from BOS.

        data may be an open file of any size. context None takes the trained context that the manifest names.
        progress(bytes done, bytes in all, 0 for a file). Raises OptionError for an empty text, or a context
        that the model has no positions for.
        """
        size = self.window(context)
        checked_call("progress", progress)
        text: Any = data if hasattr(data, "read") else checked_bytes("data", data)
        return score(self.sequence, text, size, progress)

    def score_many(
        self, texts: Iterable[str | bytes], *, context: int | None = None, rows: int | None = None
    ) -> Iterator[tuple[int, Score | OptionError]]:
        """What `score` tells of each of many texts: (index, Score), in no promised order.

        texts are taken as they are needed, so there may be more of them than memory holds. In the place of a
        Score there is an OptionError for a text that is empty (EmptyTextError) or no valid text. context as
        `score` takes it. rows: texts that one pass may read together. None takes as many as there are graphs
        for where all weights are float32, so that sums come out alike, and else one: what is rounded to whole
        numbers is summed in another order among others, and figures would differ in their last digits by what
        else there is. Raises OptionError for a context that the model has no positions for, rows that are no
        number from 1 on, texts that are one, and for a text that is neither str nor bytes.
        """
        size = self.window(context)
        if rows is None:
            alike = all(stage.precision == "fp32" for stage in self.manifest.stages.values())
            rows = max(self.rows, default=1) if alike and can_batch() else 1
        most = checked_int("rows", rows, 1, MOST_ROWS)
        batch = self.batch(most) if most > 1 else None
        checked_texts("texts", texts)
        return score_many(lambda data: score(self.sequence, data, size), texts, batch, most)

    def window(self, context: int | None = None) -> int:
        """Ids of a window that texts are scored in, BOS included, where `context` is asked for. Raises
        OptionError for less than 2 and for more than the model has positions for."""
        size = self.manifest.model.trained_context if context is None else context
        return checked_int("context", size, 2, self.limits.max_positions)

    def stream(
        self,
        prompt: str | bytes,
        options: GenerationOptions | None = None,
        *,
        sequence: Sequence | None = None,
        cancel: threading.Event | None = None,
        **named: Any,
    ) -> Iterator[GenerationChunk]:
        """Continue `prompt`, yielding text as it becomes certain; see `generation.stream`.

        options: None takes `defaults`, and `named` in the place of their fields of these names, such as
        max_new_bytes=64. sequence: one of this model's, to go on in; None begins a new text.
        Raises OptionError, for arguments before anything is read.
        """
        asked, data = self.checked_request(prompt, options, named, cancel)
        if sequence is not None and getattr(sequence, "manifest", None) is not self.manifest:
            raise OptionError(f"sequence is {shown(sequence)}; allowed is what sequence() of this model gave")
        return stream(
            self.sequence() if sequence is None else sequence,
            self.costs,
            data,
            asked,
            keep=sequence is not None,
            cancel=cancel,
        )

    def stream_choices(
        self,
        prompt: str | bytes,
        options: GenerationOptions | None = None,
        *,
        n: int,
        cancel: threading.Event | None = None,
        **named: Any,
    ) -> Iterator[tuple[int, GenerationChunk]]:
        """Continue `prompt` n >= 1 times and read it once: (which of them, its next piece).

        Their first pieces come together, as many as little memory allows, then one text after the other.
        Choice j is what `stream` makes with the same options, and seed + j where they have a seed. Once
        `cancel` is set, no other one begins. Raises OptionError as `stream`.
        """
        asked, data = self.checked_request(prompt, options, named, cancel)
        count = checked_int("n", n, 1)
        return stream_choices(self.sequence(), self.costs, data, asked, count, cancel=cancel)

    def choices(
        self,
        prompt: str | bytes,
        options: GenerationOptions | None = None,
        *,
        n: int,
        cancel: threading.Event | None = None,
        **named: Any,
    ) -> list[GenerationResult]:
        """What `stream_choices` yields, one result for each choice that began."""
        return joined_choices(self.stream_choices(prompt, options, n=n, cancel=cancel, **named))

    def batch(self, rows: int | None = None) -> Batch:
        """What runs work on several texts of this model in one thread, and passes for up to `rows` together.

        rows None: as many as the bundle has graphs for (`BltModel.rows`). Whatever a task of it does with
        sequences of this model takes part. Raises OptionError, also where greenlet is not installed.
        """
        texts = max(self.rows, default=1) if rows is None else checked_int("rows", rows, 1, MOST_ROWS)
        return Batch(texts, self.limits.prefill_chunk, self._pass_costs)

    def stream_many(
        self,
        prompts: Iterable[str | bytes],
        options: GenerationOptions | None = None,
        *,
        rows: int | None = None,
        cancel: threading.Event | None = None,
        **named: Any,
    ) -> Iterator[tuple[int, GenerationChunk]]:
        """Continue many prompts, several at a time: (number of the prompt, its next piece), as they come.

        Each text is what `stream` makes of its prompt with the same options, to the rounding of sums: passes
        take the new bytes of up to `rows` texts, which costs little more than those of one. rows None: as
        many as the bundle has graphs for (`BltModel.rows`); where it has none, texts take turns. Prompts are
        asked for when their turn comes; once `cancel` is set, no other one begins, and what goes on ends.
        Raises OptionError as `stream`; what is wrong with one prompt ends all. One thread has to go through
        all of it.
        """
        options, _ = self.checked_request(b"", options, named, cancel)
        checked_texts("prompts", prompts)
        texts = max(self.rows, default=1) if rows is None else checked_int("rows", rows, 1, MOST_ROWS)

        def work(prompt: str | bytes) -> Iterator[GenerationChunk]:
            return self.stream(prompt, options, cancel=cancel)

        return run_many(self.batch(texts), prompts, work, texts, cancel)

    def generate_many(
        self,
        prompts: Iterable[str | bytes],
        options: GenerationOptions | None = None,
        *,
        rows: int | None = None,
        cancel: threading.Event | None = None,
        **named: Any,
    ) -> list[GenerationResult]:
        """What `stream_many` yields, one result for each prompt that began."""
        return joined_many(self.stream_many(prompts, options, rows=rows, cancel=cancel, **named))

    def checked_request(
        self,
        prompt: str | bytes,
        options: GenerationOptions | None,
        named: Mapping[str, Any],
        cancel: threading.Event | None,
    ) -> tuple[GenerationOptions, bytes]:
        """Options and prompt of a call that takes what `stream` takes. Raises OptionError."""
        if cancel is not None and not callable(getattr(cancel, "is_set", None)):
            raise OptionError(f"cancel is {shown(cancel)}; allowed is a threading.Event, or None")
        asked = asked_options(options, named, self.defaults)
        if asked.constraint is not None:
            new_guide(asked)
        return asked, checked_bytes("prompt", prompt)

    def generate(
        self,
        prompt: str | bytes,
        options: GenerationOptions | None = None,
        *,
        sequence: Sequence | None = None,
        cancel: threading.Event | None = None,
        **named: Any,
    ) -> GenerationResult:
        """What `stream` yields until its end, in one."""
        return joined(self.stream(prompt, options, sequence=sequence, cancel=cancel, **named))
