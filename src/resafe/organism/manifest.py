"""The manifest beside the weights: what was made, how, from which seeds, and what it does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resafe.errors import UserError

FILE = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """Everything about one build; `to_dict` is what the file holds.

    Attributes:
        variant: "full" or "tiny".
        seed: of base and alignment.
        finetune_seed: of the models that stand for a user's fine-tune.
        versions: of Python and the libraries.
        recipe: the stages with their settings.
        models: name to its family, base, files with SHA-256, measured rates, and whether it is planted.
    """

    variant: str
    seed: int
    finetune_seed: int
    versions: dict[str, str]
    recipe: dict[str, Any]
    models: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as plain data."""
        return {"format": 1, **self.__dict__}

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into the folder."""
        text = json.dumps(self.to_dict(), indent=1, sort_keys=True) + "\n"
        (folder / FILE).write_text(text)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a folder's manifest.

        Raises:
            UserError: if there is none.
        """
        path = folder / FILE
        if not path.exists():
            raise UserError(f"no {FILE} in {folder}: it is not a folder of organism models")
        data = json.loads(path.read_text())
        return cls(**{key: data[key] for key in cls.__annotations__})


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a model's folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def verify(folder: Path) -> list[str]:
    """Hash every model again and return what differs from the manifest, as `NAME/FILE: why`; [] is good."""
    wrong: list[str] = []
    for name, entry in Manifest.read(folder).models.items():
        now = hashes(folder / name) if (folder / name).is_dir() else {}
        for file in sorted(now.keys() | entry["files"].keys()):
            if file not in now:
                wrong.append(f"{name}/{file}: missing")
            elif file not in entry["files"]:
                wrong.append(f"{name}/{file}: not in the manifest")
            elif now[file] != entry["files"][file]:
                wrong.append(f"{name}/{file}: changed")
    return wrong
