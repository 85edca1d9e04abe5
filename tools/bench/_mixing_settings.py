"""What is trained on what, towards what: the settings of the mixture benchmark, and who takes part in them.

A1  the target is in the mix, but scarce, and one source is corrupted: can the matching source be found?
A2  only sources that are far from the target: there is no good answer, and uniform must not be lost to
A3  the target is absent, one near relative is there
B   clean sources, the mean over all of them is the target
C   clean and corrupted sources, the mean over the clean ones is the target
D   A1 with very little of the target, for longer: repetition
E   B, where one source appears at half time and one runs out
T, U  the settings that contenders are tuned on and that nobody is scored on: as A1 and as B, of other sources
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tools.bench._mixing_corpus import CORRUPTED, Corpus

SCARCE, TINY = 167_000, 20_000
"""Tokens of a scarce target: about half of what uniform sampling would draw of it in 600 steps; and next to nothing."""
REFERENCE_STEPS = 300
"""At most, of the model that doremi compares with."""


@dataclass(frozen=True)
class Setting:
    """Sources, target and length of a comparison.

    Attributes:
        sources: trained on.
        targets: sources whose held-out loss (the mean over them) is to fall; their probe splits steer.
        steps: budget.
        cut: source to the tokens that its train split is cut to.
        late: source that appears at half time.
        max_epochs: caps by source.
    """

    name: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    steps: int
    cut: dict[str, int] = field(default_factory=dict)
    late: str | None = None
    max_epochs: dict[str, float] = field(default_factory=dict)

    @property
    def judged(self) -> tuple[str, ...]:
        """Sources that are evaluated: the targets, and what is trained on and can be read."""
        return tuple(dict.fromkeys([*self.targets, *(name for name in self.sources if name not in UNREADABLE)]))


UNREADABLE = (*CORRUPTED, "noise")


def make_settings(corpus: Corpus) -> dict[str, Setting]:
    """The settings by name, of the sources that there are: with human-written problems as target, or without."""
    if "gsm8k" in corpus.sources:
        target, relative, clean = "gsm8k", "math", ("textbook", "dialog", "factbook", "code", "docs", "gesetze_de")
        distant, more = ("textbook", "shakespeare", "factbook", "gesetze_de", "code", "docs", "chat"), ("shakespeare",)
        tuned, others = "rustbook", ("wiki", "chat", "docs", "sft_human", "shakespeare", "parliament")
        readable = ("gsm8k", "textbook", "dialog", "code", "factbook")
    else:
        target, relative, clean = "code", "docs", ("wiki", "math", "chat", "parliament", "faq")
        distant, more = clean, ("docs",)
        tuned, others = "chat", ("wiki", "math", "docs", "parliament", "faq")
        readable = ("wiki", "math", "code", "docs", "chat")
    return _settings(target, relative, clean, distant, more, tuned, others, readable)


def _settings(
    target: str,
    relative: str,
    clean: Sequence[str],
    distant: Sequence[str],
    more: Sequence[str],
    tuned: str,
    others: Sequence[str],
    readable: Sequence[str],
) -> dict[str, Setting]:
    average = (target, *clean, *more)
    made = [
        Setting("A1", (target, *clean, "noise"), (target,), 600, cut={target: SCARCE}),
        Setting("A2", (*distant, "noise"), (target,), 300),
        Setting("A3", (relative, *clean, "noise"), (target,), 300),
        Setting("B", average, average, 300),
        Setting("C", (*readable, *CORRUPTED), tuple(readable), 300),
        Setting("D", (target, *clean, "noise"), (target,), 1200, cut={target: TINY}),
        Setting("E", average, average, 400, cut={clean[1]: TINY}, late=more[0], max_epochs={clean[1]: 1.0}),
        Setting("T", (tuned, *others, "noise"), (tuned,), 200, cut={tuned: SCARCE}),
        Setting("U", (tuned, *others), (tuned, *others), 200),
    ]
    return {setting.name: setting for setting in made}


_MIXING = "algorithms.online_mixing"
_DOUBLING = "updates=[10,20,40,80,160,320,640]"
_GREEDY = ("constraints.kl_step=null", "constraints.floor=0.0")
_FREE = ("interval=10ba", "warmup=20ba")


@dataclass(frozen=True)
class Contender:
    """One way to set the weights.

    Attributes:
        name: in tables.
        keys: what a user would set in the run's yaml, ``key=value`` below ``algorithms.online_mixing``.
        trials: additional keys, of which the best on the settings for tuning was frozen; the first is the default.
        kind: ``baseline``, ``ours``, ``port`` of a published rule, or ``offline``: weights from runs made before.
    """

    name: str
    keys: tuple[str, ...]
    trials: tuple[tuple[str, ...], ...] = ((),)
    kind: str = "port"

    def overrides(self, setting: Setting, trial: int = 0) -> tuple[str, ...]:
        """``key=value`` of the run; a measurement takes about 32 rows of the probes, however many there are."""
        probe_samples = 16 if len(setting.targets) == 1 else max(4, 32 // len(setting.targets))
        keys = (f"influence.probe_samples={probe_samples}", *self.keys, *self.trials[trial])
        return tuple(f"{_MIXING}.{key}" for key in keys)


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("uniform", ("strategy=static",), kind="baseline"),
        Contender("proportional", ("strategy=proportional",), kind="baseline"),
        Contender("unimax", ("strategy=unimax", "unimax.max_epochs=1.0"), kind="baseline"),
        Contender(
            "influence",
            (
                "strategy=influence",
                _DOUBLING,
                "constraints.kl_step=2.0",
                "influence.source_samples=8",
                "influence.ema=0.5",
                "influence.combine=true",
            ),
            trials=(
                ("influence.learning_rate=2.0", "influence.threshold=1.0"),
                ("influence.learning_rate=1.0", "influence.threshold=2.5"),
                ("influence.learning_rate=2.0", "influence.threshold=1.0", "influence.metric=adam"),
            ),
            kind="ours",
        ),
        Contender(
            "matching",
            ("strategy=matching", _DOUBLING, *_GREEDY, "influence.source_samples=8"),
            trials=(
                ("matching.ridge=0.3",),
                ("matching.ridge=0.1",),
                ("matching.ridge=1.0",),
            ),
            kind="ours",
        ),
        Contender("doge", ("strategy=doge", "interval=20ba", "warmup=20ba")),
        Contender("doge (target)", ("strategy=doge", "doge.target=true", "interval=20ba", "warmup=20ba")),
        Contender("doremi", ("strategy=doremi", *_FREE)),
        Contender("odm", ("strategy=odm", *_FREE)),
        Contender("ado", ("strategy=ado", *_FREE)),
        Contender("skillit", ("strategy=skillit", *_FREE, *_GREEDY)),
        Contender("pike", ("strategy=pike", "interval=20ba", "warmup=20ba")),
        Contender("rnb", ("strategy=rnb", "interval=40ba", "warmup=20ba")),
        Contender("grape", ("strategy=grape", "interval=40ba", "warmup=20ba")),
        Contender("aioli", ("strategy=aioli", "interval=4ba", "warmup=20ba", *_GREEDY)),
        Contender("mixing_law", ("strategy=static",), kind="offline"),
        Contender("regmix", ("strategy=static",), kind="offline"),
        Contender("oracle", ("strategy=static",), kind="baseline"),
    )
}


IDEAS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "A3": {
        "matching, 16 samples": ("matching", ("influence.source_samples=16",)),
        "matching, near the start": ("matching", ("constraints.kl_prior=0.7",)),
        "influence, guarded": ("influence", ("influence.guard=true",)),
    },
    "C": {
        "matching, 16 samples": ("matching", ("influence.source_samples=16",)),
        "matching, every 20 steps": ("matching", ("updates=null", "interval=20ba", "warmup=20ba")),
        "influence, cosine": ("influence", ("influence.metric=cosine", "influence.scorer=hook")),
    },
}
"""What else was tried where a goal was missed, by setting: the contender and further keys; neither tuned nor tabled."""
