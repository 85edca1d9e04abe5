"""Strategies, one a file: signals in, a wish for the sampling weights out. See
``mixing.signals.Strategy``."""

from cheapertraining.mixing.strategies.ado import ADOStrategy
from cheapertraining.mixing.strategies.aioli import AioliStrategy
from cheapertraining.mixing.strategies.doge import DoGEStrategy, DoGETargetStrategy
from cheapertraining.mixing.strategies.doremi import DoReMiStrategy
from cheapertraining.mixing.strategies.grape import GRAPEStrategy
from cheapertraining.mixing.strategies.influence import InfluenceStrategy
from cheapertraining.mixing.strategies.matching import MatchingStrategy
from cheapertraining.mixing.strategies.mixing_law import MixingLawStrategy, RegMixStrategy
from cheapertraining.mixing.strategies.odm import ODMStrategy
from cheapertraining.mixing.strategies.pike import PiKEStrategy
from cheapertraining.mixing.strategies.proportional import ProportionalStrategy
from cheapertraining.mixing.strategies.rnb import RnBStrategy
from cheapertraining.mixing.strategies.schedule import ScheduleStrategy
from cheapertraining.mixing.strategies.skillit import SkillItStrategy
from cheapertraining.mixing.strategies.static import StaticStrategy
from cheapertraining.mixing.strategies.unimax import UniMaxStrategy

__all__ = [
    "ADOStrategy",
    "AioliStrategy",
    "DoGEStrategy",
    "DoGETargetStrategy",
    "DoReMiStrategy",
    "GRAPEStrategy",
    "InfluenceStrategy",
    "MatchingStrategy",
    "MixingLawStrategy",
    "ODMStrategy",
    "PiKEStrategy",
    "ProportionalStrategy",
    "RegMixStrategy",
    "RnBStrategy",
    "ScheduleStrategy",
    "SkillItStrategy",
    "StaticStrategy",
    "UniMaxStrategy",
]
