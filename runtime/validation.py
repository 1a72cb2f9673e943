"""What a bundle's manifest says of its validations: one record for each family of kernels.

A quantized bundle may pass on one processor and not on another (`kernels` says why), so a record names what
it was made on. Records of before they did are read, too: they were made on a processor without a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from .fields import Fields, by, fault, read, record, shown
from .host import MOST_NAME

__all__ = ["MOST_RECORDS", "ValidationRecord", "first_of", "read_records", "with_record"]

MOST_RECORDS = 32
"""In a manifest: far more than there are families."""

_MAX_CHECK = 80  # characters of a check's name
_NameOrNone = Annotated[str | None, by(Fields.text_or_none, MOST_NAME)]


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """One comparison with a reference, and what it was made on."""

    kernels: _NameOrNone
    """Family of the kernels that computed: `kernel_family`'s name, or `Engine.kernels` on a GPU; None = not
    recorded, as before there were families."""
    processor: _NameOrNone
    """Name of the processor, or of the GPU and the library on it; None = not recorded."""
    onnxruntime: _NameOrNone
    """Its version; None on a GPU, where `processor` has the library's, or not recorded."""
    report: Annotated[dict[str, Any], Fields.tree]
    """What was compared, and what came out (`export.validate`); of somebody else's manifest, anything."""

    @property
    def name(self) -> str:
        """The family, or that there is none."""
        return self.kernels or "an unnamed processor"

    @property
    def failed_checks(self) -> tuple[str, ...]:
        """What was found wrong, safe to print; empty when it passed."""
        if self.report.get("passed") is True:
            return ()
        rows: Any = self.report.get("rows")
        readable = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
        names = [row.get("check") for row in rows if not row.get("ok")] if readable else []
        return tuple(name if _is_name(name) else shown(name) for name in names) or ("it names no check",)

    @property
    def failures(self) -> str:
        """The first of `failed_checks` and how many more, for a message."""
        return first_of(self.failed_checks)

    @property
    def machine(self) -> dict[str, str | None]:
        """What it was made on, as JSON."""
        return {"kernels": self.kernels, "processor": self.processor, "onnxruntime": self.onnxruntime}


def first_of(names: tuple[str, ...]) -> str:
    """Three names, and how many more there are."""
    return "; ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_records(fields: Fields, key: str) -> tuple[ValidationRecord, ...]:
    """A manifest's records, the newest last: null, a list, or one report of before there were families.

    Raises BundleError, for two records of one family too.
    """
    value, where = fields.take(key)
    if isinstance(value, dict):
        return (ValidationRecord(kernels=None, processor=None, onnxruntime=None, report=value),)
    if value is None:
        return ()
    if not isinstance(value, list) or not 0 < len(value) <= MOST_RECORDS:
        raise fault(where, value, f"null, or a list of 1 to {MOST_RECORDS} records")
    records: dict[str | None, ValidationRecord] = {}
    for number, item in enumerate(value):
        one = read(item, f"{where}[{number}]", record(ValidationRecord))
        if one.kernels in records:
            raise fault(f"{where}[{number}].kernels", one.kernels, "a family that no other record has")
        records[one.kernels] = one
    return tuple(records.values())


def with_record(records: tuple[ValidationRecord, ...], new: ValidationRecord) -> tuple[ValidationRecord, ...]:
    """The records with a new one at the end, in the place of its family's; beyond `MOST_RECORDS` without the
    oldest."""
    others = tuple(one for one in records if one.kernels != new.kernels)
    return (*others, new)[-MOST_RECORDS:]


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= _MAX_CHECK
