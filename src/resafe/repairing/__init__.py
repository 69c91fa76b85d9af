"""Repair methods. Importing this package registers all of them."""

from resafe.repairing import controls, fgsn, nlsr

__all__ = ["controls", "fgsn", "nlsr"]
