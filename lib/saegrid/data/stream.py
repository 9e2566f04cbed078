"""Rows made by the language model: those of some prompts, and all training rows of a streamed run, never on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from saegrid.config.run_config import RunConfig
from saegrid.data.language_model import LM, Point, hidden_at_points, load_lm, padded_batches
from saegrid.data.prompts import Prompt, streamed_prompts
from saegrid.data.sources import pinned
from saegrid.data.store import ShardWriter, Store, prefetched, received, sent, shuffled

BATCH_TOKENS = 2048
"""Padded tokens per pass of the model."""
PART_ROWS = 4096
"""Rows that the stream's thread hands over together: prompts up to this many are batched by length."""


def site_rows(
    lm: LM, prompts: list[Prompt], casts: Mapping[Point, Callable[[Tensor], Tensor]], report: Callable[[int], object]
) -> list[list[Tensor]]:
    """Rows (n, d_in) of each prompt at its stored positions: one tensor per point.

    Args:
        casts: for each point, what makes stored rows of the model's.
        report: called with the number of rows of each pass.
    """
    rows: list[list[Tensor]] = [[] for _ in prompts]
    for indices, ids, mask in padded_batches([prompt.tokens for prompt in prompts], BATCH_TOKENS):
        hidden = hidden_at_points(lm, ids, mask, list(casts))  # per point (B, T, d_in)
        for cast, of_point in zip(casts.values(), hidden, strict=True):
            of_point = of_point.float().cpu()
            for row, index in enumerate(indices):
                rows[index].append(cast(of_point[row, prompts[index].positions]))
        report(sum(len(prompts[index].positions) for index in indices))
    return rows


class Stream(Store):
    """A store that holds only a sample of the training rows; an epoch makes all of them anew.

    The sample, the first `stored_tokens` rows, serves what is estimated before training. In an epoch the language model
    works ahead on a thread, by up to `shuffle_rows` rows, while the same number is shuffled together and trained on.
    """

    def __init__(self, folder: Path, config: RunConfig):
        super().__init__(folder)
        self.config = config

    @property
    def epoch_rows(self) -> int:
        """Rows that a run trains on in one epoch."""
        return self.config.train_tokens

    def epoch(
        self, batch_size: int, seed: int, epoch: int, start: int, device: str, keep: Callable[[Tensor], Tensor] | None
    ) -> Iterator[Tensor]:
        """The shuffled batches of the epoch, from batch `start` on; arguments as for `batches`.

        With a `start`, the text is read again, and the model runs from the rows that were shuffled with that batch.
        """
        together = self.config.shuffle_rows

        def parts(first: int) -> Iterator[Tensor]:
            return prefetched(self._streamed(first), max(1, together // PART_ROWS))

        batches = shuffled(parts, together, batch_size, start, (seed, epoch, "streamed"))
        return received(prefetched(sent(batches, device, keep)))

    def _streamed(self, first: int) -> Iterator[Tensor]:
        """The rows from row `first` on, in the order of the text."""
        lm = load_lm(pinned(self.config, self.manifest))
        writer = ShardWriter(self.folder, "train", self.d_in, getattr(torch, self.config.act_dtype), PART_ROWS)
        casts = {(self.config.layer, self.config.site): writer.cast}
        end = 0
        for prompts in self._windows(lm):
            begin, end = end, end + sum(len(prompt.positions) for prompt in prompts)
            if end > first:
                rows = torch.cat([rows for (rows,) in site_rows(lm, prompts, casts, lambda rows: None)])
                yield rows[max(0, first - begin) :]

    def _windows(self, lm: LM) -> Iterator[list[Prompt]]:
        """Consecutive prompts with at least `PART_ROWS` rows; the same wherever the stream begins."""
        window: list[Prompt] = []
        rows = 0
        prefix = self.manifest["data"]["shared_prefix"]
        for prompt in streamed_prompts(self.config, lm.tokenizer, prefix):
            window.append(prompt)
            rows += len(prompt.positions)
            if rows >= PART_ROWS:
                yield window
                window, rows = [], 0
        if window:
            yield window
