"""Folders in the layout of published mBART checkpoints, small: sentencepiece model, tokenizer.json, config, weights."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import MBartConfig, MBartForConditionalGeneration

# facebook/mbart-large-cc25's, in its order
CODES = (
    *("ar_AR", "cs_CZ", "de_DE", "en_XX", "es_XX", "et_EE", "fi_FI", "fr_XX", "gu_IN"),
    *("hi_IN", "it_IT", "ja_XX", "kk_KZ", "ko_KR", "lt_LT", "lv_LV", "my_MM", "ne_NP"),
    *("nl_XX", "ro_RO", "ru_RU", "si_LK", "tr_TR", "vi_VN", "zh_CN"),
)
# Sentences of another subject, whose pieces nobody needs later.
OTHER_TEXT = [
    "zwei jugendliche spielen jeden samstag mit ihrem hund auf der wiese hinter dem schwimmbad",
    "der bäcker verkauft morgens frische brötchen und kuchen mit äpfeln",
    "die professorin erklärt geduldig, warum quadratwurzeln manchmal irrational sind",
    "Die Eisenbahn fährt über die Brücke; vierzig Fahrgäste lesen Zeitung!",
    "今天我们去图书馆看书，然后回家做饭。",
]


def train_sentencepiece(folder: Path, sentences: Iterable[str], pieces: int, byte_fallback: bool = False) -> Path:
    """A unigram model with sentencepiece's defaults (nmt_nfkc, <unk> <s> </s> first), as mBART's is."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=pieces,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=byte_fallback,
        num_threads=1,
        minloglevel=2,
    )
    path = folder / "sentencepiece.bpe.model"
    path.write_bytes(model.getvalue())
    return path


def write_tokenizer_json(folder: Path) -> Path:
    """The conversion that lies on the hub beside the sentencepiece model: text through its normalisation, mBART ids."""
    message = sentencepiece_model_pb2.ModelProto()
    message.ParseFromString((folder / "sentencepiece.bpe.model").read_bytes())
    first = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(piece.piece, piece.score) for piece in message.pieces[3:]]
    last = [(token, 0.0) for token in (*CODES, "<mask>")]
    tokenizer = Tokenizer(models.Unigram([*first, *pieces, *last], unk_id=3))
    tokenizer.normalizer = normalizers.Precompiled(message.normalizer_spec.precompiled_charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([token for token, _ in (*first, *last)])
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def write_model(folder: Path, ids: int, **sizes: int) -> MBartForConditionalGeneration:
    """config.json and model.safetensors of an mBART of that many token ids, on a width of 16."""
    model = MBartForConditionalGeneration(
        MBartConfig(
            vocab_size=ids,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            scale_embedding=True,
            **{"max_position_embeddings": 64, **sizes},
        )
    ).eval()
    model.save_pretrained(folder)
    return model
