"""What document 000 advises for training a vein: a smaller learning rate, a frozen start, a threshold τ on a schedule.

All three are pure functions of the update's number, so a resumed run needs no state of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from headwise.errors import SettingsError
from headwise.ffn.vft import NormalCompensator, VFTSpec
from headwise.model import build
from headwise.registry import ComponentSpec
from headwise.spec import ModelSpec
from headwise.train.settings import TrainSettings
from headwise.vein import vein_parameters

if TYPE_CHECKING:
    from torch import nn

S = TypeVar("S", bound=TrainSettings)
VEIN_SETTINGS = ("vein_lr", "vein_freeze")


def with_last_tau(spec: ModelSpec, settings: TrainSettings) -> ModelSpec:
    """The spec with the τ that `tau_schedule` ends with, so that the trained model is evaluated, saved and loaded with
    the τ it has come to.

    Raises:
        SettingsError: a schedule for a line that compensates nowhere.
    """
    if not settings.tau_schedule:
        return spec
    if not _compensates(spec):
        raise SettingsError(
            f"tau_schedule: {str(spec)!r} has no normal compensation whose τ could change; "
            f"give its feed-forward one, as vft(s_normals=1), or leave tau_schedule out"
        )

    def at_the_end(item: ComponentSpec) -> ComponentSpec:
        return item.model_copy(update={"tau": settings.tau_schedule[-1]}) if isinstance(item, VFTSpec) else item

    return spec.replace(ffn=spec.ffn.with_each(at_the_end))


def _compensates(spec: ModelSpec) -> bool:
    return any(isinstance(item, VFTSpec) and item.s_normals for item in spec.ffn.each())


def fitting(settings: S, spec: ModelSpec) -> S:
    """The settings without those of a vein, or of its τ, where `spec` has none: for lines that are trained side by
    side.
    """
    asked = [name for name in (*VEIN_SETTINGS, "tau_schedule") if getattr(settings, name)]
    unused = [name for name in asked if name == "tau_schedule" and not _compensates(spec)]
    unused += _without_vein(spec, settings)
    return settings.model_copy(update={name: type(settings).model_fields[name].get_default() for name in unused})


def _without_vein(spec: ModelSpec, settings: TrainSettings) -> list[str]:
    """The settings that ask something of a vein, where `spec` has none."""
    asked = [name for name in VEIN_SETTINGS if getattr(settings, name)]
    return asked if asked and not vein_parameters(build(spec, device="meta")) else []


def check_vein(spec: ModelSpec, settings: TrainSettings) -> None:
    """`SettingsError` where the settings ask something of a vein, and `spec` has none."""
    for name in _without_vein(spec, settings):
        raise SettingsError(
            f"{name}: {str(spec)!r} has no vein; leave {name} out, or use a mechanism that has one, "
            f"as attention=tva(rank=8) not folded, or ffn=vft(rank=16)"
        )


def unused_by_all(settings: TrainSettings, specs: Sequence[ModelSpec]) -> list[str]:
    """What `settings` ask of a vein that none of the lines has, in words; empty where all of it is of use."""
    left = [fitting(settings, spec) for spec in specs]
    return [
        f"{name}: none of the lines has a {'normal compensation' if name == 'tau_schedule' else 'vein'} to use it on"
        for name in (*VEIN_SETTINGS, "tau_schedule")
        if getattr(settings, name) and not any(getattr(each, name) for each in left)
    ]


def vein_factors(model: nn.Module, settings: TrainSettings) -> dict[str, float]:
    """The learning-rate factor of each of the vein's parameters, by name; empty where `vein_lr` is not given."""
    return {} if settings.vein_lr is None else dict.fromkeys(vein_parameters(model), settings.vein_lr)


class VeinSchedule:
    """Sets a model up for one update after another: the vein frozen or not, τ at its value."""

    def __init__(self, model: nn.Module, settings: TrainSettings) -> None:
        self._settings = settings
        self._parameters = list(vein_parameters(model).values()) if settings.vein_freeze else []
        self._compensators = [m for m in model.modules() if isinstance(m, NormalCompensator)]

    def set(self, step: int) -> None:
        """Before update `step` (0-based). A frozen parameter has no gradient, so AdamW neither moves nor decays it."""
        for parameter in self._parameters:
            parameter.requires_grad_(step >= self._settings.vein_freeze)
        values = self._settings.tau_schedule
        if values:
            tau = values[min(len(values) - 1, step * len(values) // self._settings.steps)]
            for compensator in self._compensators:
                compensator.tau = tau
