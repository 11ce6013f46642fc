"""The parameters that methods train in GPT-3 175B, by closed forms, beside those of table 4 of Hu et al. 2021."""

from __future__ import annotations

from typing import NamedTuple

from peftk.models import accounting

LAYERS, WIDTH = 96, 12288
EMBEDDING_TOKENS = 264  # 256 before the prompt and 8 after it
LAYER_TOKENS = 16  # 8 before and 8 after


class Row(NamedTuple):
    """printed: in millions, in the paper's table."""

    method: str
    formula: str
    parameters: int
    printed: float


def rows() -> list[Row]:
    n, d = LAYERS, WIDTH
    return [
        Row("BitFit", "11·n·d", accounting.bitfit_parameters(n, d), 14.2),
        Row("PreEmbed", f"{EMBEDDING_TOKENS} tokens·d", accounting.prompt_parameters(EMBEDDING_TOKENS, d), 3.2),
        Row("PreLayer", f"n·{LAYER_TOKENS} tokens·d", n * accounting.prompt_parameters(LAYER_TOKENS, d), 20.2),
        *(
            Row(f"series adapters, R = {R}", "2·n·(2·d·R + R + d)", 2 * n * accounting.bottleneck_parameters(d, R), m)
            for R, m in ((1, 7.1), (8, 40.1))
        ),
        *(
            Row(f"LoRA, r = {r}, query and value", "2·n·r·(d + d)", 2 * n * accounting.lora_parameters(d, d, r), m)
            for r, m in ((1, 4.7), (8, 37.7))
        ),
    ]


def remainders() -> list[str]:
    """What the closed forms leave open of the table."""
    found = []
    for row in rows():
        rest = row.printed - round(row.parameters / 1e6, 1)
        if abs(rest) > 0.05:
            found.append(
                f"Of the table's {row.printed} M for {row.method}, {row.parameters / 1e6:.1f} M follow from "
                f"{row.formula}; {rest:.1f} M do not."
            )
    return found
