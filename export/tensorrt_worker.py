"""One stage's graph to a TensorRT plan, in this process.

What TensorRT logs is kept, not printed: where it refuses a graph, the error has its reasons and the node's
name. What this does not know: bundles, which profiles are wanted, and how to survive TensorRT's crashes
(`tensorrt_worker`).

Building one stage's plan in a process of its own.

TensorRT may crash, be killed when memory runs out, and cannot be interrupted while it compiles: none of that
should take this process along, and what it took is given back when it ends. The child reads one JSON line,
the job, from its stdin, and writes one JSON line per event on its stdout. It ends when its stdin does, so it
never outlives its parent.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..graphs.attention import join_attention
from ..runtime.backends.tensorrt import TensorRtModule, load_tensorrt
from ..runtime.child import Tell, run_child
from ..runtime.errors import BackendError
from ..runtime.host import peak_resident

__all__ = ["Moment", "PlanFacts", "PlanOptions", "Report", "Watch", "build_in_child", "build_plan", "work"]

Report = Callable[[str, int, int], None]
"""report(what TensorRT is doing, steps of it done, steps of it), from any thread."""

_MOST_REASONS = 3
_NODE = re.compile(r"Parsing node: (?P<name>.*) \[(?P<operator>[^\]]*)\]$")
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
_WHERE = re.compile(r"\.? In [\w:]+ at [^\s)]+")
_CODE = re.compile(r"^\S+: Error Code \d+: ")
_SOURCE = re.compile(r"\[\w+\.cpp:\d+: (\w+)\] ")
_DATATYPES = re.compile(r"HW-specific datatypes: ([\w, ]+)")
_NO_GPU = "cudaError 35"
_BINDING = "Int64 binding"


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


def build_plan(
    trt: TensorRtModule,
    graph: Path,
    profiles: tuple[dict[str, tuple[int, int, int]], ...],
    plan: Path,
    options: PlanOptions,
    report: Report | None = None,
) -> PlanFacts:
    """Build the ONNX file `graph`, its weights beside it, and write the plan.

    Attention that `graphs.layers` built is joined first, in memory; the file stays as it is.
    profiles: for each optimization profile the (smallest, tuned-for, largest) size of every dynamic axis of
    the inputs, by the axis's name in the graph. Raises BackendError when the profiles are not right for the
    graph or TensorRT refuses either; BltError as `join_attention`; OSError when the plan cannot be written.
    """
    started = time.perf_counter()
    report = report or (lambda what, done, steps: None)
    build = _Build(trt, graph.name, options.capabilities)
    # Builder, parser and configuration keep plain pointers to each other: all stay referenced until the end.
    logger = trt.logger(build.log.write)
    builder = trt.module.Builder(logger)
    network = trt.create_network(builder)
    parser = trt.module.OnnxParser(network, logger)
    report("reading the graph", 0, 1)
    build.parse(parser, network, graph, options.half_attention)
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
        activations=build.log.activations,
    )


@dataclass
class _Log:
    """What TensorRT said, as far as somebody may ask."""

    errors: list[str] = field(default_factory=list)
    node: tuple[str, str] | None = None
    """Name and operator of the node that was read last."""
    activations: int | None = None

    def write(self, severity: str, message: str) -> None:
        """Take in a message."""
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message)
        elif found := _NODE.search(message):
            self.node = (found["name"], found["operator"])
        elif found := _ACTIVATIONS.search(message):
            self.activations = max(self.activations or 0, int(found[1]))


class _Build:
    """The steps that can fail, and how each says why."""

    def __init__(self, trt: TensorRtModule, name: str, capabilities: tuple[str, ...]) -> None:
        self._trt, self._name, self._capabilities = trt, name, capabilities
        self.log = _Log()

    def _refused(self, *reasons: str) -> BackendError:
        target = f" for compute capability {' and '.join(self._capabilities)}" if self._capabilities else ""
        text = "; ".join(dict.fromkeys(reasons)) or "it gave no reason"
        return BackendError(f"{self._name}: {self._trt.name} {self._trt.version} refused it{target}: {text}")

    def parse(self, parser: Any, network: Any, graph: Path, half_attention: bool) -> None:
        """Read the graph into the network."""
        # The path is where external weights are looked for.
        if not parser.parse(_joined(graph, half_attention), str(graph)):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            raise self._refused(*(self._parser_reason(graph, error) for error in errors[:_MOST_REASONS]))
        if network.num_outputs == 0:
            raise self._refused("it is no graph, or one without outputs")

    def _parser_reason(self, graph: Path, error: Any) -> str:
        name, operator = error.node_name(), error.node_operator()
        if not operator and self.log.node is not None:  # its checks before reading a node name none
            name, operator = self.log.node
        reason = str(error.desc()).strip()
        domain = _domain(graph, name, operator)
        if domain:
            reason = f"the operator is {domain}'s own, not one of standard ONNX"
        return f"node {name!r} ({operator}): {reason}" if operator else reason

    def add_profile(
        self, builder: Any, network: Any, config: Any, axes: dict[str, tuple[int, int, int]]
    ) -> None:
        """Add an optimization profile with these ranges."""
        for name, (low, tuned, high) in axes.items():
            if not 0 <= low <= tuned <= high:
                raise BackendError(
                    f"{self._name}: the profile's range of {name} is {low}, {tuned}, {high}; "
                    "smallest <= tuned for <= largest is needed"
                )
        profile = builder.create_optimization_profile()
        for value in (network.get_input(index) for index in range(network.num_inputs)):
            sizes = [self._range(value, place, axes) for place in range(len(value.shape))]
            profile.set_shape(value.name, *(tuple(size[which] for size in sizes) for which in range(3)))
        if config.add_optimization_profile(profile) < 0:
            raise self._refused(*self._reasons())

    def _range(self, value: Any, place: int, axes: dict[str, tuple[int, int, int]]) -> tuple[int, int, int]:
        size = value.shape[place]
        if size >= 0:
            return size, size, size
        name = value.get_dimension_name(place)
        if name not in axes:
            raise BackendError(
                f"{self._name}: input {value.name!r} has an axis {name or place!r}, for which the profiles "
                f"have no range; they have {', '.join(axes)}"
            )
        return axes[name]

    def compile(self, builder: Any, network: Any, config: Any) -> Any:
        """The plan, in memory."""
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self._refused(*self._datatype_reasons(network), *self._reasons())
        return plan

    def _reasons(self) -> list[str]:
        real = [message for message in self.log.errors if _NO_GPU not in message] or self.log.errors
        reasons = [_cleaned(message) for message in real[:_MOST_REASONS]]
        return [*reasons, *(["give a larger --workspace"] if "workspace" in "".join(reasons) else [])]

    def _datatype_reasons(self, network: Any) -> list[str]:
        """TensorRT names a type that the GPU lacks, but no node: the first that has it."""
        found = _DATATYPES.search(" ".join(self.log.errors))
        wanted = {name.strip().partition("_")[0].upper() for name in found[1].split(",")} if found else set()
        for index in range(network.num_layers if wanted else 0):
            layer = network.get_layer(index)
            types = {layer.get_output(place).dtype.name for place in range(layer.num_outputs)}
            if types & wanted:
                return [f"node {layer.name!r} gives {' and '.join(sorted(types & wanted))}"]
        return []


def _joined(graph: Path, half: bool) -> bytes:
    """The file's graph with its attention joined; a file that is no graph as it is."""
    try:
        model = ir.load(graph)
    except Exception:  # TensorRT says what is wrong with it
        return graph.read_bytes()
    join_attention(model, graph.name, half=half)
    joined: bytes = ir.to_proto(model).SerializeToString()
    return joined


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


_INTERVAL = 0.25


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


def build_in_child(
    target: str,
    graph: Path,
    profiles: tuple[dict[str, tuple[int, int, int]], ...],
    plan: Path,
    options: PlanOptions,
    watch: Watch | None = None,
) -> PlanFacts:
    """`build_plan` with the module of `target` in a child process, which is gone when this returns or raises.

    Raises as `build_plan` and `load_tensorrt`, and BackendError when the process crashes or is killed.
    """
    job = {
        "target": target,
        "graph": str(graph.absolute()),
        "profiles": profiles,
        "plan": str(plan.absolute()),
        "capabilities": options.capabilities,
        "workspace": options.workspace,
        "optimization_level": options.optimization_level,
        "timing_cache": None if options.timing_cache is None else str(options.timing_cache.absolute()),
        "half_attention": options.half_attention,
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
    reporter = _Reporter(tell)
    threading.Thread(target=reporter.tick, daemon=True).start()
    facts = build_plan(
        load_tensorrt(request["target"]),
        Path(request["graph"]),
        tuple({name: tuple(sizes) for name, sizes in axes.items()} for axes in request["profiles"]),
        Path(request["plan"]),
        PlanOptions(
            tuple(request["capabilities"]),
            request["workspace"],
            request["optimization_level"],
            None if request["timing_cache"] is None else Path(request["timing_cache"]),
            request["half_attention"],
        ),
        reporter.report,
    )
    return asdict(facts)


class _Reporter:
    """Tells what was reported last, some times a second."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._started = time.perf_counter()
        self._last = ("starting", 0, 1)

    def report(self, phase: str, done: int, steps: int) -> None:
        """Keep what is being done."""
        self._last = (phase, done, steps)

    def tick(self) -> None:
        """Tell it, again and again."""
        while True:
            phase, done, steps = self._last
            seconds = time.perf_counter() - self._started
            self._tell(asdict(Moment(phase, done, steps, seconds, peak_resident())))
            time.sleep(_INTERVAL)
