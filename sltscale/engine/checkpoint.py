"""Checkpoints that are either whole or absent, and that any number of ranks can read.

    checkpoints/step-00000500/
        rank-00000.safetensors ...   each rank's fragments: weights and optimizer state, fp32, flat
        MANIFEST.json                what they are, sizes and sha256 of every file (manifest.py)

Every rank writes and flushes its file into a staging folder and reports size and hash; rank 0 writes the manifest last,
flushes, and renames the folder: the rename is the commit. Nothing trusts a pointer file; the newest folder whose
manifest verifies is the one to go on from. Only safetensors and JSON: reading a checkpoint runs no code.

All other state of a run - learning rate, place in the data, random numbers - is a function of the step.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sltscale import parallel
from sltscale.config import Recipe
from sltscale.engine import manifest as manifests
from sltscale.engine.faults import fault_point
from sltscale.engine.keeping import best_step, prune
from sltscale.engine.manifest import Checkpoint, NewerFormatError, folders
from sltscale.engine.run_folder import RunFolder
from sltscale.errors import InputError
from sltscale.files import sync_folder
from sltscale.methods.export import persistent_buffers

WEIGHTS = "weights"
BUFFERS = "buffers"
HEADERS = 1 << 16  # room for the manifest, file headers and folders, beyond the tensors


class NotSavedError(Exception):
    """A checkpoint could not be written; nothing of it is left, and the earlier ones are untouched."""


def save_checkpoint(
    engine: Any,
    folder: RunFolder,
    recipe: Recipe,
    step: int,
    position: dict[str, int],
    damaged: Collection[str] = (),
) -> Checkpoint:
    """Write and commit the state after ``step`` optimizer steps; a collective.

    Keeps the newest ``train.keep_checkpoints`` and, by ``train.keep_best``, the best. position: the place in the data
    (``Plan.state``). damaged: names of checkpoints that were found to be so, and do not count among those to keep.
    Raises NotSavedError on every rank if there is no room (before anything is written), any of them cannot write, or
    one holds numbers that are not finite.
    """
    from sltscale.engine import fragments

    folder.check_owner()
    fault_point("begin", step)
    tensors, scalars = _collect(engine)
    fault_point("collected", step)
    problems, needed = [], HEADERS
    for bytes_needed, problem in parallel.gather_objects(_measure(tensors)):
        needed += bytes_needed
        problems += [problem] if problem else []
    fault_point("measured", step)
    staging = folder.checkpoints / f"staging-{step:08d}-{folder.attempt}"
    refusal = parallel.on_rank_zero(lambda: problems[0] if problems else _fresh_folder(staging, needed))
    if refusal is not None:
        raise _not_saved(step, refusal)
    fault_point("staged", step)

    name = f"rank-{parallel.rank():05d}.safetensors"
    report = _write(staging / name, tensors, step)
    reports = parallel.gather_objects({"name": name, "scalars": scalars, **report})
    fault_point("gathered", step)
    content = {
        "step": step,
        "data": position,
        "world_size": parallel.world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "versions": manifests.versions(),
        "recipe": recipe.model_dump(mode="json"),
        "shapes": fragments.parameter_shapes(engine),
        "scalars": {parameter: values for r in reports for parameter, values in r["scalars"].items()},
        "files": {r["name"]: {"size": r.get("size"), "sha256": r.get("sha256")} for r in reports},
    }
    failed = [r["error"] for r in reports if "error" in r]
    final = folder.checkpoints / f"step-{step:08d}"

    def commit() -> str | Checkpoint:
        try:
            if failed:
                return f"{failed[0]} ({needed} bytes needed, {_free(staging)} free in {folder.checkpoints})"
            folder.check_owner()
            return Checkpoint(final, _commit(staging, final, content))
        except OSError as error:
            free = _free(staging)
            return f"{error.strerror or error} ({needed} bytes needed, {free} free in {folder.checkpoints})"
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # gone by that name if it was committed

    outcome = parallel.on_rank_zero(commit)
    if isinstance(outcome, str):
        raise _not_saved(step, outcome)
    best = best_step(folder.checkpoints, recipe.train.keep_best, step) if parallel.rank() == 0 else None
    parallel.on_rank_zero(lambda: prune(final, recipe.train.keep_checkpoints, best, damaged))
    fault_point("pruned", step)
    return outcome


def _collect(engine: Any) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """This rank's tensors, by kind, parameter and place in it; the optimizer's scalars by parameter."""
    from sltscale.engine import fragments

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
    return tensors, scalars


def _measure(tensors: dict[str, Tensor]) -> tuple[int, str | None]:
    """Bytes that this rank is going to write; what forbids it, if anything does."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return size + HEADERS, f"{broken[0]} is not finite" if broken else None


def _fresh_folder(staging: Path, needed: int) -> str | None:
    """Clear away what earlier saves left and make ``staging``; what is in the way, if there is no room."""
    for left_over in staging.parent.glob("staging-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    staging.parent.mkdir(parents=True, exist_ok=True)
    free = _free(staging)
    if free < needed:
        return f"{needed} bytes needed, {free} free in {staging.parent}"
    staging.mkdir()
    return None


def _free(staging: Path) -> int:
    return shutil.disk_usage(staging.parent).free


def _not_saved(step: int, why: str) -> NotSavedError:
    return NotSavedError(
        f"checkpoint of step {step} not written: {why}; earlier checkpoints are untouched: "
        "make room or mend what is named, then start again"
    )


def _commit(staging: Path, final: Path, content: dict[str, Any]) -> dict[str, Any]:
    step = content["step"]
    written = manifests.write_manifest(staging, content)
    fault_point("manifest", step)
    sync_folder(staging)
    fault_point("synced", step)
    if final.exists():  # the same step of an earlier, interrupted attempt
        shutil.rmtree(final.rename(final.with_name(f"staging-removed-{final.name}")))
    staging.rename(final)
    fault_point("renamed", step)
    sync_folder(final.parent)
    fault_point("committed", step)
    return written


def latest_checkpoint(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that does not.

    None if there is none at all; InputError if there are some and every one is damaged, or if the newest is of a newer
    format.
    """
    complaints: list[str] = []
    for folder in reversed(folders(checkpoints)):
        try:
            return manifests.verify(folder), complaints
        except NewerFormatError:
            raise
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


def _write(path: Path, tensors: dict[str, Tensor], step: int) -> dict[str, Any]:
    """Save and flush; {size, sha256} or {error}, so that a failing rank does not leave the others waiting."""
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
        fault_point("written", step)
        with path.open("rb") as file:
            os.fsync(file.fileno())
            fault_point("flushed", step)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        fault_point("hashed", step)
        return {"size": path.stat().st_size, "sha256": digest}
    except (OSError, SafetensorError) as error:
        return {"error": f"{path.name}: {error}"}


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
