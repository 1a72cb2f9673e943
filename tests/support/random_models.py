"""Small random BLT checkpoints whose numbers are worth comparing, and the text to compare them on.

transformers' own initialisation leaves all norms at one and all entropies alike, so that swapped weights or a
wrong boundary would hardly show. Here norms differ from one, logits spread over several units, entropies over
several nats, and the threshold lies in the middle of a wide gap between two entropies of the text, out of
rounding's reach.

Only numpy is needed, and the files come out the same on every platform and version: golden files that
transformers wrote elsewhere are compared with them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from blt_edge.export.checkpoint import open_checkpoint
from blt_edge.export.checkpoint_base import EMBEDDING, expected_tensors
from blt_edge.graphs.config import ModelConfig, parse_config
from blt_edge.tools.models.numpy_patcher import patcher_entropies
from blt_edge.tools.models.random_checkpoint import write_checkpoint_weights
from numpy.typing import NDArray

__all__ = [
    "PARITY_TEXT",
    "RandomModel",
    "base_config",
    "choose_threshold",
    "export_random_model",
    "random_tensors",
    "write_random_model",
]

_DATA = Path(__file__).parents[1] / "data"
_SCRIPTS = (
    "Ένα μικρό μοντέλο διαβάζει bytes. バイトを一つずつ読みます。小さな模型、没有词表。 "
    "छोटा मॉडल अक्षर नहीं, बाइट पढ़ता है। نموذج صغير يقرأ البايتات. "
    "Маленькая модель читает байты; naïve café, Ærø. 🐇⌚️👩🏽‍🔬 한국어도 괜찮아요. שלום!"
).encode()
_CODE = b"def add(a, b):\n    return a + b  # 1 + 2 == 3\n\n\tx[0] = {'k': None};\r\n"


def _stable_draws(key: str, count: int) -> NDArray[np.uint16]:
    """uint16 [count, 4], the same for a key everywhere.

    A hash's output, since no other is promised to stay: numpy may change what a Generator draws with any
    version, and logarithms and cosines differ in the last bit from processor to processor.
    """
    return np.frombuffer(hashlib.shake_256(key.encode()).digest(8 * count), "<u2").reshape(count, 4)


def _parity_text() -> bytes:
    """1,958 bytes: English, many scripts, code, every byte value in a shuffled order, and a repeated run."""
    alice = (_DATA / "alice.txt").read_bytes()
    order = np.argsort(_stable_draws("shuffled bytes", 256)[:, 0], kind="stable")
    shuffled = order.astype(np.uint8).tobytes()
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
    folder.mkdir(parents=True, exist_ok=True)
    config = {**model.config, "dtype": model.dtype}
    # transformers' own rule, so that a patcher is there wherever transformers wants its weights
    parsed = parse_config({**config, "patching_mode": "entropy"})
    shapes = expected_tensors(parsed)
    if parsed.tie_word_embeddings:
        del shapes[EMBEDDING]
    element = np.dtype(getattr(ml_dtypes, model.dtype, model.dtype)).newbyteorder("<")

    def blocks(name: str, shape: tuple[int, ...]) -> Iterator[bytes]:
        yield _weight(model, name, shape).astype(element).tobytes()

    write_checkpoint_weights(folder, shapes, model.dtype, blocks, shard_bytes=1 << 30)
    if model.share is not None:
        _write_config(folder, config)
        with open_checkpoint(folder) as checkpoint:
            assert parsed.patcher is not None
            entropies = patcher_entropies(checkpoint, parsed.patcher, text)
        config["patching_threshold"] = choose_threshold(entropies, config, model.share)
    _write_config(folder, config)
    return folder


def random_tensors(config: ModelConfig) -> dict[str, NDArray[np.float32]]:
    """Every tensor that a checkpoint of this config has, drawn as those of a random model are."""
    model = RandomModel("tensors", {})
    return {name: _weight(model, name, shape) for name, shape in expected_tensors(config).items()}


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def export_random_model(model: RandomModel, folder: Path) -> Path:
    """Write the checkpoint to `folder/checkpoint`, and its float32 bundle to `folder/bundle`, the result."""
    from blt_edge.export import export_checkpoint

    return export_checkpoint(write_random_model(model, folder / "checkpoint"), folder / "bundle")


def _weight(model: RandomModel, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Weights that keep activations near unit scale, make attention choose, and spread the logits.

    Norms are uniform from 0.6 to 1.4. All else is the sum of four uniform numbers, near enough to a normal
    one, whose exact integers leave nothing to rounding but the scale.
    """
    draws = _stable_draws(f"{model.seed} {name}", math.prod(shape)).astype(np.int64)
    if len(shape) == 1:
        return (0.6 + 0.8 / 65535 * draws[:, 0]).astype(np.float32)
    tied = bool(model.config.get("tie_word_embeddings"))
    unit = math.sqrt(4 * (65536**2 - 1) / 12)
    centred = (draws.sum(axis=1) - 2 * 65535).reshape(shape)
    result = (centred * (_deviation(name, shape[1], tied) / unit)).astype(np.float32)
    if name == "lm_head.weight":
        result[2] = 0.0  # else some texts would end early
    return result


def _deviation(name: str, inputs: int, tied: bool) -> float:
    if tied and name == "lm_head.weight":
        return 0.8 / math.sqrt(inputs)  # the embedding as well: a stronger one only repeats what it reads
    if "hash_tok_embedding" in name:
        return 0.5
    if "embed_tokens" in name:
        return 1.0
    gain = 2.5 if "lm_head" in name else 1.6 if "q_proj" in name or "k_proj" in name else 1.0
    return gain / math.sqrt(inputs)


def choose_threshold(entropies: NDArray[np.float32], config: Mapping[str, Any], share: float) -> float:
    """The middle of the widest gap between the values that decide, near the wanted share of boundaries.

    Rounded to few binary digits, so that the last bits of entropies [n] are none of its own.
    """
    values = np.diff(entropies)[1:] if config.get("monotonicity") else entropies[1:]
    if share <= 0:
        return 6.0  # above ln 260
    ordered = np.sort(values.astype(np.float64))
    if share >= 1:
        return _roundest(ordered[0] / 3, ordered[0] * 2 / 3)
    middle, reach = round((1 - share) * len(ordered)), max(2, len(ordered) // 30)
    low, high = max(0, middle - reach), min(len(ordered) - 1, middle + reach)
    widest = low + int(np.argmax(np.diff(ordered[low : high + 1])))
    below, above = ordered[widest], ordered[widest + 1]
    return _roundest(below + (above - below) / 3, above - (above - below) / 3)


def _roundest(low: float, high: float) -> float:
    """The number between these two with the fewest binary digits."""
    digits = 0
    while math.ceil(low * 2**digits) > high * 2**digits:
        digits += 1
    return math.ceil(low * 2**digits) / 2**digits
