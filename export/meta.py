"""A checkpoint in one of Meta's own layouts, presented under Hugging Face names with a Hugging Face config.

| | its hub models | its download script, its training | its `convert_to_transformers` |
|---|---|---|---|
| model | `config.json`: `{"args": ...}` | `params.json`: `{"model": ..., "data": ...}` | as on the hub |
| how it was trained | `train_args.json`, like `params.json` | the same file | as on the hub |
| entropy model in | `entropy_model/` | `../entropy_model/` | `../entropy/` |
| described by | `params.json`: `{"entropy_model": ...}` | the same | `config.json`: `{"args": ...}` |
| weights | `model.safetensors`, or its shards | `consolidated.pth` | as on the hub |

`args` and `model` are the fields of ByteLatentTransformerArgs, `data.patcher_args` is how texts were patched.
Any weights' file is taken in any layout, and `consolidated.safetensors` too.

Weights are taken as they are: both layouts rotate interleaved pairs, so nothing is permuted. Each hash
table is a tensor of its own here; together, in order, they are Hugging Face's fused one. The name map is
that of transformers' `convert_blt_weights_to_hf.py`. Fields of training, logging and kernels are ignored;
those that would change what the model computes are checked against the one value that the graphs implement.

A `.pth` file is read without running what its pickle says: torch's `weights_only` restricts it to tensors
and plain containers. It is mapped, so that only what is asked for is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..graphs.fields import ConfigError
from ..runtime.errors import first_line, requirement
from ..runtime.fields import shown
from ..runtime.paths import native_path
from .checkpoint_base import (
    HASH_EMBEDDING,
    Checkpoint,
    CheckpointError,
    StoredTensor,
    one_line,
    read_json,
    sample_blocks,
)
from .huggingface import SafetensorsFile, open_weights

Fields = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

_ONLY: Fields = {
    "use_rope": True,
    "non_linearity": "swiglu",
    "norm_type": "rmsnorm",
    "pre_norm": True,
    "norm_affine": True,
    "alpha_depth": "disabled",
    "cross_attn_encoder": True,
    "cross_attn_decoder": True,
    "cross_attn_init_by_pooling": True,
    "downsampling_by_pooling": "max",
    "encoder_enable_byte_ngrams": False,
    "tokenize_with_bpe_delimiter": False,
    "pm_size": 0,
}
_UNSET = (
    "cross_attn_window_encoder",
    "cross_attn_window_decoder",
    "global_local_decoder_residual_layer",
    "conv_kernel_size",
)
_PATCHER_WINDOW = 512
"""The window that Meta's loader gives every entropy model, whatever its params say."""

ENTROPY_FOLDERS = ("entropy_model", "entropy", "blt-entropy")
"""What the entropy model's folder beside the model's is called: by the download script, by the converter,
and on the hub."""
_SINGLE_FILES = ("consolidated.safetensors", "consolidated.pth")

_HASH_TABLES = "encoder_hash_tok_embedding."
_SEGMENTS = {
    "attention": "self_attn",
    "feed_forward": "mlp",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "embed_tokens",
    "cross_attn_norm_q": "q_norm",
    "cross_attn_norm_kv": "k_norm",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "output": "lm_head",
}


class TorchFile:
    """One `.pth` file's state dict, at the top or under `model` or `state_dict`. Raises `CheckpointError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            import torch
        except ImportError as error:
            raise CheckpointError(
                f"{path}: reading a .pth file needs torch: pip install {requirement('validate')}"
            ) from error
        self._torch = torch
        try:
            with native_path(path) as name:
                loaded = torch.load(name, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged or hostile pickle can raise nearly anything
            # torch's own first line advises to run what is in the file.
            told = str(error).partition("WeightsUnpickler error: ")[2].partition(". ")[0] or first_line(error)
            raise CheckpointError(
                f"{path}: not a readable file of plain tensors: {one_line(told)}; fetch it again"
            ) from error
        for wrapper in ("model", "state_dict"):
            if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
                loaded = loaded[wrapper]
        if not isinstance(loaded, Mapping):
            raise CheckpointError(f"{path}: holds {type(loaded).__name__}, expected a dict of tensors")
        self._tensors: dict[str, Any] = {
            str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)
        }

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        torch, tensor = self._torch, self._tensors[name]
        names = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
        if tensor.dtype not in names or tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(
                f"{self.path}: tensor {one_line(name)} is {tensor.dtype}, {tensor.layout}, on "
                f"{tensor.device}; allowed: dense {', '.join(names.values())}"
            )
        return names[tensor.dtype]

    def read(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        self.dtype(name)
        tensor = self._tensors[name]
        part = tensor[start:stop] if tensor.ndim else tensor
        array: NDArray[np.float32] = part.detach().to(self._torch.float32, copy=True).contiguous().numpy()
        return array

    def fingerprint(self, digest: Any) -> None:
        sample_blocks(self.path, digest)

    def close(self) -> None:
        self._tensors = {}


def patching_mode(args: Fields, patcher_args: Fields) -> str:
    """The main model's rule. An entropy model's own `patcher_args` tell how that one was trained, "byte" in
    the released ones.
    """
    return str(
        _agreed(args, "patching_mode", patcher_args, "patching_mode", "data.patcher_args") or "entropy"
    )


def huggingface_config(
    args: Fields, params: Fields | None, gate_shapes: Shapes, patcher_args: Fields | None = None
) -> dict[str, Any]:
    """The raw config, in the form of transformers' `config.json`, of a checkpoint in Meta's layout.

    `params` is the entropy model's `params.json`, None where there is none; `patcher_args` how the main
    model's texts were patched, None where nothing but its `args` is known. `gate_shapes` maps the Hugging
    Face names of the feed-forward's gate projections to their shapes: their rows are the intermediate size,
    which Meta's fields imply only through several roundings. Raises `ConfigError` for a field that is
    missing or has a value that the graphs do not implement.
    """
    _check_supported(args)
    config: dict[str, Any] = {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "vocab_size": args.get("vocab_size", 260),
        "tie_word_embeddings": False,
        "cross_attn_k": _need(args, "cross_attn_k"),
        # a missing window means the released models' one; null is none, as in Meta's code
        "local_attention_window_len": args.get("local_attention_window_len", 512),
        "encoder_hash_byte_group_size": _group_sizes(args),
        "encoder_hash_byte_group_vocab": args.get("encoder_hash_byte_group_vocab", 30000),
        "encoder_hash_byte_group_nb_functions": args.get("encoder_hash_byte_group_nb_functions", 3),
        "encoder_config": _local(args, "encoder", gate_shapes),
        "decoder_config": _local(args, "decoder", gate_shapes),
        "global_config": {
            "hidden_size": _need(args, "dim_global"),
            "num_attention_heads": _need(args, "n_heads_global"),
            "num_key_value_heads": args.get("n_kv_heads_global"),
            "num_hidden_layers": _need(args, "n_layers_global"),
            "max_position_embeddings": _need(args, "max_seqlen"),
            **_common(args, "model.global_transformer", gate_shapes),
        },
        **_patching(args, patcher_args, params or {}),
    }
    if params is not None:
        model = _section(params, "entropy_model")
        window = model.get("sliding_window")
        config["patcher_config"] = {
            "vocab_size": model.get("vocab_size", 260),
            "hidden_size": _need(model, "dim", "entropy_model"),
            "num_attention_heads": _need(model, "n_heads", "entropy_model"),
            "num_key_value_heads": model.get("n_kv_heads"),
            "num_hidden_layers": _need(model, "n_layers", "entropy_model"),
            "max_position_embeddings": _need(model, "max_seqlen", "entropy_model"),
            "sliding_window": _PATCHER_WINDOW if window is None else window,
            **_common(model, "model.patcher", gate_shapes),
        }
    return config


def _check_supported(args: Fields) -> None:
    layers = args.get("n_layers_local_encoder")
    if args.get("cross_attn_all_layers_encoder") and layers != 1:
        raise ConfigError(
            f"args.cross_attn_all_layers_encoder: got true with {shown(layers)} encoder layers, allowed: "
            "one, as Meta's code carries patch states from layer to layer"
        )
    for name, allowed in _ONLY.items():
        value = args.get(name)
        if value is not None and value != allowed:
            raise ConfigError(f"args.{name}: got {shown(value)}, allowed: {allowed!r}")
    for name in _UNSET:
        if args.get(name) is not None:
            raise ConfigError(f"args.{name}: got {shown(args[name])}, allowed: null")
    for side in ("encoder", "decoder"):
        heads = _need(args, f"n_heads_local_{side}")
        for name in ("cross_attn_nheads", "n_kv_heads"):
            if args.get(name) not in (None, heads):
                raise ConfigError(
                    f"args.{name}: got {shown(args[name])}, allowed: n_heads_local_{side}, {shown(heads)}, "
                    "as cross-attention shares its heads with self-attention here"
                )


def _local(args: Fields, side: str, gate_shapes: Shapes) -> dict[str, Any]:
    return {
        "vocab_size": args.get("vocab_size", 260),
        "cross_attn_all_layers": bool(args.get(f"cross_attn_all_layers_{side}", False)),
        "cross_attn_k": _need(args, "cross_attn_k"),
        "hidden_size_global": _need(args, "dim_global"),
        "hidden_size": _need(args, f"dim_local_{side}"),
        "num_attention_heads": _need(args, f"n_heads_local_{side}"),
        "num_hidden_layers": _need(args, f"n_layers_local_{side}"),
        "max_position_embeddings": args.get("max_encoder_seq_length") or _need(args, "max_seqlen"),
        **_common(args, f"model.local_{side}", gate_shapes),
    }


def _common(fields: Fields, prefix: str, gate_shapes: Shapes) -> dict[str, Any]:
    """What every part has. `head_dim` is passed on so that one that differs from width / heads is refused."""
    head_dim, shape = fields.get("head_dim"), gate_shapes.get(f"{prefix}.layers.0.mlp.gate_proj.weight")
    return {
        "rms_norm_eps": fields.get("norm_eps", 1e-5),
        "rope_theta": fields.get("rope_theta", 10000.0),
        "hidden_act": "silu",
        **({} if head_dim is None else {"head_dim": head_dim}),
        **({"intermediate_size": shape[0]} if shape else {}),
    }


def _patching(args: Fields, patcher_args: Fields | None, params: Fields) -> dict[str, Any]:
    """What Meta's code patches with: the main model's fields. What `args` leave open, where nothing else is
    known, is beside the entropy model; transformers' converter takes the threshold there, so both must agree.
    """
    own = patcher_args is not None
    beside = _patcher_args(params) if patcher_args is None else patcher_args
    where = "data.patcher_args" if own else "entropy_model/params.json"

    def either(name: str, name_beside: str) -> Any:
        if own or name == "patching_threshold" or args.get(name) is None:
            return _agreed(args, name, beside, name_beside, where)
        return args[name]

    mode = patching_mode(args, patcher_args or {})
    size = args.get("patch_size") or beside.get("patch_size")
    if mode != "static":
        size = None  # a mean or a leftover there, often a fraction
    return {
        "patch_in_forward": True,
        "patching_mode": mode,
        "patching_threshold": either("patching_threshold", "threshold"),
        "patching_threshold_add": either("patching_threshold_add", "threshold_add"),
        "monotonicity": either("monotonicity", "monotonicity") or False,
        "max_patch_length": either("max_patch_length", "max_patch_length"),
        **({} if size is None else {"patch_size": size}),
    }


def _agreed(args: Fields, name: str, beside: Fields, name_beside: str, where: str) -> Any:
    """The value in either place. Two that differ are refused: only their owner knows which one is right."""
    ours, theirs = args.get(name), beside.get(name_beside)
    if ours is not None and theirs is not None and ours != theirs:
        raise ConfigError(
            f"args.{name}: got {shown(ours)}, but {where} says {shown(theirs)}; make them the same"
        )
    return theirs if ours is None else ours


def _patcher_args(params: Fields) -> Fields:
    return _section(_section(params, "data"), "patcher_args")


def _group_sizes(args: Fields) -> Any:
    """A list, or Meta's other spelling, "3,4,5"; a model without hash embeddings is refused."""
    sizes = args.get("encoder_hash_byte_group_size")
    if isinstance(sizes, str):
        try:
            sizes = [int(size) for size in sizes.split(",") if size.strip()]
        except ValueError as error:
            raise ConfigError(
                f"args.encoder_hash_byte_group_size: got {shown(sizes)}, allowed: integers and commas"
            ) from error
    if not sizes:
        raise ConfigError("args.encoder_hash_byte_group_size: got none, allowed: at least one group size")
    return sizes


def _need(fields: Fields, name: str, where: str = "args") -> Any:
    if fields.get(name) is None:
        raise ConfigError(f"{where}.{name}: missing, and it has no default")
    return fields[name]


def _section(fields: Fields, name: str) -> Fields:
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"params.json: {name}: got {shown(value)}, allowed: a JSON object")
    return value


def is_meta_config(config: Fields) -> bool:
    """Whether a parsed `config.json` is one of Meta's: everything under `args`, and no model_type."""
    return isinstance(config.get("args"), Mapping) and "model_type" not in config


def meta_name(name: str, *, entropy_model: bool = False) -> str:
    """The Hugging Face name of a tensor of the main checkpoint or, with `entropy_model`, of that one."""
    if name == "local_decoder.output.weight" and not entropy_model:
        return "lm_head.weight"
    mapped = ".".join(_SEGMENTS.get(segment, segment) for segment in name.split("."))
    return f"model.patcher.{mapped}" if entropy_model else f"model.{mapped}"


def open_meta(folder: Path, name: str) -> Checkpoint:
    """The checkpoint in `folder`, which has a `config.json` of Meta's, or a `params.json`.

    Raises `CheckpointError` for files that are missing or damaged, and `ConfigError` for what the graphs
    can't compute, cross-attention in several encoder layers first of all.
    """
    args, patcher_args = _main_fields(folder)
    with ExitStack() as stack:
        main = _open_weights(folder, stack)
        tensors = _renamed(main, entropy_model=False) | _hash_tables(main, folder)
        params: dict[str, Any] | None = None
        if patching_mode(args, patcher_args or {}) == "entropy":
            entropy_folder = _entropy_folder(folder)
            params = _entropy_params(entropy_folder)
            tensors |= _renamed(_open_weights(entropy_folder, stack), entropy_model=True)
        gates = {key: parts[0].shape for key, parts in tensors.items() if key.endswith("gate_proj.weight")}
        shapes = {key: shape for key, shape in gates.items() if all(shape)}
        config = huggingface_config(args, params, shapes, patcher_args)
        checkpoint = Checkpoint(name, "meta", config, tensors)
        stack.pop_all()
    return checkpoint


def _main_fields(folder: Path) -> tuple[Fields, Fields | None]:
    """The main model's fields, and how its texts were patched, as far as that is told."""
    args = _read(folder / "config.json").get("args")
    trained = _read(folder / "params.json") or _read(folder / "train_args.json")
    if args is None:
        args = {} if trained.get("train_entropy_model") else _section(trained, "model")
    if "dim_local_encoder" not in args:
        entropy = trained.get("train_entropy_model") or "n_layers" in args or trained.get("entropy_model")
        found = "describes an entropy model, not a BLT" if entropy else "describes no BLT of Meta's"
        raise CheckpointError(
            f"{folder}: {found} (args.dim_local_encoder is missing); give the main model's folder, whose "
            "entropy_model is looked for in it and beside it"
        )
    return args, _patcher_args(trained) or None


def _entropy_folder(folder: Path) -> Path:
    inside = folder / ENTROPY_FOLDERS[0]
    if inside.is_dir():
        return inside
    beside = Path(os.path.abspath(folder)).parent  # noqa: PTH100 - beside a link, not beside its target
    for name in ENTROPY_FOLDERS:
        if any((beside / name / file).is_file() for file in ("params.json", "config.json")):
            return beside / name
    raise CheckpointError(
        f"{inside}: missing, and not beside {folder} either; entropy patching needs the entropy model there: "
        "its params.json or config.json, and its weights"
    )


def _entropy_params(folder: Path) -> dict[str, Any]:
    """The entropy model's `params.json`, or one of the same form from what the converter wrote."""
    if not (folder / "params.json").is_file() and (folder / "config.json").is_file():
        config = _read(folder / "config.json")
        if not is_meta_config(config):
            raise CheckpointError(f"{folder / 'config.json'}: has no args, so it describes no entropy model")
        return {"entropy_model": config["args"]}
    return read_json(folder / "params.json")


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _open_weights(folder: Path, stack: ExitStack) -> dict[str, StoredTensor]:
    if any(folder.glob("model.safetensors*")):
        return open_weights(folder, stack)
    path = next((folder / name for name in _SINGLE_FILES if (folder / name).is_file()), None)
    if path is None:
        pickles = sorted(folder.glob("*.pth"))
        if len(pickles) != 1:
            raise CheckpointError(_no_weights(folder, len(pickles)))
        path = pickles[0]
    file = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
    stack.callback(file.close)
    return {key: StoredTensor(file, key) for key in file.names()}


def _no_weights(folder: Path, pickles: int) -> str:
    has = f"{folder}: has {f'{pickles} .pth files' if pickles else 'no weights'}"
    if (folder / "consolidated").is_dir():
        return f"{has}; give {folder / 'consolidated'}, which holds the whole model"
    if any(folder.glob("*.distcp")):
        return f"{has} but the shards of a training run; consolidate them with Meta's bytelatent.checkpoint"
    return f"{has}; expected model.safetensors, {' or '.join(_SINGLE_FILES)}"


def _renamed(
    stored: Mapping[str, StoredTensor], *, entropy_model: bool
) -> dict[str, tuple[StoredTensor, ...]]:
    """Under Hugging Face names; hash tables (joined later) and rotary tables (computed) stay out."""
    return {
        meta_name(key, entropy_model=entropy_model): (tensor,)
        for key, tensor in stored.items()
        if not key.startswith(_HASH_TABLES) and key.split(".")[-1] != "freqs_cis"
    }


def _hash_tables(main: Mapping[str, StoredTensor], folder: Path) -> dict[str, tuple[StoredTensor, ...]]:
    numbered: dict[int, StoredTensor] = {}
    for key, tensor in main.items():
        if key.startswith(_HASH_TABLES):
            number = key.removeprefix(_HASH_TABLES).removesuffix(".weight")
            if not number.isascii() or not number.isdigit() or len(number) > 4:
                raise CheckpointError(f"{folder}: tensor {one_line(key)} is not a numbered hash table")
            numbered[int(number)] = tensor
    for index in range(len(numbered)):
        if index not in numbered:
            raise CheckpointError(f"{folder}: tensor {_HASH_TABLES}{index}.weight is missing")
    return {HASH_EMBEDDING: tuple(numbered[index] for index in sorted(numbered))} if numbered else {}
