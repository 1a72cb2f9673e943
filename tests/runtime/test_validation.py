"""Records of validations in a manifest: what is read, what is refused, and what becomes of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime.errors import BundleError
from blt_edge.runtime.manifest import Manifest, load_manifest, write_manifest
from blt_edge.runtime.validation import MOST_RECORDS, with_record
from hypothesis import given
from hypothesis import strategies as st
from support.bundles import seal
from support.processors import elsewhere

REPORT = {"passed": True, "against": "transformers 5.23.0", "data_bytes": 20, "rows": []}
RECORD = {
    "kernels": "x86-64 with AVX2",
    "processor": "AMD EPYC 7B13",
    "onnxruntime": "1.32.0",
    "report": REPORT,
}


@pytest.fixture
def payload(bundle: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    del loaded["checksum"]
    return loaded


def read(payload: dict[str, Any], validation: Any) -> Manifest:
    return Manifest.from_dict({**copy.deepcopy(payload), "validation": validation})


def test_none_is_null(payload: dict[str, Any]) -> None:
    assert payload["validation"] is None
    assert read(payload, None).validation == ()
    del payload["validation"]
    with pytest.raises(BundleError, match="validation is missing"):
        Manifest.from_dict(payload)


def test_records_are_read_in_their_order_and_written_as_they_were(payload: dict[str, Any]) -> None:
    records = [RECORD, {**RECORD, "kernels": None, "processor": None}, {**RECORD, "kernels": "aarch64"}]
    manifest = read(payload, records)
    assert [one.kernels for one in manifest.validation] == ["x86-64 with AVX2", None, "aarch64"]
    assert manifest.to_dict()["validation"] == records
    assert manifest.validated_on("aarch64") is manifest.validation[2]
    assert manifest.validated_on(None) is manifest.validation[1]
    assert manifest.validated_on("aarch") is None
    assert manifest.validation[0].machine == {key: RECORD[key] for key in list(RECORD)[:3]}


@pytest.mark.parametrize(
    ("report", "failed"),
    [
        ({"passed": True, "rows": [{"check": "logits", "ok": False}]}, ()),
        (
            {"passed": False, "rows": [{"check": "logits", "ok": False}, {"check": "x", "ok": True}]},
            ("logits",),
        ),
        ({"passed": "yes"}, ("it names no check",)),
        ({"passed": False, "rows": [1]}, ("it names no check",)),
        ({"passed": False, "rows": [{"check": "logits", "ok": True}]}, ("it names no check",)),
        (
            {"rows": [{"check": "\x1b[2J"}, {"check": "x" * 81}, {}]},
            ("'\\x1b[2J'", f"'{'x' * 56}...", "None"),
        ),
    ],
)
def test_a_manifest_of_before_there_were_families(
    bundle: Path, payload: dict[str, Any], report: dict[str, Any], failed: tuple[str, ...]
) -> None:
    seal(bundle, {**payload, "validation": report})
    manifest = load_manifest(bundle)
    (record,) = manifest.validation
    assert record.machine == {"kernels": None, "processor": None, "onnxruntime": None}
    assert (record.name, record.report) == ("an unnamed processor", report)
    assert record.failed_checks == failed
    # A record of a family is put beside it, and both are read again.
    write_manifest(bundle, manifest.with_validation(elsewhere()))
    assert load_manifest(bundle).validation == (record, elsewhere())


@pytest.mark.parametrize(
    ("validation", "told"),
    [
        ([], r"validation: got \[\], null, or a list of 1 to 32 records is needed"),
        ("passed", r"validation: got 'passed', null, or a list"),
        (
            [RECORD] * 2,
            r"validation\[1\]\.kernels: got 'x86-64 with AVX2', a family that no other record has",
        ),
        ([{**RECORD, "kernels": None}] * 2, r"validation\[1\]\.kernels: got None, a family that no other"),
        (
            [{**RECORD, "kernels": str(n)} for n in range(33)],
            r"validation: got \[.*\.\.\., null, or a list of 1",
        ),
        ([None], r"validation\[0\]: got None, an object is needed"),
        ([REPORT], r"validation\[0\]\.kernels is missing"),
        (
            [RECORD, {**RECORD, "kernels": "x" * 201}],
            r"\[1\]\.kernels: got 'x+\.\.\., printable text of 1 to 200",
        ),
        ([{**RECORD, "kernels": ""}], r"\[0\]\.kernels: got '', printable text"),
        ([{**RECORD, "kernels": "x\x1b[2J"}], r"\[0\]\.kernels: got 'x\\x1b\[2J', printable text"),
        ([{**RECORD, "kernels": "\u202ex"}], r"\[0\]\.kernels: got .*, printable text"),
        ([{**RECORD, "kernels": ["x"]}], r"\[0\]\.kernels: got \['x'\], printable text"),
        ([{**RECORD, "processor": "x" * 201}], r"\[0\]\.processor: got"),
        ([{**RECORD, "onnxruntime": 1.32}], r"\[0\]\.onnxruntime: got 1.32"),
        ([{**RECORD, "report": None}], r"\[0\]\.report: got None, an object is needed"),
        ([{**RECORD, "date": "today"}], r"\[0\]: got a field 'date', which its schema does not have"),
    ],
)
def test_anything_else_is_refused(payload: dict[str, Any], validation: Any, told: str) -> None:
    with pytest.raises(BundleError, match=told) as caught:
        read(payload, validation)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@given(st.lists(st.one_of(st.none(), st.integers(0, 40).map(str)), max_size=80))
def test_the_last_of_each_family_is_kept(families: list[str | None]) -> None:
    """Checked beside a plain list: of the last entries of each family, the newest."""
    records: tuple[Any, ...] = ()
    for number, family in enumerate(families):
        records = with_record(records, elsewhere(family, f"check {number}"))
    last = {family: number for number, family in enumerate(families)}
    newest = sorted(last.items(), key=lambda item: item[1])[-MOST_RECORDS:]
    assert [(one.kernels, one.failed_checks) for one in records] == [
        (family, (f"check {number}",)) for family, number in newest
    ]


def test_failures_are_a_few_words() -> None:
    assert elsewhere().failures == ""
    assert elsewhere("x", "a", "b", "c", "d", "e").failures == "a; b; c and 2 more"
