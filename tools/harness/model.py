"""The model that lm-evaluation-harness drives: texts in, log probabilities and continuations out.

Probabilities are of bytes, over all 260 classes, each text after BOS: nothing is tokenized, so no space moves
between a context and its continuation. Requests are sorted so that what several begin with is read once: a
context's continuations go on in forks of its state, and a store keeps the states where contexts part.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from ...runtime import BltModel, GenerationOptions, PrefixStore, Sequence
from ...runtime.errors import BltWarning, OptionError
from ...runtime.fields import checked_bytes, checked_int, shown
from ...runtime.sampling import log_probabilities
from ...runtime.vocabulary import byte_ids, encode
from .spans import Span, common_length, spans

__all__ = ["BltEdgeLM"]

_FEW = 64
"""Bytes that are read again rather than kept in a state more."""
_NEW_BYTES = 256
_DEFAULT_DEVICE = "cuda:0"
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")


@register_model("blt-edge")
class BltEdgeLM(LM):  # type: ignore[misc]
    """A bundle, as the harness asks for it: `--model blt-edge --model_args pretrained=BUNDLE,threads=2`."""

    def __init__(
        self,
        pretrained: str = "",
        *,
        device: str = "auto",
        threads: int | None = None,
        max_length: int | None = None,
        bytes_per_token: int = 1,
        memory: int | None = None,
        batch_size: object = 1,
        max_batch_size: object = None,
        **unknown: object,
    ) -> None:
        """pretrained: the bundle's directory; device and threads as `BltModel.load` takes them. Device
        cuda:0, which the harness gives where nobody asks for one, is auto.

        max_length: ids of a window, BOS included; None is the trained context. bytes_per_token: bytes
        generated for each token of a task's `max_gen_toks`. memory: bytes for states of what contexts begin
        with, None as in `PrefixStore`. batch_size, max_batch_size: the harness gives them; texts are read one
        after the other. Raises OptionError, also without a bundle and for any other argument, and what `load`
        raises.
        """
        super().__init__()
        if unknown:
            raise OptionError(
                f"model_args has {next(iter(unknown))!r}; allowed are pretrained, threads, max_length, "
                "bytes_per_token and memory"
            )
        if not pretrained:
            raise OptionError("model_args has no pretrained; give --model_args pretrained=BUNDLE")
        if batch_size not in (1, "1", "auto"):
            _warn(f"batch_size {batch_size} has no effect: texts are read one after the other")
        self.model = BltModel.load(pretrained, "auto" if device == _DEFAULT_DEVICE else device, threads)
        if max_length is not None:
            checked_int("max_length", max_length, 2, self.model.limits.max_positions)
        self.max_length = self.model.window(max_length)
        self._store = PrefixStore(self.model, memory)
        self._bytes_per_token = checked_int("bytes_per_token", bytes_per_token, 1)
        self._suppressed = list(self.model.manifest.generation.suppressed)
        self._warned: set[str] = set()

    def get_model_info(self) -> dict[str, Any]:
        """What results say of the model."""
        manifest = self.model.manifest
        return {
            "model_source": manifest.source.name,
            "model_fingerprint": manifest.fingerprint,
            "model_engine": str(self.model.engine),
            "model_num_parameters": sum(stage.parameters for stage in manifest.stages.values()),
            "max_length": self.max_length,
        }

    # 1. Probabilities.

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each request's (context, continuation): natural log of the continuation's probability after BOS
        and the context, and whether it is what greedy decoding chooses.

        Of a context that does not fit the end is read; see `spans`.
        """
        texts = []
        for request in requests:
            context, continuation = (checked_bytes("the text", part) for part in request.args)
            texts.append((context + continuation, len(context)))
        found = self._scored(texts, "loglikelihood", disable_tqdm)
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each request's (text,): natural log of its probability after BOS, in windows; see `spans`."""
        texts = [(checked_bytes("the text", request.args[0]), 0) for request in requests]
        found = [total for total, _ in self._scored(texts, "loglikelihood_rolling", disable_tqdm)]
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return found

    def _scored(self, texts: list[tuple[bytes, int]], what: str, quiet: bool) -> list[tuple[float, bool]]:
        """Of each (text, first): log probability of text[first:], and whether each byte is the likeliest."""
        wanted = [list(spans(text, first, self.max_length)) for text, first in texts]
        distinct = sorted({span for parts in wanted for span in parts})
        known = dict(zip(distinct, self._spans(distinct, what, quiet), strict=True))
        return [
            (math.fsum(known[span][0] for span in parts), all(known[span][1] for span in parts))
            for parts in wanted
        ]

    def _spans(self, ordered: list[Span], what: str, quiet: bool) -> Iterator[tuple[float, bool]]:
        """Of each span, in their order, which is that of what is before them."""
        groups = [(before, list(spans)) for before, spans in groupby(ordered, lambda span: span.before)]
        with tqdm(total=len(ordered), disable=quiet, desc=f"Running {what} requests") as bar:
            for index, (before, together) in enumerate(groups):
                following = groups[index + 1][0] if index + 1 < len(groups) else b""
                sequence = self._read(before, common_length(before, following))
                for left, span in zip(range(len(together) - 1, -1, -1), together, strict=True):
                    yield self._score(sequence.fork() if left else sequence, span.scored)
                    bar.update()

    def _read(self, before: bytes, parting: int) -> Sequence:
        """A sequence that has read BOS and `before`. A state is kept where the next context parts from it."""
        found = self._store.find(before)
        sequence, known = (self.model.sequence(), -1) if found is None else found
        ids = encode(before)[1 + known :]
        shared = parting - known if parting - max(0, known) >= _FEW else 0
        if shared:
            _extend(sequence, ids[:shared])
            self._store.keep(sequence)
        _extend(sequence, ids[shared:])
        return sequence

    def _score(self, sequence: Sequence, scored: bytes) -> tuple[float, bool]:
        """Reads all but the last of these bytes, and judges each by the logits before it."""
        targets = byte_ids(scored)
        total, greedy = self._judged(sequence.logits[None], targets[:1])
        done = 1
        for result in sequence.extend(targets[:-1]):
            count = len(result.logits)
            part, likeliest = self._judged(result.logits, targets[done : done + count])
            total, greedy, done = total + part, greedy and likeliest, done + count
        return total, greedy

    def _judged(self, rows: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]) -> tuple[float, bool]:
        logs = log_probabilities(rows)
        allowed = logs.copy()
        allowed[:, self._suppressed] = -np.inf
        total = logs[np.arange(len(targets)), targets].sum()
        return float(total), bool((allowed.argmax(axis=-1) == targets).all())

    # 2. Text.

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Of each request's (context, options): what the model adds, up to the first of the stop strings.

        options: until, max_gen_toks (times `bytes_per_token`, 256 bytes by default), do_sample, temperature,
        top_k, top_p, min_p and repetition_penalty. Of a context that does not fit the end is read. Raises
        OptionError for values out of range, and more to add than a window holds.
        """
        texts: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda index: str(requests[index].args[0]))
        for index in tqdm(order, disable=disable_tqdm, desc="Running generate_until requests"):
            context, given = requests[index].args
            options = self._options(given)
            room = self.max_length - options.max_new_bytes
            if room < 1:
                raise OptionError(
                    f"max_gen_toks asks for {options.max_new_bytes} bytes; allowed are fewer than the "
                    f"{self.max_length} ids of a window (max_length)"
                )
            # The last new byte is never read, so BOS and this many fit.
            prompt = checked_bytes("the context", context)[-room:]
            texts[index] = self._store.generate(prompt, options).text
            self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return [texts[index] for index in range(len(requests))]

    def _options(self, given: Mapping[str, Any]) -> GenerationOptions:
        asked = dict(given)
        until = asked.pop("until", None) or ()
        stops = tuple(filter(None, (until,) if isinstance(until, str) else until))
        limits = [asked.pop(name) for name in _LIMITS if asked.get(name) is not None]
        count = _NEW_BYTES
        if limits:
            count = checked_int("max_gen_toks", limits[0], 1) * self._bytes_per_token
        sampled = asked.pop("do_sample", None)
        temperature = asked.pop("temperature", 1.0 if sampled else 0.0)
        named = {name: asked.pop(name) for name in _SAMPLING if asked.get(name) is not None}
        for name in sorted(name for name, value in asked.items() if value is not None):
            if name not in self._warned:
                self._warned.add(name)
                _warn(f"gen_kwargs has {name}={shown(asked[name])}, which has no effect here")
        return GenerationOptions(
            max_new_bytes=count,
            temperature=0.0 if sampled is False else temperature,
            seed=random.getrandbits(32),  # the harness seeds it
            stop=stops,
            **named,
        )

    # 3. What a bundle has not.

    def chat_template(self, chat_template: bool | str = False) -> str:
        """None: the empty text. Raises OptionError where one is asked for."""
        if chat_template:
            raise OptionError(
                "chat templates are applied by blt-edge serve alone; leave out --apply_chat_template"
            )
        return ""

    def apply_chat_template(self, chat_history: Iterable[Any], add_generation_prompt: bool = True) -> str:
        """Raises OptionError."""
        return self.chat_template(True)

    @property
    def tokenizer_name(self) -> str:
        return "bytes"


def _extend(sequence: Sequence, ids: npt.NDArray[np.int64]) -> None:
    for _ in sequence.extend(ids):
        pass


def _warn(told: str) -> None:
    warnings.warn(told, BltWarning, stacklevel=3)
