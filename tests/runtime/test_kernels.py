"""Processors by the kernels that ONNX Runtime chooses on them."""

from __future__ import annotations

from pathlib import Path

import pytest
from blt_edge.runtime.fields import Fields
from blt_edge.runtime.host import MOST_NAME
from blt_edge.runtime.kernels import kernel_family, kernels_matter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.processors import ARM, X86, become

AVX512 = f"{X86} avx512f avx512dq avx512cd avx512bw avx512vl"


@pytest.mark.parametrize(
    ("machine", "flags", "name"),
    [
        ("x86_64", "fpu sse sse2 ssse3 sse4_2", "x86-64 without AVX2"),
        ("x86_64", "fpu sse sse4_2 avx f16c", "x86-64 without AVX2"),
        ("x86_64", "sse avx avx2", "x86-64 without AVX2"),  # MLAS asks for FMA as well
        ("x86_64", X86, "x86-64 with AVX2"),
        ("AMD64", X86, "x86-64 with AVX2"),
        ("x86_64", f"{X86} avx_vnni", "x86-64 with AVX-VNNI"),
        ("x86_64", f"{X86} avx512f avx512cd avx512er avx512pf", "x86-64 with AVX2"),  # Xeon Phi
        ("x86_64", AVX512, "x86-64 with AVX-512"),
        ("x86_64", f"{AVX512} avx_vnni", "x86-64 with AVX-512"),
        ("x86_64", f"{AVX512} avx512_vnni", "x86-64 with AVX-512 VNNI"),
        (
            "x86_64",
            f"{AVX512} avx512_vnni avx_vnni amx_tile amx_int8 avx512_bf16",
            "x86-64 with AVX-512 VNNI",
        ),
        ("aarch64", "fp asimd evtstrm crc32 cpuid", "aarch64 without dot product"),  # Raspberry Pi 4
        ("aarch64", ARM, "aarch64 with dot product"),
        ("aarch64", f"{ARM} sve i8mm svei8mm bf16", "aarch64 with i8mm"),
        ("aarch64", f"{ARM} sve svei8mm", "aarch64 with dot product"),
        ("arm64", None, "aarch64, instructions unknown"),
        ("AMD64", None, "x86-64, instructions unknown"),
        ("riscv64", None, "riscv64"),
        ("i686", X86, "i686"),
        ("", None, "unknown processor"),
    ],
)
def test_families(
    machine: str, flags: str | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(monkeypatch, tmp_path, machine, flags)
    assert kernel_family() == name


@given(
    st.sampled_from(("x86_64", "AMD64", "aarch64", "riscv64", "x" * 300, "a\x1b\n")),
    st.lists(st.sampled_from(f"{AVX512} avx512_vnni avx_vnni {ARM} i8mm sve rvv xyz".split())),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_name_can_be_kept_and_does_not_depend_on_order(
    tmp_path: Path, machine: str, flags: list[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        become(patch, tmp_path, "one", " ".join(flags))
        patch.setattr("platform.machine", lambda: machine)
        name = kernel_family()
        assert Fields({"name": name}).text("name", MOST_NAME) == name
        become(patch, tmp_path, "one", " ".join(reversed(flags)))
        patch.setattr("platform.machine", lambda: machine)
        assert kernel_family() == name


@pytest.mark.parametrize(
    ("precisions", "families", "matter"),
    [
        ({"fp32"}, ("x86-64 with AVX2", "aarch64 with i8mm", "TensorRT on Orin"), False),
        ({"fp32", "fp16"}, ("x86-64 with AVX2", "x86-64 with AVX-512"), False),
        ({"fp32", "fp16"}, ("x86-64 with AVX2", "aarch64 with i8mm"), True),
        ({"fp16"}, ("x86-64 with AVX2", "CUDAExecutionProvider on Orin"), True),
        ({"fp32", "int8w"}, ("x86-64 with AVX2", "x86-64 with AVX-512"), True),
        ({"int4", "int8"}, ("aarch64 with i8mm", "aarch64 with dot product"), True),
    ],
)
def test_where_kernels_matter(precisions: set[str], families: tuple[str, ...], matter: bool) -> None:
    assert kernels_matter(precisions, families) is matter
    assert kernels_matter(precisions, families[::-1]) is matter
