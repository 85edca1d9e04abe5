"""An orderly end where the mixture has nothing left to draw (``data.on_exhaustion: stop``)."""

from __future__ import annotations

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from cheapertraining.data.mixing import MixedDataset

__all__ = ["StopWhenExhausted"]


class StopWhenExhausted(Callback):
    """Ends training when the loader has ended; Composer would otherwise begin empty epochs for ever."""

    def __init__(self, mixture: MixedDataset) -> None:
        self.mixture = mixture

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Say why, and stop."""
        if self.mixture.exhausted is not None:
            logger.log_hyperparameters({"stopped_early": self.mixture.exhausted})
            if dist.get_global_rank() == 0:
                ended = f"The data ended after {state.timestamp.batch.value} batches"
                print(f"{ended}: {self.mixture.exhausted}", flush=True)
            # The end of the data is not the end of an epoch: a checkpoint counts the samples since the epoch began, and
            # must count all of them, or a resumed run would train on the data again.
            assert state.previous_timestamp is not None
            state.timestamp = state.previous_timestamp
            state.stop_training()  # type: ignore[no-untyped-call]
