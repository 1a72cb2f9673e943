"""The next step after a failed validation: which stage is blamed, and what is tried instead."""

from __future__ import annotations

from dataclasses import replace

import pytest
from blt_edge.export.remedy import next_step
from blt_edge.export.validate import ValidationReport, ValidationRow
from blt_edge.graphs.precision import parse_precision
from blt_edge.runtime.names import STAGES
from blt_edge.runtime.quantization_spec import CalibrationSpec, MixSpec, QuantizationSpec
from support.profiles import demo_manifest


@pytest.mark.parametrize(
    ("precision", "tables", "failed", "step"),
    [
        ("int4", "int8", "decoder: logits", "--precision int8w,latent=int4: the decoder is"),
        ("int4", "int8", "latent: x, decoder: logits", "--precision int4,latent=int8w: the latent is"),
        ("int4,patcher=int4", "int4", "patcher: logits, decoder: logits", "--precision int4: the patcher is"),
        ("int4", "int4", "predictions: more bits", "--tables int8: no stage differs too much by itself"),
        ("int4", "int8", "greedy: 5", "--precision int8w: no stage differs"),
        ("int8w", "int8", "encoder: byte states", "--precision int8w,encoder=fp16: the encoder"),
        ("int8", "int8", "latent: x", "--smooth 0.5, or --precision int8,latent=int8w: the latent"),
        ("decoder=int8w", "fp16", "encoder: byte states", "--precision decoder=fp16: the encoder"),
        ("fp16", "fp16", "predictions: argmax", "--precision fp32: no stage"),
        ("fp32", "fp16", "encoder: byte states", ""),
    ],
)
def test_the_first_stage_that_fails_is_blamed(precision: str, tables: str, failed: str, step: str) -> None:
    manifest = demo_manifest()
    words = parse_precision(precision, STAGES)
    dtype = {"fp16": "float16", **{word: word for word in ("int8", "int4")}}[tables]
    manifest = replace(
        manifest,
        stages={name: replace(spec, precision=words[name]) for name, spec in manifest.stages.items()},
        embedding=replace(manifest.embedding, dtype=dtype),
        quantization=QuantizationSpec("mse", 32, CalibrationSpec("mse", ("a",), 1, 1, 0)),
    )
    rows = tuple(ValidationRow(check, 1, "==", 0) for check in failed.split(", "))
    found = next_step(manifest, ValidationReport("x", "int4", 10, rows))
    assert found.startswith(step) if step else found == ""
    # Smoothing is not tried twice.
    calibration = CalibrationSpec("mse", ("a",), 1, 1, 0, 0.5)
    smoothed = replace(manifest, quantization=QuantizationSpec("mse", 32, calibration))
    assert "--smooth" not in next_step(smoothed, ValidationReport("x", "int4", 10, rows))


@pytest.mark.parametrize(
    ("failed", "step"),
    [
        ("decoder: logits", "--precision int8w,latent=int4 --target-boundaries 0.99: the decoder is"),
        ("patcher: logits", "--precision int4: the patcher is"),
    ],
)
def test_a_mix_is_searched_again_where_it_is_not_to_blame(failed: str, step: str) -> None:
    manifest = demo_manifest()
    words = parse_precision("int4,patcher=int4", STAGES)
    mix = MixSpec(("a",), ("b",), 0.99, 0.995, ("c",), 2, 511, 0)
    manifest = replace(
        manifest,
        stages={name: replace(spec, precision=words[name]) for name, spec in manifest.stages.items()},
        quantization=QuantizationSpec("mse", 32, None, mix=mix),
    )
    report = ValidationReport("x", "int4", 10, (ValidationRow(failed, 1, "==", 0),))
    assert next_step(manifest, report).startswith(step)
