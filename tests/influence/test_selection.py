"""Which samples are taken: greedily in a batch, by share, by threshold."""

from __future__ import annotations

import math

import pytest
import torch

from cheapertraining.errors import UserError
from cheapertraining.influence.selection import above_threshold, greats, top_fraction


def gain_of(chosen: list[int], scores: torch.Tensor, gram: torch.Tensor, lr: float) -> float:
    """What a set is worth: its summed scores less what its members say twice."""
    twice = sum(float(gram[i, j]) for place, i in enumerate(chosen) for j in chosen[:place])
    return lr * float(scores[chosen].sum()) - lr**2 * twice


class TestGreats:
    @pytest.mark.parametrize("seed", range(5))
    def test_each_choice_adds_most_by_brute_force(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        gradients = torch.randn(9, 4, generator=generator, dtype=torch.float64)
        probe = torch.randn(4, generator=generator, dtype=torch.float64)
        scores, gram, lr = gradients @ probe, gradients @ gradients.T, 0.3
        chosen = greats(scores, gram, 6, lr).tolist()
        for place, taken in enumerate(chosen):
            left = [i for i in range(9) if i not in chosen[:place]]
            best = max(left, key=lambda i: gain_of([*chosen[:place], i], scores, gram, lr))
            assert taken == best

    def test_it_does_not_take_the_same_twice(self) -> None:
        """Two copies of the best sample and one that is second: the copy loses to it, unless the step is tiny."""
        gradients = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        scores = gradients @ torch.tensor([1.0, 1.0])
        assert greats(scores, gradients @ gradients.T, 2, lr=0.5).tolist() == [0, 2]
        assert greats(scores, gradients @ gradients.T, 2, lr=1e-3).tolist() == [0, 1]

    def test_all_of_them_once(self) -> None:
        chosen = greats(torch.tensor([-1.0, -3.0, -2.0]), torch.eye(3), 3, lr=1.0)
        assert chosen.tolist() == [0, 2, 1]

    def test_arguments_stay(self) -> None:
        scores, gram = torch.ones(3), torch.ones(3, 3)
        greats(scores, gram, 2, lr=1.0)
        assert torch.equal(scores, torch.ones(3))
        assert torch.equal(gram, torch.ones(3, 3))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"k": 4}, "expected k from 1 to the 3 samples of the batch, found 4"),
            ({"k": 0}, "found 0"),
            ({"lr": 0.0}, "expected a learning rate above 0, found 0.0"),
            ({"lr": math.nan}, "found nan"),
            ({"gram": torch.eye(2)}, "expected a gram matrix [3, 3], found [2, 2]"),
            ({"gram": torch.full((3, 3), math.nan)}, "found NaN or infinity in it"),
            ({"scores": torch.tensor([1.0, math.nan, 0.0])}, "found 1 of 3 NaN or infinite"),
        ],
    )
    def test_refused(self, change: dict[str, object], message: str) -> None:
        arguments = {"scores": torch.ones(3), "gram": torch.eye(3), "k": 2, "lr": 0.1} | change
        with pytest.raises(UserError) as error:
            greats(**arguments)  # type: ignore[arg-type]
        assert message in str(error.value)


class TestByScore:
    def test_top_fraction(self) -> None:
        scores = torch.tensor([0.5, -1.0, 3.0, 0.5, 2.0])
        assert top_fraction(scores, 0.4).tolist() == [False, False, True, False, True]
        assert top_fraction(scores, 0.5).tolist() == [
            True,
            False,
            True,
            False,
            True,
        ]  # 2.5 is 3, and the first of equals
        assert top_fraction(scores, 1.0).all()

    def test_threshold_is_not_reached_by_equals(self) -> None:
        assert above_threshold(torch.tensor([0.0, 1.0, -1.0]), 0.0).tolist() == [False, True, False]

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda s: top_fraction(s, 0.1), "chooses none of 3 samples. Expected at least 0.166667"),
            (lambda s: top_fraction(s, 1.5), "expected a share above 0 and up to 1, such as 0.2, found 1.5"),
            (lambda s: above_threshold(s, 2.0), "chooses none of 3 samples. Expected one below the highest score, 2"),
            (lambda s: above_threshold(s[:0], 2.0), "expected scores [N] of at least one sample"),
            (lambda s: top_fraction(s * math.inf, 0.5), "NaN or infinite"),
        ],
    )
    def test_refused(self, call: object, message: str) -> None:
        with pytest.raises(UserError) as error:
            call(torch.tensor([0.0, 1.0, 2.0]))  # type: ignore[operator]
        assert message in str(error.value)
