"""Methods of locating. Importing this package registers all of them."""

from resafe.locating import (
    actsvd,
    attribution,
    cna,
    contrast,
    direction,
    fgsn,
    nlsr,
    probe,
    pruning,
    removal,
    safeneuron,
    ssah,
)

__all__ = [
    "actsvd",
    "attribution",
    "cna",
    "contrast",
    "direction",
    "fgsn",
    "nlsr",
    "probe",
    "pruning",
    "removal",
    "safeneuron",
    "ssah",
]
