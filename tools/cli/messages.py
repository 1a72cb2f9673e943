"""Error lines: one line each, in the user's words, whoever raised the error."""

from __future__ import annotations

import re
import sys

import click

__all__ = [
    "crash_line",
    "error_line",
    "flagged",
    "foreseen_line",
    "is_usage",
    "missing_package",
    "option_name",
    "printable",
    "usage_line",
]

_EXTRAS = {
    "onnxruntime": "cpu",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "safetensors": "export",
    "ml_dtypes": "export",
    "huggingface_hub": "export",
    "torch": "validate",
    "transformers": "validate",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
}
_SEVERAL_LINES = re.compile(r"\s*\n\s*")


def printable(text: str) -> str:
    """`text` on one line, without anything that a terminal would obey."""
    line = _SEVERAL_LINES.sub(" ", text.strip())
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in line
    )


def error_line(text: str, prefix: str = "error: ") -> None:
    """Write the line on stderr, as long as there is one."""
    if sys.stderr is not None:
        try:
            sys.stderr.write(f"blt-edge: {prefix}{printable(text)}\n")
            sys.stderr.flush()
        except OSError:
            pass


# 1. Wrong usage, found by click or by us.


def option_name(parameter: click.Parameter) -> str:
    """What the user knows a parameter by: "--top-k", "FILE"."""
    if isinstance(parameter, click.Argument):
        return (parameter.metavar or parameter.name or "").upper().strip("[].")
    return next((flag for flag in parameter.opts if flag.startswith("--")), parameter.opts[0])


def usage_line(error: click.UsageError) -> str:
    """A usage error in one line, with the option's name in front."""
    path = error.ctx.command_path if error.ctx else "blt-edge"
    more = f"; see {path} --help"
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return f"{option_name(error.param)} is missing{more}"
    if isinstance(error, click.NoSuchOption):
        near = " or ".join(error.possibilities or ())
        return f"there is no option {error.option_name}" + (f"; did you mean {near}?" if near else more)
    message = error.message.rstrip(".")
    if isinstance(error, click.BadParameter):
        return f"{option_name(error.param)}: {message}" if error.param is not None else message
    # Our own say what to do; click's don't.
    return message if ";" in message else f"{message[:1].lower()}{message[1:]}{more}"


def flagged(message: str, command: click.Command) -> str:
    """A message about a field of an options class, as one about the option: "top_k is" to "--top-k is"."""
    word = re.match(r"[a-z]+ [a-z]+(?=: )|[a-z_]+(?=:? )", message)
    name = word[0].replace(" ", "_") if word else ""
    for parameter in command.params:
        if word and isinstance(parameter, click.Option) and parameter.name == name:
            return option_name(parameter) + message[word.end() :]
    return message


# 2. Errors of a run.


def is_usage(error: Exception) -> bool:
    """Whether an error of ours means that an option or a path was wrong."""
    from ...runtime.errors import OptionError, PromptTooLongError

    return isinstance(error, (OptionError, PromptTooLongError))


def foreseen_line(error: Exception) -> str | None:
    """The line of an error that can happen to anybody; None for one that nobody foresaw."""
    from ...runtime.errors import BltError

    if isinstance(error, BltError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory; close other programs, or take a smaller model or --prefill-chunk"
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return None


def missing_package(error: ModuleNotFoundError) -> str | None:
    """What to install for a package that is missing; None when it is none of those we make optional."""
    name = (error.name or "").partition(".")[0]
    if name not in _EXTRAS:
        return None
    return f"this needs the package {name}, which is not installed: pip install 'blt-edge[{_EXTRAS[name]}]'"


def crash_line(error: Exception, verbose: bool) -> str:
    """The line of an error that nobody foresaw."""
    text = str(error).strip()
    hint = "" if verbose else " (run with -v for the traceback)"
    return f"{type(error).__name__}: {text}{hint}" if text else f"{type(error).__name__}{hint}"
