"""Methods of locating. Importing this package registers all of them."""

from resafe.locating import cna, direction, pruning, removal, safeneuron, ssah

__all__ = ["cna", "direction", "pruning", "removal", "safeneuron", "ssah"]
