"""What does text that must fit cost, and gain: a JSON record with long names against as many free bytes.

Theory: what can only come next needs no choice, so a record's names, quotes and commas are read several at a
time, as a prompt is; what is left to choose costs a mask a byte. The record is made first, then the same
number of bytes without a constraint, with the same drafts; bytes a second count decoding alone. The mask's
time, of the processor, is that of walking a guide through the record: what may come next, and one step on.

    python -m blt_edge.tools.bench.guided --bundle demo-bundle
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from ...runtime import BltModel, Constraint, GenerationOptions
from ...runtime.guide import new_guide
from ...runtime.names import DRAFTS
from ...runtime.vocabulary import byte_ids
from ..profile.statistics import Spread, machine
from .common import options, print_json

_PROMPT = b"Alice was beginning to get very tired of sitting by her sister on the bank.\n"
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name_of_the_main_character": {"type": "string", "maxLength": 16},
        "age_of_the_main_character_in_years": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind_of_animal_that_appears_first": {"enum": ["rabbit", "caterpillar", "cat", "mouse", "dormouse"]},
        "is_there_a_happy_ending": {"type": "boolean"},
        "list_of_places_in_their_order": {
            "type": "array",
            "items": {"enum": ["garden", "river bank", "kitchen", "court"]},
            "minItems": 2,
            "maxItems": 3,
        },
    },
    "additionalProperties": False,
}
_SCHEMA["required"] = list(_SCHEMA["properties"])


def main() -> None:
    parser = options(__doc__, rounds=9, threads=1)
    parser.add_argument("--draft", choices=DRAFTS, default="auto")
    parser.add_argument("--temperature", type=float, default=0.7)
    args = parser.parse_args()
    model = BltModel.load(args.bundle, threads=args.threads)
    print(f"{machine()}; {args.bundle}; engine: {model.engine}; drafts: {args.draft}")
    constraint = Constraint.json_schema(_SCHEMA)
    guided, free, ratios, masks = [], [], [], []
    for number in range(args.rounds + 1):
        asked = GenerationOptions(1000, args.temperature, seed=number, draft=args.draft)
        record = model.generate(_PROMPT, replace(asked, constraint=constraint))
        if record.finish_reason != "eos":
            raise SystemExit(f"the record has no end after {record.stats.new_bytes} bytes")
        fast, plain = record.stats.bytes_per_second, _free(model, asked, record.stats.new_bytes)
        if number:  # the first prepares what is prepared once
            guided.append(fast)
            free.append(plain)
            ratios.append(fast / plain)
            masks.append(_mask_microseconds(record.data, constraint))
    forced = record.stats.forced / record.stats.new_bytes
    print(record.text)
    print(f"{record.stats.new_bytes} bytes, {forced:.0%} of which could only come next")
    told = {"guided bytes a second": guided, "free bytes a second": free, "ratio": ratios}
    told["mask, us a byte"] = masks
    document: dict[str, Any] = {"benchmark": "guided", "bundle": str(args.bundle), "draft": args.draft}
    for name, values in told.items():
        spread = Spread.of(values)
        print(f"{name:<22} {spread}")
        document[name.replace(",", "").replace(" ", "_")] = spread.to_dict()
    print_json({**document, "threads": args.threads, "forced_share": round(forced, 3)})


def _free(model: BltModel, asked: GenerationOptions, count: int) -> float:
    """Bytes a second of so many bytes that anything may be; the text's own end is put off."""
    never = dict.fromkeys(model.manifest.generation.end_ids, -100.0)
    result = model.generate(_PROMPT, replace(asked, max_new_bytes=count, logit_bias=never))
    return result.stats.bytes_per_second


def _mask_microseconds(data: bytes, constraint: Constraint) -> float:
    guide = new_guide(GenerationOptions(constraint=constraint))
    assert guide is not None
    ids = byte_ids(data).tolist()
    started = time.thread_time()
    for number in ids:
        guide.mask()
        guide.advance([number])
    return 1e6 * (time.thread_time() - started) / len(ids)


if __name__ == "__main__":
    main()
