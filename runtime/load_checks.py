"""What is looked at when a model is loaded, beside its files: settings, threads, what validations said."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from .errors import BltWarning, FailedValidationWarning, NotValidatedHereWarning, OptionError
from .fields import shown
from .kernels import kernels_matter
from .manifest import Manifest
from .processors import usable_cores
from .validation import first_of

__all__ = ["checked_settings", "warn_of_threads", "warn_of_validation"]


def checked_settings(given: object) -> Mapping[str, str]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(one, str) for one in (*given, *given.values())):
        raise OptionError(f"provider_options is {shown(given)}; allowed is a dict of text to text")
    return given


def warn_of_threads(threads: int) -> None:
    cores = usable_cores()
    told = f"{cores} cores that this process may use" if cores > 1 else "one core that this process may use"
    warnings.warn(
        f"threads: {threads} are more than the {told}: they wait for each other, which is slow; "
        f"give at most {cores}, or leave it out",
        BltWarning,
        stacklevel=3,
    )


def warn_of_validation(path: Path, manifest: Manifest, here: str) -> None:
    """What the manifest's records say of the bundle on the kernels `here`, if it is nothing good.

    A record without a family may be of this one: when it failed, that counts as if it were; when it passed
    and is alone, it is no reason to warn. What failed on other kernels is told of every bundle, what passed
    there only where results depend on kernels.
    """
    records = manifest.validation
    if not records:
        return
    own = manifest.validated_on(here)
    last = own or manifest.validated_on(None)
    if last is not None and last.failed_checks:
        told = (
            f"{path} failed its last validation ({last.failures}), it may not compute "
            f"what the model does; blt-edge validate {path} shows by how much"
        )
        warnings.warn(told, FailedValidationWarning, stacklevel=3)
        return
    if own is not None:
        return
    names = tuple(one.kernels for one in records if one.kernels is not None)
    failed = [one for one in records if one.failed_checks]
    precisions = {stage.precision for stage in manifest.stages.values()}
    if failed:
        told = f"{path} failed its validation on {failed[-1].name} ({failed[-1].failures}), and had none on"
    elif names and kernels_matter(precisions, (here, *names)):
        told = f"{path} was validated on {first_of(names)}, not on"
    else:
        return
    told += f" {here}, whose kernels may round otherwise; blt-edge validate {path} measures it here"
    warnings.warn(told, NotValidatedHereWarning, stacklevel=3)
