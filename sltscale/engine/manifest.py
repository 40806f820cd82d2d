"""What a checkpoint folder says about itself, and whether its bytes agree.

MANIFEST.json: format, step, place in the data, world size, ZeRO stage, versions, recipe, shapes, the optimizer's
scalars, size and sha256 of every file, and the sha256 of all that itself, so that no bit of the folder goes unchecked.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sltscale import __version__
from sltscale.config import Recipe
from sltscale.errors import InputError
from sltscale.files import write_atomically
from sltscale.recipe_files import differences, recipe_from_json

FORMAT = 2
NAME = "MANIFEST.json"
PACKAGES = ("torch", "deepspeed", "transformers", "webdataset", "av", "numpy", "safetensors", "sacrebleu")


class NewerFormatError(InputError):
    """The checkpoint may well be whole, but this version cannot tell: never go back behind it in silence."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(int(file["size"]) for file in self.manifest["files"].values())

    def files(self) -> list[Path]:
        return [self.folder / name for name in self.manifest["files"]]


def versions() -> dict[str, str]:
    """Of Python, sltscale and the packages that decide what a run computes; "absent" for one not installed."""
    return {"python": platform.python_version(), "sltscale": __version__} | {name: _version(name) for name in PACKAGES}


def write_manifest(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write ``content`` with format and checksum added; returns what was written."""
    manifest = {"format": FORMAT, **content}
    manifest["sha256"] = _digest(manifest)
    write_atomically(folder / NAME, json.dumps(manifest, indent=1))
    return manifest


def read_manifest(folder: Path) -> Checkpoint:
    """InputError if the manifest is missing or damaged, NewerFormatError if this version cannot read the folder."""
    try:
        manifest = json.loads((folder / NAME).read_text())
        version, stored = manifest["format"], manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {folder.name}: no readable manifest ({error!r})") from None
    if stored != _digest(manifest):
        raise InputError(f"checkpoint {folder.name}: {NAME} does not match its own sha256")
    if version > FORMAT:
        raise NewerFormatError(
            f"checkpoint {folder.name}: format {version}, this version reads {FORMAT}; it was written by sltscale "
            f"{manifest.get('versions', {}).get('sltscale', '(unknown)')}: go on with that version or a newer one"
        )
    if version != FORMAT:
        raise InputError(f"checkpoint {folder.name}: format {version}, expected {FORMAT}; an older version wrote it")
    return Checkpoint(folder, manifest)


def verify(folder: Path) -> Checkpoint:
    """Every byte against the manifest; InputError names the first file that is missing, too short or changed."""
    checkpoint = read_manifest(folder)
    for name, expected in checkpoint.manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"checkpoint {folder.name}: {name} is missing")
        size = path.stat().st_size
        if size != expected["size"]:
            raise InputError(f"checkpoint {folder.name}: {name} has {size} bytes, expected {expected['size']}")
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"checkpoint {folder.name}: {name} cannot be read ({error.strerror})") from None
        if digest != expected["sha256"]:
            raise InputError(f"checkpoint {folder.name}: {name} does not match its sha256")
    return checkpoint


def check_recipe(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """InputError naming the fields if the checkpoint was written under another configuration than the run's."""
    written_under = recipe_from_json(json.dumps(checkpoint.manifest["recipe"]), str(checkpoint.folder / NAME))
    different = differences(written_under, recipe)
    if different:
        raise InputError(
            f"{checkpoint.folder} was written by another configuration: {'; '.join(different)}; "
            "move it away, or go on with the configuration it belongs to"
        )


def folders(checkpoints: Path) -> list[Path]:
    """Committed checkpoint folders, oldest first."""
    return sorted(checkpoints.glob("step-*")) if checkpoints.is_dir() else []


def _digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
