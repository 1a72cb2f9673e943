"""What somebody could do to a bundle, by accident or on purpose, and that opening it refuses each.

"Opening" is what a command does before it runs a graph: read the manifest, check the files, map the tables.
"""

import copy
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime.embedding import EmbeddingTable
from blt_edge.runtime.errors import BundleError
from blt_edge.runtime.integrity import check_files
from blt_edge.runtime.manifest import FileRecord, Manifest, load_manifest
from blt_edge.runtime.quantization_spec import CalibrationSpec, QuantizationSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bundles import SPEC, describe, seal
from support.processors import elsewhere

NAMES = sorted(
    [*(f"{s}.onnx" for s in describe().stages), *(f"{s}.onnx.data" for s in describe().stages), SPEC.file]
)

Payload = dict[str, Any]


def open_bundle(directory: Path, full: bool = False) -> None:
    manifest = load_manifest(directory)
    check_files(directory, manifest, full=full)
    EmbeddingTable.open(directory, manifest.embedding)


def refused(directory: Path, match: str, full: bool = False) -> None:
    with pytest.raises(BundleError, match=match) as caught:
        open_bundle(directory, full)
    message = str(caught.value)
    assert message.isprintable(), "one line, nothing a terminal obeys"
    assert len(message) < 500


def flip(path: Path, position: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


class TestFiles:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("position", [0, 100, -1])
    def test_changed_byte(self, bundle: Path, name: str, position: int) -> None:
        flip(bundle / name, position)
        refused(bundle, f"{name} was changed")
        refused(bundle, f"{name} was changed", full=True)

    @pytest.mark.parametrize("name", NAMES)
    def test_missing_and_of_another_size(self, bundle: Path, name: str) -> None:
        data = (bundle / name).read_bytes()
        (bundle / name).write_bytes(data[:-1])
        refused(bundle, f"{name} is truncated: it has {len(data) - 1} bytes, the manifest says {len(data)}")
        (bundle / name).write_bytes(b"")
        refused(bundle, f"{name} is truncated")
        (bundle / name).write_bytes(data + b"\0")
        refused(bundle, f"{name} has extra bytes")
        (bundle / name).unlink()
        refused(bundle, f"{name} is missing")

    def test_two_files_exchanged(self, bundle: Path) -> None:
        (bundle / "patcher.onnx.data").rename(bundle / "x")
        (bundle / "encoder.onnx.data").rename(bundle / "patcher.onnx.data")
        (bundle / "x").rename(bundle / "encoder.onnx.data")
        refused(bundle, "was changed")

    @pytest.mark.parametrize(
        ("place", "target"),
        [
            *((name, "../elsewhere") for name in [*NAMES, "manifest.json"]),
            ("patcher.onnx", "p.onnx"),
            ("tables.bin", "nothing"),
            ("weights.bin", "/etc/passwd"),
            ("engines", "../outside"),
            ("engines/sm87/x.plan", "/etc/passwd"),
        ],
    )
    def test_link(self, bundle: Path, place: str, target: str) -> None:
        (bundle / "../outside").mkdir()
        link = bundle / place
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.exists():
            link.rename(bundle / target)
        if target == "nothing":
            (bundle / target).unlink()
        link.symlink_to(target)
        refused(bundle, f"{link.name} is a link")

    def test_the_bundle_itself_may_be_reached_through_a_link(self, bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(bundle, target_is_directory=True)
        open_bundle(tmp_path / "link", full=True)

    @pytest.mark.parametrize("name", ["tables.bin", "manifest.json"])
    @pytest.mark.parametrize("make", ["mkdir", "mkfifo"])
    def test_directory_or_pipe(self, bundle: Path, name: str, make: str) -> None:
        if not hasattr(os, make):
            pytest.skip("needs named pipes")
        (bundle / name).unlink()
        getattr(os, make)(bundle / name)
        refused(bundle, f"{name} is not a regular file")


class TestManifestText:
    def test_changed_byte_anywhere(self, bundle: Path) -> None:
        path = bundle / "manifest.json"
        original = path.read_bytes()
        for position in range(0, len(original), 7):
            flip(path, position, (0x01, 0x20, 0x80, 0x10)[position % 4])
            with pytest.raises(BundleError):
                load_manifest(bundle)
            path.write_bytes(original)

    @pytest.mark.parametrize(
        "change",
        [
            lambda text: text[:-1],
            lambda text: text + "\n",
            lambda text: text[: len(text) // 2],
            lambda text: "",
            lambda text: "\ufeff" + text,
            lambda text: text.replace("\n", "\r\n"),
            lambda text: text.replace('"schema": 1,', '"schema": 1, "schema": 1,'),
            lambda text: text.replace("1e-05", "0.00001"),
            lambda text: json.dumps(json.loads(text)),
        ],
    )
    def test_changed_layout(self, bundle: Path, change: Callable[[str], str]) -> None:
        path = bundle / "manifest.json"
        path.write_bytes(change(path.read_text()).encode())
        refused(bundle, r"manifest\.json (is damaged|was changed)")

    @pytest.mark.parametrize(
        "text",
        [
            *(b"null", b"[]", b"[]\n", b"3", b'"x"', b"[" * 100_000, b"9" * 10_000, bytes(range(256))),
            *(b'{"schema": NaN}', b'{"schema": 1e999}'),
        ],
    )
    def test_something_else(self, bundle: Path, text: bytes) -> None:
        (bundle / "manifest.json").write_bytes(text)
        refused(bundle, r"manifest\.json")

    def test_endless(self, bundle: Path) -> None:
        with (bundle / "manifest.json").open("wb") as file:
            file.truncate(1 << 40)
        refused(bundle, "has more than 4194304 bytes")

    def test_nested_deeper_than_python_walks(self, bundle: Path) -> None:
        """The parser of Python 3.12 takes it, what walks over it afterwards would not."""
        path = bundle / "manifest.json"
        path.write_text(path.read_text().replace('"validation": null', f'"validation": {nested(600)}'))
        refused(bundle, r"manifest\.json is damaged \(nested too deep\)")


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


UNSAFE_NAMES = [
    *("", ".", "..", ".hidden", "../tables.bin", "./tables.bin", "sub/tables.bin", "sub\\tables.bin"),
    *("/etc/passwd", "~/x", "\\\\host\\x", "C:tables.bin", "a:stream", "-rf", "tables.bin/"),
    *("tables.bin\n", "tables.bin\0", "tab les.bin", "t\u0430bles.bin", "x" * 300),
    *("manifest.json", "MANIFEST.JSON"),
]


def read_payload(directory: Path) -> Payload:
    payload: Payload = json.loads((directory / "manifest.json").read_text())
    return payload


class TestSealedManifests:
    """The checksum is no signature: these manifests have a right one."""

    @pytest.mark.parametrize("name", UNSAFE_NAMES)
    @pytest.mark.parametrize("place", ["embedding", "stage", "files"])
    def test_path_that_is_no_plain_name(self, bundle: Path, name: str, place: str) -> None:
        payload = read_payload(bundle)
        payload["files"][name] = payload["files"]["tables.bin"]
        if place == "embedding":
            payload["embedding"]["file"] = name
        if place == "stage":
            payload["stages"]["decoder"]["data"] = name
        seal(bundle, payload)
        refused(bundle, "a plain file name")

    def test_file_outside_with_the_right_hash(self, bundle: Path, tmp_path: Path) -> None:
        shutil.copy(bundle / "tables.bin", tmp_path / "tables.bin")
        payload = read_payload(bundle)
        payload["embedding"]["file"] = "../tables.bin"
        payload["files"]["../tables.bin"] = payload["files"].pop("tables.bin")
        seal(bundle, payload)
        refused(bundle, "a plain file name")

    def test_astronomic_tables_reserve_nothing(self, bundle: Path) -> None:
        payload = read_payload(bundle)
        payload["embedding"] |= {"hash_vocab": 2**31 - 1, "functions": 1000, "width": 1_000_000}
        payload["model"]["width"] = 1_000_000
        seal(bundle, payload)
        refused(bundle, "for tables of this shape")

    def test_file_that_claims_to_be_the_right_size(self, bundle: Path) -> None:
        payload = read_payload(bundle)
        with (bundle / "tables.bin").open("ab") as file:
            file.write(bytes(16))
        payload["files"]["tables.bin"]["bytes"] += 16
        seal(bundle, payload)
        refused(bundle, "for tables of this shape")


# Mutations: whatever is changed, the answer is a manifest or a BundleError, never another exception.

QUANTIZED = QuantizationSpec(
    "mse", 64, CalibrationSpec("mse", ("bundled:english.txt",), 96, 511, 3, 0.5), {"latent": (32, 64)}
)
FILES = {name: FileRecord(SPEC.bytes if name == SPEC.file else 300, "0" * 64, "1" * 64) for name in NAMES}
RECORDS = (elsewhere(), elsewhere("a family", "logits"))
VALID: Payload = replace(describe(), quantization=QUANTIZED, validation=RECORDS, files=FILES).to_dict()


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


numbers = st.one_of(
    st.integers(-2, 300),
    st.integers(),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400]),
    st.floats(),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20), st.text(st.characters(), max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    payload = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(payload)) or [()]))
        if not path:
            break
        place = payload
        for key in path[:-1]:
            place = place[key]
        how = draw(st.sampled_from(["replace", "remove", "add", "copy"]))
        if how == "remove":
            del place[path[-1]]
        elif how == "add" and isinstance(place, dict):
            place[draw(st.text(max_size=10))] = draw(values)
        elif how == "copy":
            other = draw(st.sampled_from(list(places(VALID))))
            value: Any = VALID
            for key in other:
                value = value[key]
            place[path[-1]] = copy.deepcopy(value)
        else:
            place[path[-1]] = draw(values)
    return payload


def test_the_unmutated_one_is_valid() -> None:
    assert Manifest.from_dict(VALID).to_dict() == VALID


@given(mutated())
@settings(max_examples=400, deadline=None)
def test_mutations_give_a_manifest_or_a_bundle_error(payload: Any) -> None:
    try:
        manifest = Manifest.from_dict(payload)
    except BundleError as error:
        message = str(error)
    else:
        message = ""
        assert Manifest.from_dict(manifest.to_dict()).to_dict() == manifest.to_dict()
    assert not message or (message.isprintable() and len(message) < 500)


@given(values)
@settings(max_examples=200, deadline=None)
def test_anything_gives_a_bundle_error(value: Any) -> None:
    with pytest.raises(BundleError):
        Manifest.from_dict(value)


HUGE = 10**5000
WRONG: dict[type, list[Any]] = {
    str: [None, True, 3, 0.5, HUGE, [], ["x"], {}, "", "\0", "\n", "x" * 5000],
    int: [None, True, "1", 1.5, 1.0, HUGE, -HUGE, math.nan, [], [1], {}],
    float: [True, "1.0", HUGE, -HUGE, math.nan, math.inf, [], {}],
    bool: [None, 0, 1, "true", [], {}],
    dict: [None, True, 1, "x", HUGE, [], ["x"], {"\ud800\n": {}}],
    list: [None, True, 1, "345", {}, [None], ["3"], [True], [3.0], [HUGE], [[3]]],
    type(None): [True, "x", HUGE, math.nan, [], ["x"]],
}
NULLABLE = {
    "window",
    "threshold",
    "threshold_add",
    "max_patch_length",
    "patch_size",
    "validation",
    "kernels",
    "processor",
    "onnxruntime",
    "block_size",
    "calibration",
    "smooth",
}


@pytest.mark.parametrize(
    "path",
    [p for p in places(VALID) if not {"config", "report"} & set(p)],
    ids=lambda path: "/".join(map(str, path)),
)
def test_each_field_with_each_wrong_type(path: tuple[Any, ...]) -> None:
    payload = copy.deepcopy(VALID)
    place = payload
    for key in path[:-1]:
        place = place[key]
    for value in WRONG[type(place[path[-1]])]:
        if (value is None and path[-1] in NULLABLE) or (value == ["3"] and path[-1] == "texts"):
            continue
        if value == {} and path == ("validation",):  # a report of before there were records
            continue
        place[path[-1]] = value
        with pytest.raises(BundleError) as caught:
            Manifest.from_dict(payload)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500
