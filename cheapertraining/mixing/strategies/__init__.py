"""Strategies, one a file: signals in, a wish for the sampling weights out. See
``mixing.signals.Strategy``."""

from cheapertraining.mixing.strategies.influence import InfluenceStrategy
from cheapertraining.mixing.strategies.proportional import ProportionalStrategy
from cheapertraining.mixing.strategies.schedule import ScheduleStrategy
from cheapertraining.mixing.strategies.static import StaticStrategy
from cheapertraining.mixing.strategies.unimax import UniMaxStrategy

__all__ = [
    "InfluenceStrategy",
    "ProportionalStrategy",
    "ScheduleStrategy",
    "StaticStrategy",
    "UniMaxStrategy",
]
