"""onnxruntime-genai in a comparison: ONNX Runtime's own loop for token models, on the kernels that we run on.

What is measured: a random Llama, exported by onnxruntime-genai's builder as int4 blocks of 32 for the CPU at
accuracy level 4 (GroupQueryAttention, a shared cache buffer), greedy, the given threads, a fresh generator in
every round; prefill ends with the first token, decoding is the tokens after it. The builder wants a Hugging
Face folder with a tokenizer, so `build_random` makes one of random bfloat16 weights and a stand-in
tokenizer, and removes it afterwards. That needs torch and transformers; running does not.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .common import BenchError, ModelCard, Peer, Speeds, Task, TokenBudget, need
from .llama_cpp import LlamaShape

_PARAMETERS = "parameters.json"


def build_random(folder: Path, shape: LlamaShape) -> None:
    """Build the int4 model of a random Llama in `folder`. A failure leaves no `folder`.

    Raises BenchError when onnxruntime-genai, torch or transformers is missing, or the builder fails.
    """
    need("onnxruntime_genai")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        checkpoint, model = Path(scratch, "checkpoint"), Path(scratch, "model")
        _write_checkpoint(checkpoint, shape)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
        command += ["-o", str(model), "-p", "int4", "-e", "cpu", "-c", scratch]
        command += ["--extra_options", "int4_accuracy_level=4", "int4_block_size=32"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise BenchError(f"onnxruntime-genai's builder failed: {last}")
        (model / _PARAMETERS).write_text(json.dumps(shape.parameters))
        shutil.move(model, folder)


def _write_checkpoint(folder: Path, shape: LlamaShape) -> None:
    torch, transformers, tokenizers = need("torch"), need("transformers"), need("tokenizers")
    config = transformers.LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        rms_norm_eps=shape.eps,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@dataclass(frozen=True)
class GenaiSpec:
    """A folder that onnxruntime-genai's builder wrote."""

    folder: Path
    budget: TokenBudget

    @property
    def name(self) -> str:
        return f"{self.folder.resolve().name} (onnxruntime-genai)"

    @property
    def memory_bytes(self) -> int:
        """The weights and a rearranged copy."""
        return 2 * self.disk_bytes

    @property
    def disk_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())

    def open(self) -> Peer:
        """Load. Raises BenchError when the package is missing or refuses the folder."""
        package = need("onnxruntime_genai")
        try:
            return GenaiPeer(self, package)
        except RuntimeError as error:
            raise BenchError(f"{self.folder}: {error}") from None


class GenaiPeer:
    def __init__(self, spec: GenaiSpec, package: Any) -> None:
        self._budget, self._package = spec.budget, package
        config = package.Config(str(spec.folder))
        threads = {"session_options": {"intra_op_num_threads": spec.budget.threads}}
        config.overlay(json.dumps({"model": {"decoder": threads}}))
        self._model = package.Model(config)
        described = json.loads((spec.folder / "genai_config.json").read_text())["model"]
        self._vocabulary = int(described["vocab_size"])
        counted = spec.folder / _PARAMETERS
        parameters = int(json.loads(counted.read_text())) if counted.is_file() else 0
        version = f"onnxruntime-genai {package.__version__}"
        self.card = ModelCard(spec.name, parameters, spec.disk_bytes, version)

    def run(self, task: Task) -> Speeds:
        """Greedy; the end of the text is never chosen."""
        prompt = self._budget.prompt(task, self._vocabulary)
        steps = self._budget.tokens(task.new_bytes) - 1
        length = len(prompt) + steps + 1
        params = self._package.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, batch_size=1, min_length=length, max_length=length + 1)
        generator = self._package.Generator(self._model, params)

        def read() -> None:
            generator.append_tokens(np.array(prompt, np.int32))
            generator.generate_next_token()

        speeds = self._budget.timed(prompt, steps, read, generator.generate_next_token)
        made = len(generator.get_sequence(0))
        if made != length:
            raise BenchError(f"{self.card.name}: {made} tokens, {length} were asked for")
        return speeds
