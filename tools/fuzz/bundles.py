"""Attacks on bundles: their manifest, their graphs, and what `build` put beside them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import warnings
import zlib
from pathlib import Path
from random import Random

import onnx

from ...export.build_ort import build_engine
from ...export.bundle import load_stage
from ...export.export import export_checkpoint
from ...export.lint_tensorrt import lint_bundle
from ...runtime import self_test
from ...runtime.backends.ort import OrtStage
from ...runtime.backends.tensorrt import TensorRtModule
from ...runtime.backends.tensorrt_profiles import Profiles, plan_file
from ...runtime.embedding import EmbeddingTable
from ...runtime.engines import (
    ENGINE_NAME,
    describe_tensorrt,
    engine_limits,
    engine_path,
    engine_profiles,
    find_engine,
    find_tensorrt_engine,
    was_proven,
)
from ...runtime.errors import BltError, BltWarning
from ...runtime.integrity import check_files, file_record
from ...runtime.manifest import load_manifest, write_manifest
from ...runtime.model import BltModel
from ...runtime.names import MANIFEST_NAME
from ...runtime.self_test import SELF_TEST_NAME
from ..cli.program import program
from ..models.random_checkpoint import write_random_checkpoint
from .mutate import SECRET, spoil_bytes, spoil_json, spoil_message
from .targets import VALID, Files, Target, tiny_config


def export_tiny(folder: Path, precision: str = "fp32") -> None:
    """A bundle of the toy, in a directory that is empty."""
    checkpoint = folder.with_name("checkpoint")
    write_random_checkpoint(checkpoint, tiny_config(), choose_threshold=False)
    folder.rmdir()
    export_checkpoint(checkpoint, folder, precision=precision)


class _Bundle(Target):
    """A bundle with ONNX Runtime's engine in it."""

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        export_tiny(folder, "encoder=int8w,latent=int4")
        self.engine = folder / build_engine(folder).name
        self.manifest = load_manifest(folder)


class ManifestFile(_Bundle):
    """`manifest.json`, mostly with a right checksum: read, shown by `inspect`, loaded and run."""

    name = "manifest"
    seconds = 10.0

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        self._payload = {**self.manifest.to_dict(), "validation": VALID["validation"]}
        self._payload["quantization"]["calibration"] = VALID["calibration"]
        self.valid = {MANIFEST_NAME: _sealed(json.dumps(self._payload).encode())}

    def make(self, random: Random) -> Files:
        keys = ("checksum", "patch_length", "threshold_add", "patch_values", "encoder.onnx")
        text = spoil_json(random, self._payload, keys=keys)
        return {MANIFEST_NAME: _sealed(text) if random.random() < 0.9 else text}

    def attack(self, files: Files) -> None:
        self.write(files)
        check_files(self.folder, load_manifest(self.folder))
        if zlib.crc32(files[MANIFEST_NAME]) % 8:  # what follows takes a tenth of a second
            return
        _shown_by_cli("inspect", str(self.folder))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", BltWarning)  # of what the manifest says of its validations
            BltModel.load(self.folder, "cpu", 1, portable=True).probe()
        for each in told:
            assert str(each.message).isprintable(), str(each.message)


def _sealed(text: bytes) -> bytes:
    """A manifest with a right checksum and layout, as somebody who knows the format can write it."""
    try:
        payload = json.loads(text)
        payload.pop("checksum", None)
        canonical = json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False)
        payload["checksum"] = hashlib.sha256(canonical.encode("ascii")).hexdigest()
        return (json.dumps(payload, indent=1, allow_nan=False) + "\n").encode()
    except (ValueError, RecursionError, AttributeError, TypeError):
        return text


def _shown_by_cli(*arguments: str) -> None:
    """Run a command. Raises AssertionError for what a person should not see."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        program.main(arguments)
    assert "-v for the traceback" not in out.getvalue(), out.getvalue()[-500:]
    assert out.getvalue().replace("\n", "").isprintable(), out.getvalue()


class Graphs(_Bundle):
    """A graph of a bundle or of its engine, as if its hash were right: loaded, run, linted, read again."""

    name = "graphs"
    count, quick, seconds, memory = 10_000, 60, 20.0, 1 << 30

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        paths = [base / f"{stage}.onnx" for stage in self.manifest.stages for base in (folder, self.engine)]
        self._graphs = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        self._limits = engine_limits(self.manifest)
        table = EmbeddingTable.open(folder, self.manifest.embedding)
        self._inputs = self_test.text_inputs(self.manifest, table, self_test.LOAD_ROWS)
        kept = self_test.read_self_test(self.engine / SELF_TEST_NAME, self.manifest, self._limits)
        self._inputs["latent"], self._inputs["decoder"] = self_test.state_inputs(kept["states"], 8)
        self._inputs["decoder"]["patch_values"] = kept["patch_values"]
        self.valid = {"encoder.onnx": self._graphs["encoder.onnx"]}

    def make(self, random: Random) -> Files:
        name, data = random.choice(list(self._graphs.items()))
        if random.random() < 0.1:
            return {name: spoil_bytes(random, data, (b"\x6a\x10\x0a\x08location", f"../{SECRET}".encode()))}
        model = onnx.ModelProto.FromString(data)
        spoil_message(random, model)
        return {name: model.SerializeToString()}

    def attack(self, files: Files) -> None:
        (name,) = files
        self.write(files)
        path = self.folder / name
        stage, ours = path.stem, path.parent == self.folder
        spec = self.manifest.stages[stage]
        try:
            if ours:
                for read in (
                    lambda: load_stage(self.folder, spec),
                    lambda: lint_bundle(self.folder, self.manifest, "tensorrt-10.3"),
                ):
                    with contextlib.suppress(BltError):
                        read()
                if zlib.crc32(path.read_bytes()) % 40 == 0:  # seconds
                    self._build(name)
            backend = OrtStage(self.folder, self.manifest, stage, 1, optimized=None if ours else path)
            steps = self_test.load_steps(stage, spec, self._limits)
            self_test.run_steps(self.manifest, stage, backend, self._limits, self._inputs[stage], steps)
        finally:
            self.write({name: self._graphs[name]})

    def _build(self, name: str) -> None:
        """An engine of the bundle with this graph, hashed anew."""
        files = {**self.manifest.files, name: file_record(self.folder / name)}
        try:
            write_manifest(self.folder, self.manifest.with_files(files))
            with contextlib.suppress(BltError):
                build_engine(self.folder)
        finally:
            write_manifest(self.folder, self.manifest)
            for path in set(self.engine.parent.iterdir()) - {self.engine}:
                shutil.rmtree(path)


class Engines(_Bundle):
    """What lies beside engines: `engine.json` of ONNX Runtime and of TensorRT, and the self-test."""

    name = "engines"

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        self._trt = TensorRtModule("tensorrt", "10.3.0", None)
        description = describe_tensorrt(self.manifest, self._trt, ("8.7",), Profiles.of(self.manifest))
        self._plan = engine_path(folder, description)
        self._plan.mkdir()
        names = [SELF_TEST_NAME, *map(plan_file, self.manifest.stages)]
        for name in names:
            (self._plan / name).write_bytes(b"plan")
        files = {name: vars(file_record(self._plan / name)) for name in names}
        self._of_plan = {"description": description, "proven": True, "files": files}
        self._of_engine = json.loads((self.engine / ENGINE_NAME).read_bytes())
        self._tested = (self.engine / SELF_TEST_NAME).read_bytes()
        self.valid = {"plan.json": json.dumps(self._of_plan).encode()}

    def make(self, random: Random) -> Files:
        how, keys = random.randrange(10), ("profiles", "limits", "target", "version", "proven", "max_batch")
        if how == 0:
            return {SELF_TEST_NAME: spoil_bytes(random, self._tested)}
        if how < 4:
            return {ENGINE_NAME: spoil_json(random, self._of_engine, keys=keys)}
        return {"plan.json": spoil_json(random, self._of_plan, keys=keys)}

    def attack(self, files: Files) -> None:
        ((name, data),) = files.items()
        if name == "plan.json":
            self._attack_plan(data)
        elif name == ENGINE_NAME:
            (self.engine / ENGINE_NAME).write_bytes(data)
            str(find_engine(self.folder, self.manifest))
            was_proven(self.engine)
        else:  # with a right hash
            (self.engine / SELF_TEST_NAME).write_bytes(data)
            record = {SELF_TEST_NAME: vars(file_record(self.engine / SELF_TEST_NAME))}
            files_of = {**self._of_engine, "files": {**self._of_engine["files"], **record}}
            (self.engine / ENGINE_NAME).write_text(json.dumps(files_of))
            BltModel.load(self.folder, "cpu", 1)

    def _attack_plan(self, data: bytes) -> None:
        path = self._plan
        with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError, KeyError):
            description = json.loads(data)["description"]
            if description["target"] == "tensorrt":
                path = engine_path(self.folder, description)  # as it has to be called
        self._plan.rename(path)
        try:
            (path / ENGINE_NAME).write_bytes(data)
            found = find_tensorrt_engine(self.folder, self.manifest, self._trt, "8.7")
            if found.directory is not None:
                engine_profiles(found, self.manifest)
        finally:
            path.rename(self._plan)
