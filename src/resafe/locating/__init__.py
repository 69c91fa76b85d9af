"""Methods of locating. Importing this package registers all of them."""

from resafe.locating import (
    attribution,
    cna,
    contrast,
    direction,
    fgsn,
    lowrank,
    probe,
    pruning,
    removal,
    safeneuron,
    ssah,
)

__all__ = [
    "attribution",
    "cna",
    "contrast",
    "direction",
    "fgsn",
    "lowrank",
    "probe",
    "pruning",
    "removal",
    "safeneuron",
    "ssah",
]
