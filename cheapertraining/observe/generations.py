"""What the model writes after fixed prompts, as it learns: for people to read.

Generations(tokenizer, ["Once upon a time"], interval=100, new_tokens=48, folder="runs/mine")      # callbacks=[...]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from composer.core import Callback, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist

from cheapertraining.data.collate import IGNORED
from cheapertraining.data.tokenization import TokenizerWrapper
from cheapertraining.distillation.on_policy import sample_answers
from cheapertraining.errors import UserError

__all__ = ["Generations", "continuations"]


class Generations(Callback):
    """Let the model continue each prompt every ``interval`` batches, and at the end.

    Texts go to ``<folder>/generations.jsonl``, a line each (``{"step", "prompt", "text"}``), and to a table
    ``generations`` of loggers that have tables. The same draws at each interval, so that texts differ by what was
    learnt alone. Costs a forward pass for each new token, of all prompts together.

    Args:
        tokenizer: of the model.
        prompts: texts.
        interval: batches.
        new_tokens: of each text.
        temperature: of the sampling, above 0.
        seed: of the draws.
        folder: of the run; None writes no file.

    Raises:
        UserError: a prompt is empty.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        prompts: Sequence[str],
        *,
        interval: int = 100,
        new_tokens: int = 48,
        temperature: float = 0.7,
        seed: int = 0,
        folder: Path | None = None,
    ) -> None:
        if any(not tokenizer.encode(prompt) for prompt in prompts):
            raise UserError("callbacks.generations.prompts: expected text in each, found an empty one.")
        self.tokenizer, self.prompts, self.interval = tokenizer, list(prompts), interval
        self.new_tokens, self.temperature, self.seed = new_tokens, temperature, seed
        self.folder = folder
        self._rows: list[list[str | int]] = []

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drop the texts of batches that are trained again."""
        del logger
        self._rows = []
        path = self._path()
        if path is not None and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if 0 < _step(line) <= state.timestamp.batch.value]
            path.write_text("".join(kept), encoding="utf-8")

    def batch_end(self, state: State, logger: Logger) -> None:
        assert state.max_duration is not None
        batch = state.timestamp.batch.value
        if batch % self.interval and state.timestamp < state.max_duration:
            return
        with get_precision_context(state.precision, state.precision_config):
            texts = continuations(
                state.model,
                self.tokenizer,
                self.prompts,
                new_tokens=self.new_tokens,
                temperature=self.temperature,
                generator=torch.Generator(device=next(state.model.parameters()).device).manual_seed(self.seed),
            )
        self._rows += [[batch, prompt, text] for prompt, text in zip(self.prompts, texts, strict=True)]
        logger.log_table(["step", "prompt", "text"], self._rows, name="generations", step=batch)
        if (path := self._path()) is not None:
            with path.open("a", encoding="utf-8") as file:
                for prompt, text in zip(self.prompts, texts, strict=True):
                    file.write(json.dumps({"step": batch, "prompt": prompt, "text": text}) + "\n")

    def _path(self) -> Path | None:
        return None if self.folder is None or dist.get_global_rank() != 0 else self.folder / "generations.jsonl"


def continuations(
    model: torch.nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[str],
    *,
    new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[str]:
    """What the model writes after each prompt, up to an end of text; call it on all ranks, with the same arguments.

    Args:
        model: a :class:`~cheapertraining.models.CausalLM`.
        tokenizer: of the model.
        prompts: texts.
        new_tokens: at most so many.
        temperature: of the sampling, above 0.
        generator: on the model's device.
    """
    starts = [tokenizer.encode(prompt) for prompt in prompts]
    length = max(map(len, starts)) + new_tokens
    ids = torch.full((len(starts), length), tokenizer.pad_id)
    labels = torch.full_like(ids, IGNORED)
    for row, start in enumerate(starts):
        ids[row, : len(start)] = torch.tensor(start)
        labels[row, len(start) : len(start) + new_tokens] = tokenizer.pad_id
    positions = torch.arange(length).expand_as(ids)
    device = generator.device
    batch = {"input_ids": ids.to(device), "labels": labels.to(device), "position_ids": positions.to(device)}
    eos = tokenizer.eos_id
    new = sample_answers(model, batch, temperature=temperature, generator=generator, eos_id=eos)  # type: ignore[arg-type]
    texts = []
    for row in range(len(starts)):
        written = new["labels"][row][new["labels"][row] != IGNORED].tolist()
        texts.append(tokenizer.decode(written[: written.index(eos)] if eos in written else written))
    return texts


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1  # torn by a kill
