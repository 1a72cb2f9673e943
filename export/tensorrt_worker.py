"""One stage's graph to a TensorRT plan, in a process of its own.

A plan for several texts is built of the same file, whose graph is packed in memory.
TensorRT may crash, be killed when memory runs out, and cannot be interrupted while it compiles: none of that
should take this process along, and what it took is given back when it ends. What it logs is kept, not
printed: where it refuses a graph, the error has its reasons and the node's name. What this does not know:
bundles, and which profiles are wanted.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..graphs.attention import join_attention
from ..graphs.packing import pack_rows
from ..runtime.backends.signatures import ROWS
from ..runtime.backends.tensorrt import TensorRtModule, load_tensorrt
from ..runtime.child import Tell, run_child
from ..runtime.errors import BackendError
from ..runtime.host import peak_resident
from ..runtime.paths import native_path

__all__ = ["Moment", "PlanFacts", "PlanOptions", "build_in_child", "build_plan", "work"]

Report = Callable[[str, int, int], None]
"""report(what TensorRT is doing, steps of it done, steps of it), from any thread."""
Range = tuple[int, int, int]
"""Smallest, tuned for, largest."""
Axes = dict[str, Range]
"""One optimization profile: every dynamic axis by its name in the graph."""
Ranges = tuple[Axes, ...]

_INTERVAL = 0.25
_MOST_REASONS = 3
_NODE = re.compile(r"Parsing node: (?P<name>.*) \[(?P<operator>[^\]]*)\]$")
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
_WHERE = re.compile(r"\.? In [\w:]+ at [^\s)]+")
_CODE = re.compile(r"^\S+: Error Code \d+: ")
_SOURCE = re.compile(r"\[\w+\.cpp:\d+: (\w+)\] ")
_DATATYPES = re.compile(r"HW-specific datatypes: ([\w, ]+)")
_NO_GPU = "cudaError 35"


@dataclass(frozen=True)
class PlanOptions:
    """How to build; None leaves a value to the engine."""

    capabilities: tuple[str, ...]
    """Compute capabilities to build for; without effect where the engine builds for its own GPU only."""
    workspace: int | None = None
    """Most bytes of GPU memory that a layer may use to work in."""
    optimization_level: int | None = None
    """How hard the builder tries, 0 to 5."""
    timing_cache: Path | None = None
    """File of kernel times to start from and to add to; None = none."""
    half_attention: bool = False
    """Whether attention's products read float16."""
    rows: int = 1
    """For how many texts at once; more than 1 takes the profile of a packed graph."""


@dataclass(frozen=True)
class PlanFacts:
    """What building a plan took."""

    bytes: int
    """Size of the plan."""
    seconds: float
    """Wall-clock time, parsing included."""
    peak_memory: int | None
    """Most resident memory of the process until then, in bytes; None where unknown."""
    activations: int | None
    """GPU memory that running it takes besides weights, inputs and outputs, in bytes; None where unknown."""


@dataclass(frozen=True)
class Moment:
    """What a build is doing now."""

    phase: str
    """In TensorRT's words."""
    done: int
    """Steps of the phase that are done."""
    steps: int
    """Steps of the phase."""
    seconds: float
    """Since the build of this stage began."""
    memory: int | None
    """Most resident memory so far, in bytes; None where unknown."""


Watch = Callable[[Moment], None]
"""Called some times a second while a stage is built."""


def build_plan(
    trt: TensorRtModule,
    graph: Path,
    profiles: Ranges,
    plan: Path,
    options: PlanOptions,
    report: Report | None = None,
) -> PlanFacts:
    """Build the ONNX file `graph`, its weights beside it, and write the plan.

    Attention as `graphs` builds it is joined first, then the graph is packed for `options.rows` texts, in
    memory; the file stays as it is. Raises BackendError when the profiles are not right for the graph or
    TensorRT refuses either; BltError as `join_attention` and `pack_rows`; OSError when the plan cannot be
    written.
    """
    started = time.perf_counter()
    report = report or (lambda what, done, steps: None)
    build = _Build(trt, graph.name, options.capabilities)
    # Builder, parser and configuration keep plain pointers to each other: all stay referenced until the end.
    logger = trt.logger(build.log)
    builder = trt.module.Builder(logger)
    network = trt.create_network(builder)
    parser = trt.module.OnnxParser(network, logger)
    report("reading the graph", 0, 1)
    build.parse(parser, network, graph, options)
    config = builder.create_builder_config()
    trt.set_up(
        config,
        capabilities=options.capabilities,
        workspace=options.workspace,
        optimization_level=options.optimization_level,
    )
    monitor = trt.monitor(report)
    if monitor is not None:
        config.progress_monitor = monitor
    cache = None if options.timing_cache is None else trt.read_timing_cache(config, options.timing_cache)
    for axes in profiles:
        build.add_profile(builder, network, config, axes)
    host_memory = build.compile(builder, network, config)
    report("writing the plan", 0, 1)
    with plan.open("xb") as file:
        file.write(memoryview(host_memory))
    if cache is not None and options.timing_cache is not None:
        trt.write_timing_cache(config, options.timing_cache)
    return PlanFacts(
        bytes=plan.stat().st_size,
        seconds=time.perf_counter() - started,
        peak_memory=peak_resident(),
        activations=build.activations,
    )


class _Build:
    """The steps that can fail, and how each says why: from what TensorRT logs."""

    def __init__(self, trt: TensorRtModule, name: str, capabilities: tuple[str, ...]) -> None:
        self._trt, self._name, self._capabilities = trt, name, capabilities
        self._errors: list[str] = []
        self._node: tuple[str, str] | None = None  # name and operator of the node that was read last
        self.activations: int | None = None

    def log(self, severity: str, message: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self._errors.append(message)
        elif found := _NODE.search(message):
            self._node = (found["name"], found["operator"])
        elif found := _ACTIVATIONS.search(message):
            self.activations = max(self.activations or 0, int(found[1]))

    def _refused(self, *reasons: str) -> BackendError:
        target = f" for compute capability {' and '.join(self._capabilities)}" if self._capabilities else ""
        text = "; ".join(dict.fromkeys(reasons)) or "it gave no reason"
        return BackendError(f"{self._name}: {self._trt.name} {self._trt.version} refused it{target}: {text}")

    def parse(self, parser: Any, network: Any, graph: Path, options: PlanOptions) -> None:
        # The path is where external weights are looked for.
        with native_path(graph) as name:
            parsed = parser.parse(_prepared(graph, options), name)
        if not parsed:
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            raise self._refused(*(self._parser_reason(graph, error) for error in errors[:_MOST_REASONS]))
        if network.num_outputs == 0:
            raise self._refused("it is no graph, or one without outputs")

    def _parser_reason(self, graph: Path, error: Any) -> str:
        name, operator = error.node_name(), error.node_operator()
        if not operator and self._node is not None:  # its checks before reading a node name none
            name, operator = self._node
        reason = str(error.desc()).strip()
        domain = _domain(graph, name, operator)
        if domain:
            reason = f"the operator is {domain}'s own, not one of standard ONNX"
        return f"node {name!r} ({operator}): {reason}" if operator else reason

    def add_profile(self, builder: Any, network: Any, config: Any, axes: Axes) -> None:
        for name, (low, tuned, high) in axes.items():
            if not 0 <= low <= tuned <= high:
                raise BackendError(
                    f"{self._name}: the profile's range of {name} is {low}, {tuned}, {high}; "
                    "smallest <= tuned for <= largest is needed"
                )
        profile = builder.create_optimization_profile()
        for value in (network.get_input(index) for index in range(network.num_inputs)):
            if value.name == ROWS and value.is_shape_tensor:  # its values are sizes
                bounds = self._range_of(ROWS, ROWS, axes)
                profile.set_shape_input(ROWS, *([bound] * value.shape[0] for bound in bounds))
                continue
            sizes = [self._range(value, place, axes) for place in range(len(value.shape))]
            profile.set_shape(value.name, *(tuple(size[which] for size in sizes) for which in range(3)))
        if config.add_optimization_profile(profile) < 0:
            raise self._refused(*self._reasons())

    def _range(self, value: Any, place: int, axes: Axes) -> Range:
        size = value.shape[place]
        if size >= 0:
            return size, size, size
        return self._range_of(value.name, value.get_dimension_name(place) or place, axes)

    def _range_of(self, value: str, axis: str | int, axes: Axes) -> Range:
        if axis not in axes:
            raise BackendError(
                f"{self._name}: input {value!r} has an axis {axis!r}, for which the profiles "
                f"have no range; they have {', '.join(axes)}"
            )
        return axes[str(axis)]

    def compile(self, builder: Any, network: Any, config: Any) -> Any:
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self._refused(*self._datatype_reasons(network), *self._reasons())
        return plan

    def _reasons(self) -> list[str]:
        real = [message for message in self._errors if _NO_GPU not in message] or self._errors
        reasons = [_cleaned(message) for message in real[:_MOST_REASONS]]
        return [*reasons, *(["give a larger --workspace"] if "workspace" in "".join(reasons) else [])]

    def _datatype_reasons(self, network: Any) -> list[str]:
        """TensorRT names a type that the GPU lacks, but no node: the first that has it."""
        found = _DATATYPES.search(" ".join(self._errors))
        wanted = {name.strip().partition("_")[0].upper() for name in found[1].split(",")} if found else set()
        for index in range(network.num_layers if wanted else 0):
            layer = network.get_layer(index)
            types = {layer.get_output(place).dtype.name for place in range(layer.num_outputs)}
            if types & wanted:
                return [f"node {layer.name!r} gives {' and '.join(sorted(types & wanted))}"]
        return []


def _prepared(graph: Path, options: PlanOptions) -> bytes:
    """The file's graph with its attention joined, then packed; a file that is no graph as it is."""
    try:
        model = ir.load(graph)
    except Exception:  # TensorRT says what is wrong with it
        return graph.read_bytes()
    join_attention(model, graph.name, half=options.half_attention)
    proto = ir.to_proto(model)
    if options.rows > 1:
        proto = pack_rows(proto, options.rows, graph.name)
    prepared: bytes = proto.SerializeToString()
    return prepared


def _cleaned(message: str) -> str:
    """A message of TensorRT's without its source files."""
    text = _CODE.sub("", " ".join(message.split()))
    if (wrapped := re.fullmatch(r"[\w ]+ \((.*)\)", text)) is not None:
        text = wrapped[1]
    return _SOURCE.sub("", _WHERE.sub("", text))


def _domain(graph: Path, name: str, operator: str) -> str:
    """The domain of a node's operator; "" for ONNX's own, or where it can't be told."""
    try:
        nodes = ir.load(graph).graph.all_nodes()
        return next((node.domain for node in nodes if (node.name, node.op_type) == (name, operator)), "")
    except Exception:  # whatever it is, TensorRT's own words have to do
        return ""


def build_in_child(
    target: str,
    graph: Path,
    profiles: Ranges,
    plan: Path,
    options: PlanOptions,
    watch: Watch | None = None,
) -> PlanFacts:
    """`build_plan` with the module of `target` in a child process, which is gone when this returns or raises.

    Raises as `build_plan` and `load_tensorrt`, and BackendError when the process crashes or is killed.
    """
    cache = None if options.timing_cache is None else str(options.timing_cache.absolute())
    job = {
        "target": target,
        "graph": str(graph.absolute()),
        "profiles": profiles,
        "plan": str(plan.absolute()),
        "options": {**asdict(options), "timing_cache": cache},
    }

    def listen(event: Mapping[str, Any]) -> None:
        if watch is not None:
            watch(Moment(**event))

    outcome = run_child(__name__, job, listen)
    if outcome.error is not None:
        raise outcome.error if isinstance(outcome.error, OSError) else BackendError(str(outcome.error))
    if outcome.result is None:
        raise BackendError(
            f"{graph.name}: the process in which TensorRT builds it {outcome.death}; close other programs, "
            "add swap space, or take a smaller precision, --max-bytes or --max-patches"
        )
    return PlanFacts(**outcome.result)


# The child.


def work(request: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """What `build_in_child` runs: builds the plan and tells some times a second how far it is."""
    started, last = time.perf_counter(), ("starting", 0, 1)

    def report(*now: Any) -> None:
        nonlocal last
        last = now

    def tick() -> None:
        while True:
            tell(asdict(Moment(*last, time.perf_counter() - started, peak_resident())))
            time.sleep(_INTERVAL)

    threading.Thread(target=tick, daemon=True).start()
    options = request["options"]
    options["capabilities"] = tuple(options["capabilities"])
    options["timing_cache"] = options["timing_cache"] and Path(options["timing_cache"])
    facts = build_plan(
        load_tensorrt(request["target"]),
        Path(request["graph"]),
        tuple({name: tuple(sizes) for name, sizes in axes.items()} for axes in request["profiles"]),
        Path(request["plan"]),
        PlanOptions(**options),
        report,
    )
    return asdict(facts)
