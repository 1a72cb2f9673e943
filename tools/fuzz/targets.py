"""What is attacked, and how: checkpoints and texts. An input is files by name in a directory, the rest of
which is valid.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from ...calibration.data import bundled_texts, choose_windows, open_texts
from ...export.checkpoint import open_checkpoint
from ...export.checkpoint_base import HASH_EMBEDDING, check_tensors, expected_tensors, parameter_counts
from ...export.export import plan_export
from ...export.golden import read_golden
from ...export.huggingface import SafetensorsFile
from ...graphs.config import parse_config
from ...graphs.stages import axis_ranges
from ...runtime.errors import BltError
from ...runtime.fields import read, record
from ...runtime.generation_spec import GenerationSpec
from ..models.random_checkpoint import SHAPES, write_checkpoint_weights, write_random_checkpoint
from .mutate import SECRET, spoil_bytes, spoil_json

Files = Mapping[str, bytes]
VALID: dict[str, Any] = json.loads(Path(__file__).with_name("valid.json").read_bytes())
"""Documents as people have them."""


class Target:
    """Something that reads what nobody vouches for."""

    name = ""
    count = 100_000
    """Inputs of a whole run."""
    quick = 400
    """Inputs of a run that the tests make."""
    seconds = 2.0
    """Processor time that an input may take."""
    memory = 256 << 20
    """Bytes by which an input may raise the largest resident memory."""
    sockets = False
    """Whether the attack itself connects to something."""
    processes = False
    """Whether the attack itself starts processes."""
    refusals: tuple[type[Exception], ...] = (BltError,)
    """Errors that say on purpose what is wrong."""
    valid: Files
    """An input that must be accepted."""
    folder: Path
    """Where the files go."""

    def prepare(self, folder: Path) -> None:
        """Fill the new directory with what is valid. Raises ImportError where a package is not installed."""
        self.folder = folder

    def make(self, random: Random) -> Files:
        """An input."""
        raise NotImplementedError

    def attack(self, files: Files) -> None:
        """Read it as the product does."""
        raise NotImplementedError

    def write(self, files: Files) -> None:
        for name, data in files.items():
            path = self.folder / name
            path.unlink(missing_ok=True)  # whoever has mapped the file keeps what it was
            path.write_bytes(data)


def tiny_config() -> dict[str, Any]:
    """Of a toy of the released models' form."""
    config = copy.deepcopy(SHAPES["tiny"])
    for part in (part for part in config.values() if isinstance(part, dict)):
        part["max_position_embeddings"] = 512
    return {**config, "encoder_hash_byte_group_vocab": 11, "max_position_embeddings": 512}


class Config(Target):
    """`config.json` of a checkpoint in Hugging Face's layout, some of them up to the graphs' plan."""

    name = "config"
    quick, seconds = 300, 10.0
    file = "config.json"
    shard_bytes = 1 << 30

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        write_random_checkpoint(folder, tiny_config(), choose_threshold=False, shard_bytes=self.shard_bytes)
        self.valid = {self.file: (folder / self.file).read_bytes()}

    def make(self, random: Random) -> Files:
        config = tiny_config()
        for part in ("patcher_config", "global_config"):
            if random.random() < 0.3:
                config[part][random.choice(("rope_parameters", "rope_scaling"))] = random.choice(
                    VALID["rope"]
                )
        return {self.file: spoil_json(random, config, keys=VALID["config_keys"].split())}

    def attack(self, files: Files) -> None:
        self.write(files)
        with open_checkpoint(self.folder) as checkpoint:
            config = parse_config(checkpoint.config)
            check_tensors(checkpoint, config)
            checkpoint.sha256()
        axis_ranges(config)
        parameter_counts(config)
        if zlib.crc32(b"".join(files.values())) % 20 == 0:  # half a second
            plan_export(str(self.folder))


class Generation(Config):
    """`generation_config.json` of a checkpoint; what is taken from it has to pass through a manifest."""

    name = "generation"
    seconds = 2.0
    file = "generation_config.json"

    def prepare(self, folder: Path) -> None:
        Target.prepare(self, folder)
        write_random_checkpoint(folder, tiny_config(), choose_threshold=False)
        self.valid = {self.file: json.dumps(VALID["generation"]).encode()}

    def make(self, random: Random) -> Files:
        return {self.file: spoil_json(random, VALID["generation"], keys=VALID["generation_keys"].split())}

    def attack(self, files: Files) -> None:
        self.write(files)
        with open_checkpoint(self.folder) as checkpoint:
            taken = checkpoint.generation
        try:
            told = json.loads(json.dumps(asdict(taken), allow_nan=False))
            assert read(told, "generation", record(GenerationSpec)) == taken
        except BltError as error:
            raise AssertionError(f"accepted, but no manifest takes it: {error}") from error


class Index(Config):
    """The index of a checkpoint in shards."""

    name = "index"
    seconds = 2.0
    file = "model.safetensors.index.json"
    shard_bytes = 60_000

    def make(self, random: Random) -> Files:
        return {self.file: spoil_json(random, json.loads(self.valid[self.file]), keys=("weight_map",))}


class Safetensors(Target):
    """A safetensors file: its header by structure, all of it by bytes."""

    name = "safetensors"
    arrays: Mapping[str, tuple[str, np.ndarray[Any, Any]]] = {
        "a": ("F16", np.ones((4, 6), "f2")),
        "b": ("BF16", np.ones(8, "u2")),
        "c": ("F32", np.ones((), "f4")),
        "d": ("F32", np.ones((3, 0, 2), "f4")),
    }
    metadata: Mapping[str, str] = {"format": "pt"}

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        self._header: dict[str, Any] = {"__metadata__": self.metadata}
        self._data = b""
        for name, (kind, values) in self.arrays.items():
            offsets = [len(self._data), len(self._data) + values.nbytes]
            self._header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": offsets}
            self._data += values.tobytes()
        self.valid = {"model.safetensors": self._file(json.dumps(self._header).encode())}

    def _file(self, header: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header + self._data

    def make(self, random: Random) -> Files:
        header = json.dumps(self._header).encode()
        if random.random() < 0.8:
            header = spoil_json(random, self._header, keys=("dtype", "shape", "data_offsets", "__metadata__"))
        file = self._file(header)
        if random.random() < 0.3:
            file = spoil_bytes(random, file, (header, b"\xff" * 8, b"BF16", b"I64"))
        return {"model.safetensors": file}

    def attack(self, files: Files) -> None:
        self.write(files)
        file = SafetensorsFile(self.folder / "model.safetensors")
        try:
            for name in file.names():
                file.dtype(name)
                file.read(name, 0, (file.shape(name) or (1,))[0])
            file.fingerprint(hashlib.sha256())
        finally:
            file.close()


class Golden(Safetensors):
    """A golden file for `validate`, which is safetensors with certain arrays."""

    name = "golden"
    quick = 200
    arrays: Mapping[str, tuple[str, np.ndarray[Any, Any]]] = {
        "ids": ("I64", np.array([1, *range(4, 12)])),
        "patch_starts": ("I64", np.array([0, 5])),
        "entropies": ("F32", np.ones(9, "f4")),
        "logits": ("F32", np.ones((9, 260), "f4")),
        "prompt": ("U8", np.ones(2, "u1")),
        "greedy": ("U8", np.ones(3, "u1")),
        "greedy_margins": ("F32", np.ones(3, "f4")),
    }
    metadata: Mapping[str, str] = {
        "format": "blt-edge golden 1",
        "checkpoint_sha256": "0" * 64,
        "reference": "transformers 5.23",
        "threshold": "1.3",
        "greedy_count": "3",
    }

    def attack(self, files: Files) -> None:
        self.write(files)
        read_golden(self.folder / "model.safetensors")


class Meta(Target):
    """The documents of a checkpoint in Meta's layout."""

    name = "meta"

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        (folder / "entropy_model").mkdir()
        main: dict[str, tuple[int, ...]] = {}
        entropy: dict[str, tuple[int, ...]] = {}
        for name, shape in expected_tensors(parse_config(tiny_config())).items():
            if name == HASH_EMBEDDING:
                main |= {f"encoder_hash_tok_embedding.{index}.weight": (11, shape[1]) for index in range(6)}
            elif name == "lm_head.weight":
                main["local_decoder.output.weight"] = shape
            elif name.startswith("model.patcher."):
                entropy[name.removeprefix("model.patcher.")] = shape
            else:
                main[name.removeprefix("model.")] = shape
        for where, shapes in ((folder, main), (folder / "entropy_model", entropy)):
            write_checkpoint_weights(
                where, shapes, "float32", lambda _, shape: [bytes(4 * _size(shape))], 1 << 30
            )
        self._entropy = entropy
        self.valid = self._layouts()[0]

    def _layouts(self) -> tuple[Files, Files]:
        """As on the hub, and as its download script writes it."""
        args, params = VALID["meta"], VALID["meta_params"]
        of_entropy = {"entropy_model/params.json": json.dumps(params).encode()}
        return (
            {"config.json": json.dumps({"args": args}).encode(), **of_entropy},
            {"params.json": json.dumps({"model": args, "data": params["data"]}).encode(), **of_entropy},
        )

    def make(self, random: Random) -> Files:
        keys = (
            *VALID["meta"],
            "head_dim",
            "cross_attn_window_encoder",
            "model_type",
            "data",
            "args",
            "model",
        )
        spoilt = dict(random.choice(self._layouts()))
        for name in random.choice((list(spoilt)[:1], list(spoilt)[1:], list(spoilt))):
            spoilt[name] = spoil_json(random, json.loads(spoilt[name]), keys=keys)
        return spoilt

    def attack(self, files: Files) -> None:
        if "params.json" in files or "config.json" in files:
            for name in ("params.json", "config.json"):
                (self.folder / name).unlink(missing_ok=True)
        self.write(files)
        with open_checkpoint(self.folder) as checkpoint:
            config = parse_config(checkpoint.config)
            check_tensors(checkpoint, config)
        parameter_counts(config)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


class Pickle(Meta):
    """Meta's weights in torch's format: the zip, and the pickle in it."""

    name = "pth"
    count, quick = 20_000, 100
    words = (
        b"cos\nsystem\n|cbuiltins\neval\n|ctorch\nload\n|c__builtin__\ngetattr\n|ccodecs\nencode\n|R|b|.|\x85|\x81"
        b"|}|q\x00|h\xff|r\xff\xff\xff\x7f|j\xff\xff\xff\x7f|N|Q|P1\n|X\xff\xff\xff\x7f|\x8a\xff|(dp0\n|S'x'\n|\x93"
    ).split(b"|")

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        import torch

        self.write(self.valid)
        path = folder / "entropy_model" / "consolidated.pth"
        tensors = {name: torch.zeros(shape) for name, shape in self._entropy.items()}
        torch.save({"model": tensors, "step": 3}, path)
        path.with_name("model.safetensors").unlink()
        self.valid = {"entropy_model/consolidated.pth": path.read_bytes()}

    def make(self, random: Random) -> Files:
        ((name, data),) = self.valid.items()
        if random.random() < 0.7:
            data = self._zipped(random, data)
        if random.random() < 0.4:
            data = spoil_bytes(random, data, (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", *self.words[:4]))
        return {name: data}

    def _zipped(self, random: Random, data: bytes) -> bytes:
        made, hostile = (
            io.BytesIO(),
            (f"../{SECRET}", f"archive/../../{SECRET}", "/etc/passwd", "archive/data/9"),
        )
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
            for entry in old.infolist():
                content = old.read(entry)
                if entry.filename.endswith("data.pkl"):
                    content = spoil_bytes(random, content, self.words)
                elif random.random() < 0.02:
                    content = spoil_bytes(random, content)
                if random.random() > 0.01:
                    new.writestr(
                        random.choice(hostile) if random.random() < 0.01 else entry.filename, content
                    )
        return made.getvalue()


class Calibration(Target):
    """Texts that calibration reads."""

    name = "calibration"

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        self.valid = {"text": b"".join(text.path.read_bytes()[:3000] for text in bundled_texts())}

    def make(self, random: Random) -> Files:
        text = self.valid["text"]
        start = random.randrange(len(text))
        text = text[start : start + random.choice((1, 10, 200, 6000))]
        return {"text": spoil_bytes(random, text, ("\u202e".encode(), b"\0", b"\xed\xa0\x80", b"\x1b[2J"))}

    def attack(self, files: Files) -> None:
        self.write(files)
        for window in choose_windows(open_texts([self.folder / "text"]), 4, 64):
            window.read()
