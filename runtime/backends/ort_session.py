"""Sessions of ONNX Runtime: how they are set up for a stage, and what they say of themselves."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, BundleError, engine_error, requirement
from ..host import describe_processor
from ..paths import native_path
from .signatures import Signature

__all__ = [
    "import_onnxruntime",
    "input_types",
    "int8_saturates",
    "new_session",
    "save_optimized",
    "session_entries",
    "session_options",
    "session_signature",
]

Array = npt.NDArray[Any]

SPIN_MICROSECONDS = "50"
"""How long a worker waits for its next part by computing. Beside other work that takes the processor from
whoever has the part: unbounded, two threads gave a quarter to a tenth of one thread's speed. Bounded by less
than a product takes, nothing is lost on an idle machine (docs/results.md, "Beside other work")."""

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(int8)": np.int8,
}


def import_onnxruntime() -> Any:
    """The onnxruntime module. Raises BackendError when it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"device 'cpu' needs ONNX Runtime, which is not installed; pip install {requirement('cpu')}"
        ) from error
    # As for a session's: what no session logs, such as a size beyond all memory, is raised, too.
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


def session_entries(precision: str) -> dict[str, str]:
    """Configuration of a session over a stage of this precision, whatever the threads."""
    # Four sessions share the cores: a worker that spins after its run takes one from the next stage.
    entries = {"session.force_spinning_stop": "1"}
    if precision in ("fp32", "fp16"):
        # Weights stay in the mapped file: prepacking would copy every matrix into private memory,
        # and float32 products run at full read bandwidth without it.
        entries["session.disable_prepacking"] = "1"
    # Integer products need prepacking: without it a block product is some fifty times slower.
    if precision in ("int4", "int8w"):
        # Inputs are rounded to int8 block by block, each row by itself: five times the speed.
        entries["session.qdq_matmulnbits_accuracy_level"] = "4"
    if precision == "int8" and int8_saturates():
        entries["session.x64quantprecision"] = "1"
    return entries


def session_options(ort: Any, precision: str, threads: int | None) -> Any:
    """Options for a session over a stage of this precision; `ort` is the onnxruntime module.

    threads None leaves the choice to ONNX Runtime.
    """
    options = ort.SessionOptions()
    # Its errors are raised, too; its log would show names inside a graph to the terminal as they are.
    options.log_severity_level = 4
    options.inter_op_num_threads = 1
    # An arena keeps what the largest chunk of a prompt took, four times over, for steps that need next to
    # nothing; without it a step takes as long.
    options.enable_cpu_mem_arena = False
    # It would keep a plan of memory for each combination of shapes that ever ran, for good: prompts and
    # packed texts are of other sizes each time, and a server's heap grew by 3 MB in 1,200 texts.
    options.enable_mem_pattern = False
    if threads is not None:
        options.intra_op_num_threads = threads
    # Not among `session_entries`: it changes no engine.
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_MICROSECONDS)
    for name, value in session_entries(precision).items():
        options.add_session_config_entry(name, value)
    return options


def save_optimized(
    model: bytes, weights: Path, precision: str, graph: Path, *, prepacked: bool = True
) -> None:
    """Write a stage as ONNX Runtime runs it here: optimized, weights in its kernels' layout beside it.

    model: the stage's graph, serialized; weights: the directory of its external data; graph: the file to
    write, whose weights go to its name with ".data", from where they are mapped. prepacked: keep them as
    kernels want them, too; else that is done at each load. Raises BackendError when ONNX Runtime is missing,
    refuses the graph, or cannot write.
    """
    ort = import_onnxruntime()
    options = session_options(ort, precision, threads=None)
    data = graph.with_name(graph.name + ".data")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data.name)
    if prepacked:
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    with native_path(graph) as name:
        options.optimized_model_filepath = name
        new_session(ort, graph.name, model, options, weights)
    data.touch()  # a graph of few weights keeps them inside


def new_session(ort: Any, name: str, model: bytes | Path, options: Any, weights: Path | None = None) -> Any:
    """A session on the CPU over a graph's file, or over a graph whose external data lie in `weights`.

    Raises BackendError when it is refused.
    """
    with native_path(model if isinstance(model, Path) else weights or Path()) as path:
        if weights is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", path)
        graph = path if isinstance(model, Path) else model
        try:
            return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises many kinds, all with the reason in their text
            raise engine_error(f"{name}: ONNX Runtime {ort.__version__} refused it", error) from error


def session_signature(session: Any) -> Signature:
    """Inputs and outputs of a session's graph, as it declares them."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    return (
        {value.name: tuple(value.shape) for value in inputs},
        {value.name: tuple(value.shape) for value in outputs},
    )


def input_types(file: str, session: Any) -> dict[str, type[np.generic]]:
    """What a session's inputs hold. Raises BundleError naming `file` for what no stage takes."""
    values = session.get_inputs()
    for value in values:
        if value.type not in _DTYPES:
            raise BundleError(f"{file}: {value.name[:60]!r} is {value.type}; export the checkpoint again")
    return {value.name: _DTYPES[value.type] for value in values}


@cache
def int8_saturates() -> bool:
    """Whether this processor's fast int8 products may overflow 16 bits: x86 without VNNI instructions.

    Where it cannot be told, the answer is yes: slower and right.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    return "vnni" not in describe_processor()["features"]
