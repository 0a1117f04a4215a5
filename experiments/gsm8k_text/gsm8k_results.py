"""Sum up what the study has measured, and say whether thoughts help."""

from experiments.gsm8k_text.gsm8k_training import (
    ALONE_NAME,
    BASE,
    CONTROL,
    JUDGE,
    SHUFFLED,
    THOUGHTS,
    WITHOUT,
)
from experiments.shared.comparison import Row
from qstar.evaluation import condition_tables
from qstar.evaluation.results import Results
from qstar.evaluation.text import Span, measured

LANGUAGE = 0.03  # nats that the model's own prediction may be above that of the control


def summary(
    spans: list[Span], results: Results, names: list[str]
) -> tuple[list[Row], list[Row], dict[str, float]]:
    """Return (a row of each condition, a row of each difference, the best temperatures of the base)."""
    figures = {name: results.of(name) for name in names}
    found = measured(spans, figures, results.of(JUDGE), BASE)
    rows, differences = condition_tables.text_rows(found, THOUGHTS)
    also = ({CONTROL, WITHOUT}, {ALONE_NAME, WITHOUT})
    of_interest = [row for row in differences if THOUGHTS in row["of"] or set(row["of"]) in also]
    return rows, of_interest, found.best


def keeps_its_language(differences: list[Row]) -> bool:
    """Tell whether the model's own prediction (w = 0) is at most LANGUAGE worse than that of the control."""
    row = next(row for row in differences if set(row["of"]) == {CONTROL, WITHOUT})
    return (row["all"] if row["of"] == [WITHOUT, CONTROL] else -row["all"]) <= LANGUAGE


def helps(differences: list[Row]) -> bool:
    """Tell whether thoughts beat the control, shuffled thoughts and w = 0, each with the whole interval."""
    against = {row["of"][1]: row["all_high"] for row in differences if row["of"][0] == THOUGHTS}
    return all(against[name] < 0 for name in (CONTROL, SHUFFLED, WITHOUT))
