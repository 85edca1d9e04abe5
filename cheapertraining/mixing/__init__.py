"""Signals to weights: strategies wish, constraints project, the controller decides when.

``OnlineMixing`` is imported when it is first asked for, since it brings Composer with it.
"""

from typing import TYPE_CHECKING, Any

from cheapertraining.mixing.calculator import MixtureWeightCalculator, create_mixture_calculator
from cheapertraining.mixing.constraints import Constraints
from cheapertraining.mixing.controller import Decision, Mixture, MixtureController
from cheapertraining.mixing.signals import (
    GRAM,
    INFLUENCE,
    LOSSES,
    PROBE_LOSSES,
    PROBE_PRODUCTS,
    REFERENCE,
    ProbeReading,
    Signals,
    SourceInfo,
    Strategy,
)
from cheapertraining.mixing.strategies import (
    ADOStrategy,
    AioliStrategy,
    DoGEStrategy,
    DoGETargetStrategy,
    DoReMiStrategy,
    GRAPEStrategy,
    InfluenceStrategy,
    MatchingStrategy,
    MixingLawStrategy,
    ODMStrategy,
    PiKEStrategy,
    ProportionalStrategy,
    RegMixStrategy,
    RnBStrategy,
    ScheduleStrategy,
    SkillItStrategy,
    StaticStrategy,
    UniMaxStrategy,
)
from cheapertraining.mixing.tracker import InfluenceTracker, create_influence_tracker

if TYPE_CHECKING:
    from cheapertraining.mixing.algorithm import OnlineMixing

__all__ = [
    "GRAM",
    "INFLUENCE",
    "LOSSES",
    "PROBE_LOSSES",
    "PROBE_PRODUCTS",
    "REFERENCE",
    "ADOStrategy",
    "AioliStrategy",
    "Constraints",
    "Decision",
    "DoGEStrategy",
    "DoGETargetStrategy",
    "DoReMiStrategy",
    "GRAPEStrategy",
    "InfluenceStrategy",
    "InfluenceTracker",
    "MatchingStrategy",
    "MixingLawStrategy",
    "Mixture",
    "MixtureController",
    "MixtureWeightCalculator",
    "ODMStrategy",
    "OnlineMixing",
    "PiKEStrategy",
    "ProbeReading",
    "ProportionalStrategy",
    "RegMixStrategy",
    "RnBStrategy",
    "ScheduleStrategy",
    "Signals",
    "SkillItStrategy",
    "SourceInfo",
    "StaticStrategy",
    "Strategy",
    "UniMaxStrategy",
    "create_influence_tracker",
    "create_mixture_calculator",
]


def __getattr__(name: str) -> Any:
    if name == "OnlineMixing":
        from cheapertraining.mixing.algorithm import OnlineMixing

        return OnlineMixing
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
