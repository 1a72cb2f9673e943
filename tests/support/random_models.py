"""Small random BLT checkpoints whose numbers are worth comparing, and the text to compare them on.

transformers' own initialisation leaves all norms at one and all entropies alike, so that swapped weights or a
wrong boundary would hardly show. Here norms differ from one, logits spread over several units, entropies over
several nats, and the threshold lies in the middle of a wide gap between two entropies of the text, out of
rounding's reach.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blt_edge.export.reference import Reference, byte_ids, pick_margins

__all__ = ["PARITY_TEXT", "GreedySample", "RandomModel", "RandomModels", "base_config", "write_random_model"]

_DATA = Path(__file__).parents[1] / "data"
_SCRIPTS = (
    "Ένα μικρό μοντέλο διαβάζει bytes. バイトを一つずつ読みます。小さな模型、没有词表。 "
    "छोटा मॉडल अक्षर नहीं, बाइट पढ़ता है। نموذج صغير يقرأ البايتات. "
    "Маленькая модель читает байты; naïve café, Ærø. 🐇⌚️👩🏽‍🔬 한국어도 괜찮아요. שלום!"
).encode()
_CODE = b"def add(a, b):\n    return a + b  # 1 + 2 == 3\n\n\tx[0] = {'k': None};\r\n"


def _parity_text() -> bytes:
    """1,958 bytes: English, many scripts, code, every byte value in a shuffled order, and a repeated run."""
    alice = (_DATA / "alice.txt").read_bytes()
    shuffled = np.random.default_rng(0).permutation(256).astype(np.uint8).tobytes()
    return b"".join((alice[100:700], _SCRIPTS, _CODE, shuffled, alice[5000:5500], b"\0" * 20, _SCRIPTS[:101]))


PARITY_TEXT = _parity_text()


@dataclass(frozen=True)
class RandomModel:
    """A checkpoint to make; its name is its folder's."""

    name: str
    config: Mapping[str, Any]
    """`config.json` as it will be written, without the threshold."""
    share: float | None = 0.25
    """Wanted share of positions that start a patch: 1 every byte, 0 one long patch. None: no threshold."""
    seed: int = 0
    dtype: str = "float32"
    """The weights' type in the file."""
    prompt_bytes: int = 200
    """Length of the prompt of a greedy sample; with the greedy bytes it should pass the windows."""


@dataclass(frozen=True)
class GreedySample:
    """A prompt whose greedy continuation no rounding can change."""

    prompt: bytes
    data: bytes


def base_config(
    *,
    k: int = 2,
    width: int = 32,
    global_width: int | None = None,
    patcher: Mapping[str, Any] | None = None,
    encoder: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any] | None = None,
    global_stack: Mapping[str, Any] | None = None,
    **top: Any,
) -> dict[str, Any]:
    """A tiny `config.json`; `global_width` is k * width unless given, `top` holds top-level fields."""
    global_width = k * width if global_width is None else global_width
    heads = {"num_attention_heads": 4}
    local = {**heads, "hidden_size": width, "cross_attn_k": k, "hidden_size_global": global_width}
    return {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "vocab_size": 260,
        "cross_attn_k": k,
        "local_attention_window_len": 128,
        "encoder_hash_byte_group_size": [3, 4, 5],
        "encoder_hash_byte_group_vocab": 1009,
        "encoder_hash_byte_group_nb_functions": 1,
        "patcher_config": {
            **heads,
            "hidden_size": 40,
            "num_hidden_layers": 2,
            "intermediate_size": 72,
            "sliding_window": 128,
            **(patcher or {}),
        },
        "encoder_config": {**local, "num_hidden_layers": 1, "intermediate_size": 64, **(encoder or {})},
        "decoder_config": {**local, "num_hidden_layers": 2, "intermediate_size": 56, **(decoder or {})},
        "global_config": {
            **heads,
            "hidden_size": global_width,
            "num_hidden_layers": 2,
            "intermediate_size": 80,
            **(global_stack or {}),
        },
        **top,
    }


def write_random_model(model: RandomModel, folder: Path, text: bytes = PARITY_TEXT) -> Path:
    """Write `config.json` and `model.safetensors`; the config keeps the spelling it was given in."""
    import torch
    from transformers import BltConfig, BltForCausalLM

    built = BltForCausalLM(BltConfig(**model.config))
    _fill(built, model.seed)
    built.to(getattr(torch, model.dtype)).save_pretrained(folder)
    config = {**model.config, "dtype": model.dtype}
    if model.share is not None:
        with torch.inference_mode():
            ids = torch.tensor([byte_ids(text)])
            entropies = built.float().model.patcher(ids, patch_size=1, threshold=0.0)[0][0].numpy()
        config["patching_threshold"] = _threshold(entropies, config, model.share)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _fill(model: Any, seed: int) -> None:
    """Weights that keep activations near unit scale, make attention choose, and spread the logits."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(0.6, 1.4, generator=generator)
            else:
                weight.normal_(0.0, _deviation(name, weight.shape[1], tied), generator=generator)
        model.lm_head.weight[2] = 0.0  # else some texts would end early


def _deviation(name: str, inputs: int, tied: bool) -> float:
    if tied and name == "model.local_encoder.embed_tokens.weight":
        return 0.8 / inputs**0.5  # the head as well: a stronger one only repeats the byte it reads
    if "hash_tok_embedding" in name:
        return 0.5
    if "embed_tokens" in name:
        return 1.0
    gain = 2.5 if "lm_head" in name else 1.6 if "q_proj" in name or "k_proj" in name else 1.0
    return float(gain / inputs**0.5)


def _threshold(entropies: np.ndarray, config: Mapping[str, Any], share: float) -> float:
    """The middle of the widest gap between the values that decide, near the wanted share of boundaries."""
    values = np.diff(entropies)[1:] if config.get("monotonicity") else entropies[1:]
    if share <= 0:
        return 6.0  # above ln 260
    ordered = np.sort(values.astype(np.float64))
    if share >= 1:
        return float(ordered[0] / 2)
    middle, reach = round((1 - share) * len(ordered)), max(2, len(ordered) // 30)
    low, high = max(0, middle - reach), min(len(ordered) - 1, middle + reach)
    widest = low + int(np.argmax(np.diff(ordered[low : high + 1])))
    return float((ordered[widest] + ordered[widest + 1]) / 2)


class RandomModels:
    """Checkpoints, references and greedy samples by name, made once each under one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._references: dict[str, Reference] = {}
        self._samples: dict[tuple[str, int], GreedySample] = {}

    def folder(self, model: RandomModel) -> Path:
        """The checkpoint's folder, written at the first call."""
        folder = self._folder / model.name
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True)
            write_random_model(model, folder)
        return folder

    def reference(self, model: RandomModel) -> Reference:
        """transformers' view of the checkpoint."""
        if model.name not in self._references:
            self._references[model.name] = Reference.load(self.folder(model))
        return self._references[model.name]

    def greedy(self, model: RandomModel, count: int) -> GreedySample:
        """`count` greedy bytes after a stretch of the parity text, with every pick and every boundary clear.

        Prompts are tried until the picked logits lead by 1e-4, the entropies keep 1e-5 from the threshold and
        the bytes are not the same few over and over.
        """
        key = (model.name, count)
        if key not in self._samples:
            self._samples[key] = _find_sample(self.reference(model), count, model.prompt_bytes)
        return self._samples[key]


def _find_sample(reference: Reference, count: int, prompt_bytes: int) -> GreedySample:
    for start in range(0, 1200, 150):
        prompt = PARITY_TEXT[start : start + prompt_bytes]
        data = reference.greedy(prompt, count)
        trace = reference.trace(prompt + data)
        margin = float(pick_margins(trace.logits[len(prompt) : -1]).min())
        if reference.threshold is not None and trace.entropies is not None:
            margin = min(margin, 10 * float(np.abs(trace.entropies[1:] - reference.threshold).min()))
        if margin >= 1e-4 and len(data) == count and len(set(data)) >= 12:
            return GreedySample(prompt, data)
    raise AssertionError(f"{reference.name}: no prompt gives a clear greedy text; choose another seed")
