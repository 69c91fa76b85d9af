"""Repair methods. Importing this package registers all of them."""

from resafe.repairing import (
    antidote,
    asft,
    attribution,
    controls,
    ema,
    fgsn,
    lox,
    lssf,
    nlsr,
    resta,
    safedelta,
    safelora,
    safemerge,
    safepatching,
)

__all__ = [
    "antidote",
    "asft",
    "attribution",
    "controls",
    "ema",
    "fgsn",
    "lox",
    "lssf",
    "nlsr",
    "resta",
    "safedelta",
    "safelora",
    "safemerge",
    "safepatching",
]
