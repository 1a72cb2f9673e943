"""The oracle: transformers' own Byte Latent Transformer, run so that an exported model can be compared.

Float32 weights, eager attention, no cache, one unpadded row, and only Hugging Face folders. Where
transformers has no patching rule, or a non-causal one, boundaries are found here from Meta's description,
byte by byte and as plainly as possible, so that this can check the runtime's incremental patching without
sharing a line with it. torch and transformers are imported when a reference is loaded, never with this
module. Knows nothing of graphs, bundles or the runtime.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.errors import BltError, first_line, requirement
from ..runtime.paths import native_path
from .checkpoint_base import CheckpointError, read_json

__all__ = ["Reference", "ReferenceModelError", "ReferenceTrace", "pick_margins", "reference_available"]

Floats = npt.NDArray[np.float32]

SUPPRESSED = (0, 1, 3)
"""Special ids that a generation never picks, unless the model ends texts with one; id 2 always ends it."""

_BOS, _EOS, _OFFSET = 1, 2, 4
_THRESHOLD = 1.335442066192627
_OLDEST = (5, 23)


def patching_mode(config: Mapping[str, Any]) -> str:
    """The rule of a parsed `config.json`: "byte" where patching is switched off, else its `patching_mode`."""
    return str(config.get("patching_mode", "entropy")) if config.get("patch_in_forward", True) else "byte"


def transformers_patching(config: Mapping[str, Any]) -> bool:
    """Whether transformers by itself patches as a causal runtime must: plain entropy, or every byte a patch.

    Otherwise the lengths must be given to it: Meta's other rules are unknown to it, and with
    `max_patch_length` it loses the empty patch at the end of a text.
    """
    extras = ("monotonicity", "patching_threshold_add", "max_patch_length")
    mode = patching_mode(config)
    return mode == "byte" or (mode == "entropy" and not any(config.get(name) for name in extras))


def causal_starts(config: Mapping[str, Any], ids: Sequence[int], entropies: Floats | None) -> list[int]:
    """Patch starts over positions 0..n, n = len(ids), so that the last one may lie just behind the text.

    `config` is a parsed `config.json`: `patching_mode`, `patching_threshold`, `patching_threshold_add`,
    `monotonicity`, `patch_size`, `max_patch_length` and `patch_in_forward` count. `entropies` [n] are needed
    in mode "entropy" only.
    """
    starts = [0]
    longest = config.get("max_patch_length") or math.inf
    for i in range(len(ids)):
        full = i + 1 - starts[-1] >= longest
        if i == 0 or full or _begins(config, i, ids, entropies):
            starts.append(i + 1)
    return starts


def _begins(config: Mapping[str, Any], i: int, ids: Sequence[int], entropies: Floats | None) -> bool:
    """Whether position i + 1 >= 2 starts a patch, were patches as long as they like."""
    mode = patching_mode(config)
    if mode == "byte":
        return True
    if mode == "static":
        return bool(i % config.get("patch_size", 4) == 0)
    if mode == "space":
        return ids[i] < _OFFSET or (_space_like(ids[i]) and not _space_like(ids[i - 1]))
    if mode != "entropy" or entropies is None:
        raise ValueError(f"patching_mode {mode!r} with entropies {entropies}: no such rule")
    threshold = np.float32(config.get("patching_threshold", _THRESHOLD))
    add = config.get("patching_threshold_add")
    rise = entropies[i] - entropies[i - 1]
    if config.get("monotonicity"):
        return i == 1 or bool(rise > threshold)
    if add:
        return i == 1 or (i > 2 and bool(rise > np.float32(add) and entropies[i] > threshold))
    return bool(entropies[i] > threshold)


def _space_like(token: int) -> bool:
    byte = token - _OFFSET
    return byte < 0 or byte >= 0xC0 or (byte < 0x80 and not chr(byte).isalnum())


class ReferenceModelError(BltError):
    """torch or transformers is missing or too old, or transformers can't load the checkpoint."""


@dataclass(frozen=True, eq=False)
class ReferenceTrace:
    """What the reference computes of one text of n bytes, stage by stage. Arrays are float32."""

    data: bytes
    """The text, without BOS."""
    ids: npt.NDArray[np.int64]
    """[1 + n], BOS and the text."""
    patch_lengths: tuple[int, ...]
    """Lengths of all patches over the 1 + n ids and the position after them (sum n + 2); the last is open."""
    patcher_logits: Floats | None
    """[1 + n, 260]. None when the boundaries need no patcher."""
    entropies: Floats | None
    """[1 + n], nats. None when the boundaries need no patcher."""
    byte_states: Floats
    """[1 + n, D], the local encoder's output."""
    global_states: Floats
    """[P, global width], the global transformer's output of the P closed patches."""
    patch_values: Floats
    """[P, layers * 2 * kv_heads * head_dim * k], the decoder's cross-attention keys [kv_heads, head_dim, k]
    and values [kv_heads, k, head_dim] of the closed patches, layer by layer."""
    logits: Floats
    """[1 + n, 260]; row i follows BOS and the first i bytes."""


def reference_available() -> bool:
    """Whether torch and a new enough transformers are installed, found out without importing them."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return False
    return _release(version("transformers")) >= _OLDEST


def byte_ids(data: bytes) -> list[int]:
    return [_BOS, *(byte + _OFFSET for byte in data)]


def pick_margins(logits: Floats) -> Floats:
    """How far the largest allowed logit is above the runner-up: [n, 260] -> [n]."""
    allowed = np.delete(logits, SUPPRESSED, axis=-1)
    top = np.partition(allowed, -2, axis=-1)[..., -2:]
    return np.asarray(top[..., 1] - top[..., 0], dtype=np.float32)


class Reference:
    """A checkpoint in transformers. One text at a time; the last text's results are kept."""

    def __init__(
        self, model: Any, config: Mapping[str, Any], name: str, ends: Sequence[int] = (_EOS,)
    ) -> None:
        """`model` is an eager float32 BltForCausalLM, `config` its `config.json`; use `load`.

        ends: ids that end a generation.
        """
        self._model = model
        self._config = config
        self._ends = sorted({_EOS, *ends})
        self._suppressed = [token for token in SUPPRESSED if token not in ends]
        self._last: ReferenceTrace | None = None
        self.name = name
        """What it is, such as "transformers 5.23.0"."""

    @classmethod
    def load(cls, folder: str | Path) -> Reference:
        """Load a Hugging Face checkpoint folder in float32 on the CPU.

        Raises `ReferenceModelError` in one line when torch or transformers is missing or too old, when the
        folder is no such checkpoint, and when a weight is missing (transformers would make up a random one).
        """
        folder = Path(folder)
        torch, transformers = _import_packages()
        config = _read_config(folder)
        try:
            with _quiet(transformers), native_path(folder) as name:
                plain = transformers.BltConfig().to_dict()
                model, report = transformers.BltForCausalLM.from_pretrained(
                    name,
                    config=transformers.BltConfig.from_dict(_typed(config, plain)),
                    dtype=torch.float32,
                    attn_implementation="eager",
                    local_files_only=True,
                    output_loading_info=True,
                )
        except Exception as error:  # of any kind: safetensors, torch and transformers have their own
            raise ReferenceModelError(
                f"{folder}: transformers can't load it as a reference: {first_line(error)}"
            ) from error
        for kind in ("missing_keys", "mismatched_keys"):
            if report[kind]:
                raise ReferenceModelError(
                    f"{folder}: {kind.replace('_', ' ')}: {min(map(str, report[kind]))}"
                )
        model.eval()
        ends = model.generation_config.eos_token_id
        ends = config.get("eos_token_id") if ends is None else ends
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        # The rest of what the folder says of generating could change the picks.
        model.generation_config = transformers.GenerationConfig()
        return cls(model, config, f"transformers {transformers.__version__}", ends)

    @property
    def max_positions(self) -> int:
        """Positions, BOS included, that encoder and decoder were made for."""
        config = self._model.config
        parts = (config.encoder_config, config.decoder_config)
        return min(int(part.max_position_embeddings) for part in parts)

    @property
    def has_patcher(self) -> bool:
        """Whether the boundaries come from the patcher's entropies."""
        return patching_mode(self._config) == "entropy"

    @property
    def threshold(self) -> float | None:
        """The entropy above which the next byte starts a patch, in nats; None under any other rule."""
        plain = self.has_patcher and not any(
            self._config.get(name) for name in ("monotonicity", "patching_threshold_add")
        )
        return float(self._model.config.patching_threshold) if plain else None

    def trace(self, data: bytes) -> ReferenceTrace:
        """Every stage's output for BOS and `data`."""
        if self._last is None or self._last.data != data:
            self._last = self._run(data, None)
        return self._last

    def logits(self, data: bytes) -> Floats:
        """Next-byte logits, [1 + n, 260]; row i follows BOS and the first i bytes."""
        return self.trace(data).logits

    def patch_lengths(self, data: bytes) -> list[int]:
        """Lengths > 0 of the patches over BOS and `data`; they sum to 1 + n."""
        *closed, last = self.trace(data).patch_lengths
        return [*closed, last - 1] if last > 1 else closed

    def greedy(self, prompt: bytes, count: int) -> bytes:
        """Up to `count` bytes of greedy text after BOS and `prompt`, fewer where an id that ends texts comes.

        Runs transformers' `generate` without cache where transformers patches as it should, else one whole
        forward pass per byte with the lengths given.
        """
        if not transformers_patching(self._config):
            return self._greedy_by_steps(prompt, count, self._causal_lengths)
        if count == 0:
            return b""
        import torch

        ids = torch.tensor([byte_ids(prompt)])
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                use_cache=False,
                do_sample=False,
                suppress_tokens=self._suppressed or None,
                eos_token_id=self._ends,
                pad_token_id=_EOS,
            )
        made = takewhile(lambda token: token not in self._ends, out[0, ids.shape[1] :].tolist())
        return bytes(token - _OFFSET for token in made)

    def _greedy_by_steps(self, prompt: bytes, count: int, lengths: Callable[[bytes], Sequence[int]]) -> bytes:
        """`greedy` under another patching rule: `lengths(text so far)` as in `_run`."""
        data = prompt
        for _ in range(count):
            last = self._run(data, lengths(data)).logits[-1].copy()
            last[self._suppressed] = -np.inf
            token = int(last.argmax())
            if token in self._ends:
                break
            data += bytes([token - _OFFSET])
        return data[len(prompt) :]

    def _run(self, data: bytes, lengths: Sequence[int] | None) -> ReferenceTrace:
        """A forward pass, under given boundaries where `lengths` are not None.

        `lengths` > 0 cover the 1 + n ids and the position after them, which belongs to the last patch: they
        sum to n + 2. Raises ValueError when they don't.
        """
        import torch

        ids = torch.tensor([byte_ids(data)])
        end = ids.shape[1] + 1
        kept: dict[str, Any] = {}
        with torch.inference_mode(), _watched(self._model.model, kept):
            if lengths is None and not transformers_patching(self._config):
                lengths = self._causal_lengths(data)
            if lengths is not None and (sum(lengths) != end or min(lengths) < 1):
                shown = f"{list(lengths)[:20]} of sum {sum(lengths)}"
                raise ValueError(f"patch lengths {shown}: they must be positive and sum to {end}")
            given = None if lengths is None else torch.tensor([list(lengths)])
            logits = self._model(ids, patch_lengths=given, use_cache=False).logits
        patcher = kept.get("patcher") if self.has_patcher else None
        if lengths is None:
            # Over a text the last length may be 0; the position after the text is added.
            lengths = [1] * end if patcher is None else patcher[1][0].tolist()
            if patcher is not None:
                lengths[-1] += 1
        closed = len(lengths) - 1
        return ReferenceTrace(
            data=data,
            ids=ids[0].numpy(),
            patch_lengths=tuple(lengths),
            patcher_logits=_array(patcher[2]) if patcher else None,
            entropies=_array(patcher[0]) if patcher else None,
            byte_states=_array(kept["local_encoder"][0]),
            global_states=_array(kept["global_transformer"])[:closed],
            patch_values=self._patch_values(kept)[:closed],
            logits=_array(logits),
        )

    def _causal_lengths(self, data: bytes) -> list[int]:
        """Lengths over the ids and the position after them, under a rule that transformers lacks."""
        import torch

        ids, entropies = byte_ids(data), None
        if self.has_patcher:
            with torch.inference_mode():
                patcher = self._model.model.patcher(torch.tensor([ids]), patch_size=1, threshold=0.0)
            entropies = _array(patcher[0])
        starts = causal_starts(self._config, ids, entropies)
        return [int(length) for length in np.diff([*starts, len(ids) + 1])]

    def _patch_values(self, kept: Mapping[str, Any]) -> Floats:
        """The decoder's cross-attention keys and values as they left their projections, flat per patch."""
        decoder = self._model.model.local_decoder
        k, heads = decoder.config.cross_attn_k, decoder.config.num_key_value_heads
        flat = []
        for index in range(len(decoder.cross_attn_layers)):
            for name, axes in (("k_proj", (0, 2, 3, 1)), ("v_proj", (0, 2, 1, 3))):
                rows = _array(kept[f"{name}.{index}"])
                by_head = rows.reshape(len(rows) // k, k, heads, rows.shape[1] // heads).transpose(axes)
                flat.append(by_head.reshape(len(by_head), -1))
        return np.concatenate(flat, axis=1)


@contextmanager
def _watched(model: Any, kept: dict[str, Any]) -> Iterator[None]:
    watched = {name: getattr(model, name) for name in ("patcher", "local_encoder", "global_transformer")}
    for index, layer in enumerate(model.local_decoder.cross_attn_layers):
        watched[f"k_proj.{index}"], watched[f"v_proj.{index}"] = layer.k_proj, layer.v_proj

    def keep(name: str) -> Callable[[Any, Any, Any], None]:
        return lambda module, inputs, output: kept.__setitem__(name, output)

    hooks = [part.register_forward_hook(keep(name)) for name, part in watched.items() if part is not None]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _array(tensor: Any) -> Floats:
    """The first row of a batch as float32."""
    return np.ascontiguousarray(tensor[0].float().numpy())


def _import_packages() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ReferenceModelError(
            f"the reference needs torch and transformers ({error}): pip install {requirement('validate')}"
        ) from error
    if _release(transformers.__version__) < _OLDEST:
        raise ReferenceModelError(
            f"transformers {transformers.__version__} is too old to compare with, at least 5.23 is needed: "
            f"pip install -U {requirement('validate')}"
        )
    return torch, transformers


def _release(installed: str) -> tuple[int, ...]:
    parts = installed.split(".")[:2]
    return tuple(int(part) if part.isdecimal() else 0 for part in parts)


def _read_config(folder: Path) -> Mapping[str, Any]:
    try:
        config = read_json(folder / "config.json")
    except CheckpointError as error:
        raise ReferenceModelError(f"no Hugging Face checkpoint: {error}") from error
    if config.get("model_type") != "blt":
        raise ReferenceModelError(
            f"{folder}: config.json is not of model_type blt; the reference must be a Hugging Face BLT folder"
        )
    return config


def _typed(value: Any, default: Any) -> Any:
    """Numbers as transformers insists on having them: 2 for 2.0, but 2.0 where the default is a float."""
    if isinstance(value, dict):
        defaults = default if isinstance(default, dict) else {}
        return {name: _typed(item, defaults.get(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_typed(item, None) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(default, float):
        return float(value)
    whole = isinstance(value, float) and value.is_integer() and not isinstance(default, float)
    return int(value) if whole else value


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the terminal: the caller shows progress."""
    logging = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
