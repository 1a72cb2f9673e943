"""`blt-edge build --target tensorrt` and `tensorrt-rtx`: what is shown while engines are built, and after."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .display import print_table, size, status
from .memory import available_memory
from .messages import printable
from .session import Session, is_terminal

if TYPE_CHECKING:
    from ...export.tensorrt_engines import BuildPlan, TensorRtBuild
    from ...export.tensorrt_worker import Moment
    from ...runtime.specs import Axis

__all__ = ["build", "show_plan"]


def show_plan(session: Session, bundle: Path, target: str, given: Mapping[str, Any]) -> tuple[Path, str]:
    """Print on stdout what `build` would do; returns what it would write, and how much of it."""
    from ...export.tensorrt_engines import TensorRtOptions, plan_tensorrt

    plan = plan_tensorrt(bundle, TensorRtOptions(target=target, **given))
    _warn_of_refusals(session, bundle, plan)
    _show_estimate(plan, sys.stdout)
    _show_profiles(plan, sys.stdout)
    if plan.timing_cache is not None:
        sys.stdout.write(f"what it learns about kernels would be kept in {plan.timing_cache}\n")
    return plan.form, f"about {size(plan.plan_bytes)}"


def build(session: Session, bundle: Path, target: str, given: Mapping[str, Any], force: bool) -> Path:
    """Build engines; returns their directory."""
    from ...export.tensorrt_engines import TensorRtOptions, build_tensorrt, plan_tensorrt

    options = TensorRtOptions(target=target, **given)
    plan = plan_tensorrt(bundle, options)
    shown = not session.quiet and sys.stderr is not None
    if force or not plan.there:
        _warn_of_refusals(session, bundle, plan)
    if shown and (force or not plan.there):
        _show_estimate(plan, sys.stderr)
    with status(session) as say:
        result = build_tensorrt(bundle, options, force=force, watch=_watch(say, plan))
    if shown and result.facts:
        _show_result(plan, result, sys.stderr)
        if not result.proven:
            capabilities = " or ".join(plan.capabilities)
            session.say(
                f"not run yet: this machine has no GPU of compute capability {capabilities}; where they are "
                "loaded, they are compared with what the portable graphs gave here"
            )
    elif shown:
        session.say("they are there already, and sound; --force builds them again")
    return plan.form


def _warn_of_refusals(session: Session, bundle: Path, plan: BuildPlan) -> None:
    """Say what an old TensorRT refuses as far as is known; whether it does, only building shows."""
    from ...calibration.precision import format_precision
    from ...export.tensorrt_lint import lint_bundle
    from ...export.tensorrt_rules import rules_of_old
    from ...runtime.manifest import load_manifest

    rules = None if plan.flavour.ahead_of_time else rules_of_old(plan.flavour.version)
    findings = [] if rules is None else lint_bundle(bundle, load_manifest(bundle), rules)
    if not findings:
        return
    stages = list(dict.fromkeys(finding.stage for finding in findings))
    mix = {stage: "fp16" if stage in stages else part.precision for stage, part in plan.stages.items()}
    line = (
        f"warning: {plan.flavour.name} {plan.flavour.version} will probably refuse {' and '.join(stages)}: "
        f"{findings[0].reason} ({findings[0].node}{'' if len(findings) == 1 else ' and others'}); "
        f"export or quantize with --precision {format_precision(mix)}"
    )
    session.note(printable(line))


def _watch(say: Callable[[str], None], plan: BuildPlan) -> Callable[[str, Moment | None], None]:
    terminal = is_terminal(sys.stderr)

    def watch(stage: str, moment: Moment | None) -> None:
        line = f"{stage} graph"
        if moment is not None:
            if not terminal:  # a log has no use for a line each moment
                return
            memory = "" if moment.memory is None else f", {size(moment.memory)}"
            step = f" {moment.done}/{moment.steps}" if moment.steps > 1 else ""
            what = moment.phase[:1].lower() + moment.phase[1:]
            line += f" ({plan.stages[stage].precision}), {moment.seconds:.0f} s{memory}: {what}{step}"
        say(line)

    return watch


def _show_estimate(plan: BuildPlan, file: IO[str]) -> None:
    file.write(f"{plan.flavour.name} {plan.flavour.version}, compute capability ")
    file.write(f"{' and '.join(plan.capabilities)}\n")
    rows = [
        (f"{stage} graph", part.precision, size(part.weights), size(part.plan), size(part.peak_memory))
        for stage, part in plan.stages.items()
    ]
    total = sum(part.weights for part in plan.stages.values())
    rows.append(("engines", "", size(total), size(plan.plan_bytes), size(plan.peak_memory)))
    print_table(
        ("part", "precision", ">weights", ">engine, about", ">memory to build, about"), rows, file, total=True
    )
    available = available_memory()
    if available is not None and available < plan.peak_memory:
        file.write(
            f"only {size(available)} of memory are available: building may fail; close other programs, or "
            "add swap space\n"
        )


def _show_profiles(plan: BuildPlan, file: IO[str]) -> None:
    rows = []
    for stage, (prefill, decode) in plan.profiles.stages.items():
        for name, axis in prefill.items():
            rows.append((stage, name, _range(axis), _range(decode[name])))
    print_table(("part", "axis", "prefill", "decode"), rows, file)


def _range(axis: Axis) -> str:
    if axis.min == axis.max:
        return str(axis.min)
    return f"{axis.min} to {axis.max}, tuned for {axis.opt}"


def _show_result(plan: BuildPlan, result: TensorRtBuild, file: IO[str]) -> None:
    rows = [
        (
            f"{stage} graph",
            plan.stages[stage].precision,
            size(facts.bytes),
            f"{facts.seconds:.1f} s",
            _known(facts.peak_memory),
            _known(facts.activations),
        )
        for stage, facts in result.facts.items()
    ]
    every = list(result.facts.values())
    rows.append(
        (
            "engines",
            "",
            size(sum(facts.bytes for facts in every)),
            f"{sum(facts.seconds for facts in every):.1f} s",
            _most(facts.peak_memory for facts in every),
            _most(facts.activations for facts in every),
        )
    )
    columns = ("part", "precision", ">engine", ">time", ">memory to build", ">GPU memory to work in")
    print_table(columns, rows, file, total=True)
    limits = plan.profiles.limits
    file.write(
        f"for texts of up to {limits.max_bytes} bytes and {limits.max_patches} patches, patches of up to "
        f"{limits.max_patch_length} bytes, {limits.prefill_chunk} bytes a pass\n"
    )


def _known(amount: int | None) -> str:
    return "unknown" if amount is None else size(amount)


def _most(amounts: Any) -> str:
    return _known(max((amount for amount in amounts if amount is not None), default=None))
