"""A tokenizer cut to the pieces that a corpus uses, and a model's rows with it.

mBART-cc25 has 250,027 token ids, a sign language corpus needs some thousands; GFSLT-VLP, HFA and C2RL all cut it, by
the rule of IamAdiSri/hf-trim: the pieces of the training sentences and every special token stay, in their order. So ids
are still <s>=0 <pad>=1 </s>=2 <unk>=3, pieces, language codes, <mask>. A unigram model splits the sentences as before,
because every piece of their best segmentation is still there. What only other texts need becomes <unk>.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sltscale.data.text import TextTokenizer, load_tokenizer, published_file, read_sentencepiece
from sltscale.errors import InputError

SENTENCEPIECES = ("sentencepiece.bpe.model", "spiece.model")  # as mBART and mT5 name theirs
WEIGHTS, SHARDED = "model.safetensors", "model.safetensors.index.json"
# What has a row (of final_logits_bias: a column) per token id, in mBART, mT5 and decoder-only models.
PER_ID = re.compile(r"(^|\.)((shared|embed_tokens|lm_head)\.weight|final_logits_bias)$")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def trim(name: str, sentences: Iterable[str], out: Path, model: Path | None = None) -> list[str]:
    """Write the tokenizer ``name`` (folder or hub name) as the folder ``out``, cut to these training sentences; with
    ``model`` (folder with config.json and safetensors) also its weights, cut to the same rows.

    ``out`` holds tokenizer.json and tokenizer_config.json, which ``load_tokenizer`` and transformers open; the
    sentencepiece model, cut alike, where the original has one; and kept_ids.json, the original id of every id.
    Returns lines that say what was done. InputError without sentences, for a tokenizer that is no unigram model, a
    model with other ids, and an ``out`` that is not empty.
    """
    lines = sorted({line for sentence in sentences if (line := " ".join(sentence.split()))})
    if not lines:
        raise InputError("no sentences to find the pieces of; expected training sentences with words")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; give --out a new folder")
    full = load_tokenizer(name)
    if model is not None:
        check_model(model, full)
    files = [file for file in (published_file(name, each) for each in SENTENCEPIECES) if file is not None]
    staging = out.with_name(f".{out.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        kept = _save_kept(full, lines, files, staging)
        report = _report(full, kept, lines)
        if model is not None:
            before, after = trim_weights(model, kept, staging)
            report.append(f"{after} of {before} parameters are left in {out / WEIGHTS}")
        if out.exists():
            out.rmdir()
        staging.rename(out)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


def _save_kept(full: TextTokenizer, lines: Sequence[str], files: Sequence[Path], out: Path) -> list[int]:
    """Nothing but what the sentences use, if that splits them as before. What is unknown costs 10 more than the worst
    piece, so with that one gone an unknown character can come cheaper than the pieces that spell it; then it stays."""
    used = kept_ids(full, lines, files)
    scores: list[tuple[str, float]] = _pipeline(full)["model"]["vocab"]
    worst = min(range(len(scores)), key=lambda number: scores[number][1])
    for kept in (used, sorted({*used, worst})):
        save_trimmed(full, kept, files, out)
        changed = changed_sentence(full, load_tokenizer(out), kept, lines)
        for file in files:
            changed = changed or _changed_pieces(file, out / file.name, lines)
        if changed is None:
            return kept
    raise InputError(
        f"cut to its pieces, the tokenizer splits {changed!r} otherwise than before; leave that sentence out"
    )


def _report(full: TextTokenizer, kept: Sequence[int], lines: Sequence[str]) -> list[str]:
    report = [f"{len(kept)} of {full.size} token ids are left; {len(lines)} different sentences are split as before"]
    unk = full.backend.unk_token_id
    unknown = sum(unk in full.backend.encode(line, add_special_tokens=False) for line in lines)
    if unknown:
        report.append(f"warning: {unknown} sentences hold something that the tokenizer never knew (<unk>)")
    return report


def kept_ids(full: TextTokenizer, sentences: Sequence[str], models: Sequence[Path] = ()) -> list[int]:
    """Ids, ascending, that the sentences use or that are no pieces of text: special and added tokens, and byte pieces
    where unknown characters are spelt in them. models: the tokenizer's sentencepiece model, whose pieces count too, and
    what it marks as no text.

    InputError if the tokenizer is no unigram model.
    """
    pipeline = _pipeline(full)
    vocabulary: dict[str, int] = full.backend.get_vocab()
    kept = {int(token["id"]) for token in pipeline["added_tokens"]} | {int(pipeline["model"]["unk_id"])}
    kept |= {vocabulary[token] for token in full.backend.all_special_tokens}
    if pipeline["model"].get("byte_fallback"):
        kept |= {number for piece, number in vocabulary.items() if _BYTE.fullmatch(piece)}
    for line in sentences:
        kept.update(full.backend.encode(line, add_special_tokens=False))
    for file in models:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        pieces = {piece for line in sentences for piece in processor.encode(line, out_type=str)}
        pieces |= {piece.piece for piece in read_sentencepiece(file).pieces if piece.type != piece.NORMAL}
        kept |= {vocabulary[piece] for piece in pieces if piece in vocabulary}
    return sorted(kept)


def save_trimmed(full: TextTokenizer, kept: Sequence[int], models: Sequence[Path], out: Path) -> None:
    """Write ``full`` with nothing but the ids ``kept``, which are numbered anew in their order."""
    number = {old: new for new, old in enumerate(kept)}
    pipeline = _pipeline(full)
    model = pipeline["model"]
    model["vocab"] = [piece for old, piece in enumerate(model["vocab"]) if old in number]
    model["unk_id"] = number[model["unk_id"]]
    for token in pipeline["added_tokens"]:
        token["id"] = number[token["id"]]
    for token in ((pipeline.get("post_processor") or {}).get("special_tokens") or {}).values():
        token["ids"] = [number[old] for old in token["ids"]]
    full.save(out)
    (out / "tokenizer.json").write_text(json.dumps(pipeline, ensure_ascii=False), encoding="utf-8")
    (out / "kept_ids.json").write_text(json.dumps(list(kept)) + "\n")
    pieces = {piece for piece, _ in model["vocab"]}
    for file in models:
        message = read_sentencepiece(file)
        left = [piece for piece in message.pieces if piece.piece in pieces]
        del message.pieces[:]
        message.pieces.extend(left)
        (out / file.name).write_bytes(message.SerializeToString())


def changed_sentence(
    full: TextTokenizer, trimmed: TextTokenizer, kept: Sequence[int], sentences: Sequence[str]
) -> str | None:
    """The first sentence that ``trimmed`` splits into other pieces than ``full``, or gives back otherwise."""
    for line in sentences:
        before, after = (one.backend.encode(line, add_special_tokens=False) for one in (full, trimmed))
        if before != [kept[i] for i in after] or full.decode([before]) != trimmed.decode([after]):
            return line
    return None


def check_model(folder: Path, tokenizer: TextTokenizer) -> None:
    """InputError unless ``folder`` holds config.json and safetensors of a model with a row for each of the ids."""
    rows = _read_json(folder, "config.json").get("vocab_size")
    if not any((folder / name).is_file() for name in (WEIGHTS, SHARDED)):
        found = ", ".join(sorted(file.name for file in folder.glob("*.bin"))) or "no weights at all"
        raise InputError(
            f"{folder} holds {found}; expected {WEIGHTS} (pickled .bin files are not opened, see docs/vocabulary.md)"
        )
    if not isinstance(rows, int) or rows < tokenizer.size:
        raise InputError(
            f"{folder}: the model's vocab_size is {rows}, the tokenizer has {tokenizer.size} ids; "
            f"expected the model that the tokenizer belongs to"
        )


def trim_weights(folder: Path, kept: Sequence[int], out: Path) -> tuple[int, int]:
    """Write the model in ``folder`` to ``out`` with the rows ``kept`` of everything that has one per token id; all
    other weights stay as they are, bit for bit. Returns its numbers of parameters before and after."""
    config = _read_json(folder, "config.json")
    rows, choice = config["vocab_size"], torch.tensor(list(kept))
    if (folder / SHARDED).is_file():
        files = sorted({folder / file for file in _read_json(folder, SHARDED)["weight_map"].values()})
    else:
        files = [folder / WEIGHTS]
    weights, before = {}, 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} cannot be read ({error}); fetch the model again") from None
        for name, tensor in stored.items():
            before += tensor.numel()
            if PER_ID.search(name):
                dimension = tensor.dim() - 1 if name.endswith("final_logits_bias") else 0
                if tensor.shape[dimension] != rows:
                    raise InputError(f"{file}: {name} is {tuple(tensor.shape)}, config.json says {rows} token ids")
                tensor = tensor.index_select(dimension, choice)
            weights[name] = tensor.contiguous()
    if not any(PER_ID.search(name) for name in weights):
        raise InputError(f"{folder} holds no token embedding; expected the weights of a language model")
    number = {old: new for new, old in enumerate(kept)}
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            settings = _renumbered(_read_json(folder, name), number)
            if name == "config.json":
                settings["vocab_size"] = len(kept)
            (out / name).write_text(json.dumps(settings, indent=2) + "\n")
    return before, sum(tensor.numel() for tensor in weights.values())


def _pipeline(tokenizer: TextTokenizer) -> dict[str, Any]:
    backend = getattr(tokenizer.backend, "backend_tokenizer", None)
    found = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    kind = found["model"].get("type")
    if kind != "Unigram":
        raise InputError(
            f"the tokenizer is {f'a {kind} model' if kind else 'of another kind'}; only sentencepiece's unigram models "
            f"(mBART, mT5, XLM-R) can be cut piece by piece"
        )
    return dict(found)


def _changed_pieces(file: Path, trimmed: Path, sentences: Sequence[str]) -> str | None:
    before, after = (sentencepiece.SentencePieceProcessor(model_file=str(path)) for path in (file, trimmed))
    return next(
        (line for line in sentences if before.encode(line, out_type=str) != after.encode(line, out_type=str)), None
    )


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} holds no {name}; expected a model's folder with {name} and {WEIGHTS}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / name} cannot be read ({error}); fetch the model again") from None
    if not isinstance(found, dict):
        raise InputError(f"{folder / name} is no JSON object; fetch the model again")
    return found


def _renumbered(settings: Any, number: Mapping[int, int]) -> Any:
    """Every ..._token_id in a configuration, at any depth; None for one that is gone."""
    if not isinstance(settings, dict):
        return settings
    return {
        key: _new_ids(value, number) if key.endswith("token_id") else _renumbered(value, number)
        for key, value in settings.items()
    }


def _new_ids(ids: Any, number: Mapping[int, int]) -> Any:
    return [number.get(one) for one in ids] if isinstance(ids, list) else number.get(ids)
