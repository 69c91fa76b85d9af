"""Methods of locating. Importing this package registers all of them."""

from resafe.locating import cna, safeneuron

__all__ = ["cna", "safeneuron"]
