"""The mixture's course and the last influence matrix as pictures, for loggers that show images (W&B).

Pictures(mixture, interval=100)      # Trainer(callbacks=[...])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from numpy.typing import NDArray

from cheapertraining.mixing.algorithm import OnlineMixing
from cheapertraining.observe.charts import colour

if TYPE_CHECKING:
    from cheapertraining.data.mixing import MixedDataset

__all__ = ["Pictures", "mixture_picture", "score_picture"]

Pixels = NDArray[np.uint8]


class Pictures(Callback):
    """Log the images ``pictures/mixture`` and ``pictures/influence`` every ``interval`` batches and at the end.

    Args:
        mixture: of the training data.
        interval: batches.
    """

    def __init__(self, mixture: MixedDataset, interval: int = 100) -> None:
        self.mixture, self.interval = mixture, interval
        # (batch, weights that it was drawn with) where they changed: a resumed mixture knows those from then on alone.
        self._course: list[tuple[int, dict[str, float]]] = []

    def state_dict(self) -> dict[str, Any]:
        """The mixture's course; JSON-able."""
        return {"course": [list(change) for change in self._course]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as :meth:`state_dict` left off."""
        self._course = [(int(batch), dict(weights)) for batch, weights in state.get("course", [])]

    def batch_end(self, state: State, logger: Logger) -> None:
        assert state.max_duration is not None
        batch = state.timestamp.batch.value
        weights = self.mixture.weights_at(batch - 1)
        if not self._course or self._course[-1][1] != weights:
            self._course.append((batch, weights))
        if (batch % self.interval and state.timestamp < state.max_duration) or dist.get_global_rank() != 0:
            return
        names = self.mixture.source_names
        self._log(logger, "pictures/mixture", mixture_picture(*self._shares(batch), names), batch)
        mixing = next((each for each in state.algorithms if isinstance(each, OnlineMixing)), None)
        history = [] if mixing is None else [decision for decision in mixing.controller.history if decision.scores]
        if history:
            self._log(logger, "pictures/influence", score_picture(history[-1].scores, history[-1].errors, names), batch)

    def _shares(self, batch: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Where weights changed and on the eve of it, up to ``batch``, and the shares there ``[n, K]``."""
        names, starts = self.mixture.source_names, [start for start, _ in self._course]
        ends = [max(start, after - 1) for start, after in zip(starts, [*starts[1:], batch + 1], strict=True)]
        at = np.array([starts, ends]).T.reshape(-1)
        shares = np.array([[weights.get(name, 0.0) for name in names] for _, weights in self._course])
        return at, shares.repeat(2, axis=0)

    def _log(self, logger: Logger, name: str, picture: Pixels, batch: int) -> None:
        # In a table, W&B's client would ask its server first, and training wait for the answer.
        logger.log_images(picture, name=name, channels_last=True, step=batch, use_table=False)


def mixture_picture(batches: NDArray[np.int64], shares: NDArray[np.float64], names: Sequence[str]) -> Pixels:
    """Shares ``[n, K]`` at ``batches`` ``[n]``, stacked: uint8 ``[height, width, 3]``."""
    figure, axes = _frame()
    axes.stackplot(batches, shares.T, labels=names, colors=[colour(k) for k in range(len(names))])
    axes.set(xlabel="batch", ylabel="sampling weight", ylim=(0, 1), xlim=(batches[0], max(batches[-1], batches[0] + 1)))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return _pixels(figure)


def score_picture(
    scores: dict[str, dict[str, float | None]], errors: dict[str, dict[str, float | None]], names: Sequence[str]
) -> Pixels:
    """Scores in standard errors, a row a probe, a column a source: uint8 ``[height, width, 3]``."""
    values = np.array([[_ratio(scores[row].get(name), errors[row].get(name)) for name in names] for row in scores])
    figure, axes = _frame()
    limit = max(1.0, float(np.nanmax(np.abs(values), initial=0.0)))
    image = axes.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(scores)), list(scores))
    figure.colorbar(image, label="standard errors")
    return _pixels(figure)


def _ratio(score: float | None, error: float | None) -> float:
    return score / error if score is not None and error else float("nan")


def _frame() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")  # of no global state, as pyplot's would be
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _pixels(figure: Any) -> Pixels:
    figure.canvas.draw()
    pixels: Pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    return pixels
