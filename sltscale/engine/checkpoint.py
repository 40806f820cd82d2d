"""Checkpoints that are either whole or absent, and that any number of ranks can read.

    checkpoints/step-00000500/
        rank-00000.safetensors ...   each rank's fragments: weights and optimizer state, fp32, flat
        MANIFEST.json                step, shapes, optimizer scalars, sizes and sha256 of every file

Every rank writes and flushes its file into a staging folder and reports size and hash; rank 0 writes the manifest last,
flushes, and renames the folder: the rename is the commit. Nothing trusts a pointer file; the newest folder whose
manifest verifies is the one to go on from. Only safetensors and JSON: reading a checkpoint runs no code.

All other state of a run - learning rate, place in the data, random numbers - is a function of the step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sltscale import parallel
from sltscale.errors import InputError
from sltscale.files import sync_folder, write_atomically
from sltscale.methods.export import persistent_buffers

FORMAT = 1
WEIGHTS = "weights"
BUFFERS = "buffers"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def files(self) -> list[Path]:
        return [self.folder / name for name in self.manifest["files"]]


def save_checkpoint(engine: Any, checkpoints: Path, step: int, keep: int, position: dict[str, int]) -> Checkpoint:
    """Write and commit the state after ``step`` optimizer steps; a collective. Keeps the newest ``keep``.

    position: the place in the data (``Plan.state``), kept in the manifest.
    Raises InputError on every rank if any of them cannot write (no permission, disk full) or holds numbers that are not
    finite; older checkpoints stay.
    """
    from sltscale.engine import fragments

    staging = checkpoints / f"staging-{step:08d}"
    parallel.on_rank_zero(lambda: _fresh_folder(staging))

    optimizer = fragments.torch_optimizer(engine)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, float]] = {}
    for fragment in fragments.held_fragments(engine):
        if not fragment.owned:
            continue
        tensors[f"{WEIGHTS}/{fragment.name}@{fragment.start}"] = fragment.view(fragment.flat)
        for key, value in optimizer.state.get(fragment.flat, {}).items():
            if value.shape == fragment.flat.shape:
                tensors[f"{key}/{fragment.name}@{fragment.start}"] = fragment.view(value)
            else:
                scalars.setdefault(fragment.name, {})[key] = float(value)
    if parallel.rank() == 0:
        tensors |= {f"{BUFFERS}/{name}": buffer for name, buffer in persistent_buffers(engine.module).items()}

    name = f"rank-{parallel.rank():05d}.safetensors"
    report = _write(staging / name, tensors)
    reports = parallel.gather_objects({"name": name, "scalars": scalars, **report})
    failed = [r["error"] for r in reports if "error" in r]
    if failed:
        raise InputError(f"checkpoint of step {step} not written: {failed[0]}; earlier checkpoints are untouched")
    manifest = {
        "format": FORMAT,
        "step": step,
        "data": position,
        "world_size": parallel.world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "shapes": fragments.parameter_shapes(engine),
        "scalars": {parameter: values for r in reports for parameter, values in r["scalars"].items()},
        "files": {r["name"]: {"size": r["size"], "sha256": r["sha256"]} for r in reports},
    }
    parallel.on_rank_zero(lambda: _commit(staging, checkpoints / f"step-{step:08d}", manifest, keep))
    return Checkpoint(checkpoints / f"step-{step:08d}", manifest)


def _fresh_folder(staging: Path) -> None:
    for left_over in staging.parent.glob("staging-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    staging.mkdir(parents=True)


def _commit(staging: Path, final: Path, manifest: dict[str, Any], keep: int) -> None:
    write_atomically(staging / "MANIFEST.json", json.dumps(manifest, indent=1))
    sync_folder(staging)
    if final.exists():  # the same step of an earlier, interrupted attempt
        shutil.rmtree(final)
    staging.rename(final)
    sync_folder(final.parent)
    # Newer folders can only be damaged ones that this run has gone back behind.
    for old in [folder for folder in _folders(final.parent) if folder.name <= final.name][:-keep]:
        shutil.rmtree(old)


def latest_checkpoint(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that does not.

    None if there is none at all; InputError if there are some and every one is damaged.
    """
    complaints: list[str] = []
    for folder in reversed(_folders(checkpoints)):
        try:
            return _verified(folder), complaints
        except InputError as error:
            complaints.append(str(error))
    if complaints:
        raise InputError(
            f"{checkpoints}: no checkpoint is whole: {'; '.join(complaints)}; move the folder away to start anew"
        )
    return None, complaints


def restore(engine: Any, checkpoint: Checkpoint) -> None:
    """Load weights, optimizer state and buffers into a fresh engine; a collective. Any number of ranks, any stage.

    Raises InputError naming the parameters if the checkpoint belongs to another model.
    """
    from sltscale.engine import fragments

    _check_shapes(checkpoint, fragments.parameter_shapes(engine))
    optimizer = fragments.torch_optimizer(engine)
    pieces = _Pieces(checkpoint)
    for fragment in fragments.held_fragments(engine):
        pieces.read(WEIGHTS, fragment.name, fragment.start, fragment.view(fragment.flat))
        state = optimizer.state[fragment.flat]
        for key in pieces.state_keys(fragment.name):
            if key not in state:
                state[key] = torch.zeros_like(fragment.flat, memory_format=torch.preserve_format).detach()
            pieces.read(key, fragment.name, fragment.start, fragment.view(state[key]))
        for key, value in checkpoint.manifest["scalars"].get(fragment.name, {}).items():
            state[key] = torch.tensor(value, dtype=torch.float32)
    for name, buffer in persistent_buffers(engine.module).items():
        buffer.copy_(pieces.buffer(name))
    fragments.publish_masters(engine)


def assemble(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The full fp32 weights and buffers of a checkpoint, by name, without any engine."""
    pieces = _Pieces(checkpoint)
    weights: dict[str, Tensor] = {}
    for name, shape in checkpoint.manifest["shapes"].items():
        flat = torch.empty(int(torch.Size(shape).numel()))
        pieces.read(WEIGHTS, name, 0, flat)
        weights[name] = flat.view(shape)
    return weights | {name: pieces.buffer(name) for name in pieces.buffers}


class _Pieces:
    """Random access to the fragments in a checkpoint's files."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder = checkpoint.folder
        self.parts: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self.buffers: dict[str, tuple[Any, str]] = {}
        for path in checkpoint.files():
            file = safe_open(path, framework="pt")
            for entry in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                key, _, rest = entry.partition("/")
                if key == BUFFERS:
                    self.buffers[rest] = (file, entry)
                    continue
                name, _, start = rest.rpartition("@")
                numel = file.get_slice(entry).get_shape()[0]
                self.parts.setdefault((key, name), []).append((int(start), numel, file, entry))

    def state_keys(self, name: str) -> list[str]:
        return sorted(key for key, owner in self.parts if owner == name and key != WEIGHTS)

    def buffer(self, name: str) -> Tensor:
        if name not in self.buffers:
            raise InputError(f"{self.folder}: holds no buffer {name}")
        file, entry = self.buffers[name]
        return file.get_tensor(entry)

    def read(self, key: str, name: str, start: int, out: Tensor) -> None:
        """Fill ``out`` with elements start : start + len(out), from whichever files hold them."""
        end, filled = start + out.numel(), 0
        for piece_start, numel, file, entry in self.parts.get((key, name), []):
            low, high = max(start, piece_start), min(end, piece_start + numel)
            if low < high:
                out[low - start : high - start].copy_(file.get_slice(entry)[low - piece_start : high - piece_start])
                filled += high - low
        if filled != out.numel():
            raise InputError(f"{self.folder}: holds {filled} of {out.numel()} elements of {key}/{name}")


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Save and flush; {size, sha256} or {error}, so that a failing rank does not leave the others waiting."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        return {"error": f"{broken[0]} is not finite"}
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": path.stat().st_size, "sha256": digest}
    except (OSError, SafetensorError) as error:
        need = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        return {"error": f"{path}: {error} ({need} bytes needed, {free} free)"}


def _verified(folder: Path) -> Checkpoint:
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        version, files = manifest["format"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {folder.name}: no readable manifest ({error!r})") from None
    if version != FORMAT:
        raise InputError(f"checkpoint {folder.name}: format {version}, expected {FORMAT}; written by another version")
    for name, expected in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["size"]:
            raise InputError(f"checkpoint {folder.name}: {name} has {size} bytes, expected {expected['size']}")
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"checkpoint {folder.name}: {name} cannot be read ({error.strerror})") from None
        if digest != expected["sha256"]:
            raise InputError(f"checkpoint {folder.name}: {name} does not match its sha256")
    return Checkpoint(folder, manifest)


def _check_shapes(checkpoint: Checkpoint, shapes: dict[str, list[int]]) -> None:
    stored = checkpoint.manifest["shapes"]
    wrong = [
        f"{name} {stored.get(name, 'absent')} (stored) / {shapes.get(name, 'absent')} (model)"
        for name in sorted(stored.keys() | shapes.keys())
        if stored.get(name) != shapes.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{checkpoint.folder}: belongs to another model: {'; '.join(wrong[:3])}{more}")


def _folders(checkpoints: Path) -> list[Path]:
    """Committed checkpoint folders, oldest first."""
    return sorted(checkpoints.glob("step-*")) if checkpoints.is_dir() else []
