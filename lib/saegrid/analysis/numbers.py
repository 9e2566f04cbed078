"""How numbers are shown: title, unit and digits of each column. Free of torch and HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

MISSING = "–"
MOST_DECIMALS = 6


@dataclass(frozen=True)
class Column:
    """How a column of the tidy table is shown."""

    title: str
    unit: str = ""
    digits: str = ""
    """Number format; empty: unformatted."""
    best: str = ""
    """`min`, `max`, or empty if no value is better than another."""


COLUMNS = {
    "name": Column("Run"),
    "arch": Column("Architecture"),
    "source": Column("Source"),
    "expansion": Column("Expansion", "d_sae / d_in", "d"),
    "k": Column("K", "latents/token", "d"),
    "threshold": Column("Threshold θ", "act", "g"),
    "recipe": Column("Recipe"),
    "seed": Column("Seed", "", "d"),
    "seeds": Column("Seeds", "", "d"),
    "d_sae": Column("d_sae", "latents", ",d"),
    "l0": Column("L0", "latents/token", ",.1f"),
    "l0_no_sink": Column("L0 without sinks", "latents/token", ",.1f"),
    "l0_eval": Column("L0 on the prompts", "latents/token", ",.1f"),
    "l0_share_pct": Column("L0 / d_sae", "%", ".1f"),
    "val_mse": Column("MSE", "act²", "#.4g", "min"),
    "val_mse_batch": Column("MSE, batch cut", "act²", "#.4g", "min"),
    "nmse": Column("NMSE", "1", "#.3g", "min"),
    "fvu": Column("FVU", "1", "#.3g", "min"),
    "fvu_no_sink": Column("FVU without sinks", "1", ".3f", "min"),
    "fvu_eval": Column("FVU on the prompts", "1", ".3f", "min"),
    "sink_pct": Column("Sink rows", "%", ".2f"),
    "dead_pct": Column("Dead latents", "%", ".1f", "min"),
    "dead_pct_no_sink": Column("Dead latents without sinks", "%", ".1f", "min"),
    "ce_clean": Column("CE clean", "nats/token", ".3f"),
    "ce_spliced": Column("CE spliced", "nats/token", ".3f", "min"),
    "ce_zero": Column("CE zero", "nats/token", ".3f"),
    "ce_mean": Column("CE mean", "nats/token", ".3f"),
    "kl": Column("KL", "nats/token", ".3f", "min"),
    "delta_loss": Column("Delta loss", "nats/token", ".3f", "min"),
    "kl_interval": Column("KL, 95% interval", "nats/token"),
    "kl_range": Column("KL, range over seeds", "nats/token"),
    "delta_loss_interval": Column("Delta loss, 95% interval", "nats/token"),
    "delta_loss_range": Column("Delta loss, range over seeds", "nats/token"),
    "change": Column("Change from the full recipe", "nats/token"),
    "budget": Column("Best within an L0 of", "latents/token"),
    "smaller": Column("Half the latents costs", "nats/token"),
    "sparser": Column("The sparser budget costs", "nats/token"),
    "frac_rec_pct": Column("frac_rec", "%", ".1f", "max"),
    "loss_recovered_zero": Column("Loss recovered (zero)", "1", ".3f", "max"),
    "loss_recovered_mean": Column("Loss recovered (mean)", "1", ".3f", "max"),
    "stable_pct": Column("Stable latents", "% of live", ".2f", "max"),
    "stable_between": Column("Stable latents, 95% interval", "% of live"),
    "stable_energy_pct": Column("Their share of energy", "%", ".2f", "max"),
    "matched_cosine": Column("Matched cosine", "1", ".3f", "max"),
    "random_cosine": Column("Matched cosine of random directions", "1", ".3f"),
    "start_cosine": Column("Cosine with the start", "1", ".2f"),
    "decoder_coherence": Column("Decoder coherence", "1", ".4f"),
    "mcc": Column("MCC", "1", ".3f", "max"),
    "f1": Column("F1 of firing", "1", ".3f", "max"),
    "uniqueness": Column("Uniqueness", "1", ".3f", "max"),
    "pairs": Column("Pairs of seeds", "", "d"),
    "control": Column("Control"),
    "inference_threshold": Column("Threshold at inference", "act", "#.3g"),
    "theta_over_rms": Column("θ / RMS(pre_acts)", "1", "#.3g"),
    "n_train_rows": Column("Training rows", "rows", ",d"),
    "n_val_rows": Column("Validation rows", "rows", ",d"),
    "n_eval_prompts": Column("Prompts", "", ",d"),
    "n_eval_tokens": Column("Scored tokens", "", ",d"),
    "steps": Column("Steps", "", ",d"),
    "best_epoch": Column("Best epoch", "", "d"),
    "train_seconds": Column("Training", "s", ",.0f"),
    "eval_seconds": Column("Evaluation", "s", ",.0f"),
    "train_rows_per_second": Column("Training speed", "rows/s", ",.0f"),
    "cosine": Column("Cosine", "1", ".2f"),
    "max_act": Column("Largest activation", "act", "#.3g"),
}
"""Every column that a page shows: title, unit, format, direction."""

MEANINGS = {
    "k": "Latents per token that training asks for.",
    "threshold": "A pre-activation above θ is kept; θ is fixed.",
    "l0": "Mean number of latents that fire on a validation row.",
    "l0_eval": "Mean number of latents that fire on a scored token of the evaluation prompts.",
    "l0_no_sink": "L0 over rows that are not attention sinks.",
    "val_mse": "Mean squared error of a coordinate, on validation rows.",
    "val_mse_batch": "MSE with the cut of training, over the whole batch.",
    "nmse": "MSE / variance pooled over all elements, as published; attention sinks dominate it.",
    "fvu": "Share of the rows' variance that the reconstruction leaves unexplained.",
    "fvu_no_sink": "Share of the variance left unexplained, over rows that are not attention sinks.",
    "fvu_eval": "FVU without sinks, on the evaluation prompts.",
    "sink_pct": "Share of rows with a norm above 10 times the median: attention sinks.",
    "dead_pct": "Share of latents that fire on no validation row.",
    "dead_pct_no_sink": "Share of latents that fire on no validation row but attention sinks.",
    "ce_clean": "Next-token loss of the untouched model.",
    "ce_spliced": "Next-token loss with the reconstruction in place of the residual stream.",
    "ce_zero": "Next-token loss with zeros in place of the residual stream.",
    "ce_mean": "Next-token loss with the training mean in place of the residual stream.",
    "kl": "How far the spliced model's predictions are from the untouched model's: mean KL(clean ‖ spliced).",
    "delta_loss": "Next-token loss that the splice adds: CE spliced − CE clean.",
    "frac_rec_pct": "CE clean / CE spliced, as published; not the share of loss recovered.",
    "loss_recovered_zero": "Share of the loss between zeros and the untouched model that is recovered.",
    "loss_recovered_mean": "Share of the loss between the training mean and the untouched model that is recovered.",
    "stable_pct": "Share of live latents that another seed finds, too: cosines above 0.7 in decoder and encoder.",
    "stable_energy_pct": "Share of the reconstruction's energy that stable latents carry.",
    "matched_cosine": "Mean cosine of decoder rows, matched one to one between two seeds.",
    "random_cosine": "Matched cosine of as many random directions: what chance gives.",
    "start_cosine": "Mean cosine of decoder rows with their random start.",
    "inference_threshold": "The calibrated threshold that every number here uses.",
    "theta_over_rms": "θ in units of the pre-activations' root mean square.",
    "best_epoch": "The epoch with the lowest validation MSE, whose weights are kept.",
}
"""What a column means, in a sentence; the method page has the definitions."""


def number(value: Any, name: str = "") -> str:
    """A value of the column `name` as text: the column's format, a true minus sign, a dash if it is missing."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    column = COLUMNS.get(name, Column(name))
    if isinstance(value, str):
        return value
    text = format(int(value) if column.digits.endswith("d") else value, column.digits).removesuffix(".")
    return text.replace("-", "−") if "e" not in text else text


def aligned(values: Iterable[Any], name: str = "") -> list[str]:
    """The values of one column as texts with the same decimals: enough for its largest and for its smallest value."""
    values, column = list(values), COLUMNS.get(name, Column(name))
    digits = re.fullmatch(r"#\.(\d)g", column.digits)
    sizes = [abs(value) for value in values if isinstance(value, (int, float)) and value and math.isfinite(value)]
    if not digits or len(sizes) < 2:
        return [number(value, name) for value in values]
    high, low = (math.floor(math.log10(size)) for size in (max(sizes), min(sizes)))
    decimals = min(max(int(digits[1]) - 1 - high, 1 - low, 0), MOST_DECIMALS)
    texts = [number(value, name) for value in values]
    return [
        text if text == MISSING or isinstance(value, str) else f"{value:.{decimals}f}".replace("-", "−")
        for value, text in zip(values, texts, strict=True)
    ]


def change(value: float, low: float, high: float, digits: int = 3) -> str:
    """A difference with its interval, unless that is missing: `+0.081 [+0.044, +0.120]`."""
    within = "" if math.isnan(low) else f" [{signed(low, digits)}, {signed(high, digits)}]"
    return f"{signed(value, digits)}{within}"


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign: `+0.081`, with a true minus sign; a dash if it is missing."""
    return MISSING if math.isnan(value) else f"{value:+.{digits}f}".replace("-", "−")


def bounds(low: float, high: float, name: str) -> str:
    """Bounds of a column's value: `0.044 to 0.120`; empty if they are missing."""
    return "" if math.isnan(low) else f"{number(low, name)} to {number(high, name)}"


def between(values: pd.Series, digits: str) -> str:
    """The smallest and the largest value: `4 to 6`, or `4` if both read the same."""
    low, high = format(values.min(), digits), format(values.max(), digits)
    return low if low == high else f"{low} to {high}"


def counted(n: int, word: str) -> str:
    """A count with its noun: `1 seed`, `3 seeds`."""
    return f"{n} {plural(n, word)}"


def plural(n: int, word: str) -> str:
    """A noun in the form that a count needs: `seed`, `seeds`."""
    return word if n == 1 else f"{word}s"


def listed(names: Iterable[str]) -> str:
    """Names in a sentence: `A, B and C`."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def header(name: str) -> str:
    """Title and unit of a column as one line: `Delta loss (nats/token)`."""
    column = COLUMNS.get(name, Column(name))
    return f"{column.title} ({column.unit})" if column.unit not in ("", "1") else column.title
