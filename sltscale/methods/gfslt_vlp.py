"""GFSLT-VLP pretraining (arXiv 2307.14768, zhoubenjia/GFSLT-VLP@91ba953): contrastive, and masked sentences restored.

Letters: A and B videos and sentences, N clips of the global batch, M and L their tokens, D width.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from sltscale import parallel
from sltscale.config import GFSLTVLPSettings
from sltscale.data.noise import mask_words, sentence_generator
from sltscale.errors import InputError
from sltscale.losses.contrastive import clip_loss
from sltscale.losses.seq2seq import label_smoothed_cross_entropy
from sltscale.methods.base import Encode, RetrievalMethod, Vocabulary
from sltscale.methods.comparison import comparison_rows, gathered_comparison
from sltscale.models.language import TextDecoder, TextEncoder, load_decoder_start
from sltscale.models.layers import LogitScale
from sltscale.models.mbart import teacher_forcing
from sltscale.models.visual import PackedVisualEncoder
from sltscale.structures import Features, LossOutput, Ragged, TextBatch, VideoBatch


class GFSLTVLP(RetrievalMethod):
    """L = L_contrastive + masked_lm L_masked. With masked_lm = 0 (version 1) there is no text decoder.

    L_contrastive: each clip's class token behind a linear head against the sentence encoder's output at the language
    code, in groups of the global batch. L_masked: the text decoder writes the whole sentence from what the sentence
    encoder makes of its masked form; the encoder learns nothing from it, so the decoder's optimizer may have another
    algorithm and period than the rest (optim.groups). Computed in every step, also where the decoder is not due.
    """

    def __init__(self, settings: GFSLTVLPSettings, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.settings, self.vocabulary = settings, vocabulary
        self.weights, self.compared = {"contrastive": 1.0}, ("contrastive",)
        self.visual = PackedVisualEncoder(settings.visual)
        self.text_encoder = TextEncoder(settings.text_encoder, vocabulary)
        self.video_head = nn.Linear(self.visual.width, self.text_encoder.width, bias=False)
        self.logit_scale = LogitScale(math.inf)
        if settings.masked_lm > 0:
            if settings.text_decoder.width != self.text_encoder.width:
                raise InputError(
                    f"method.text_decoder.width is {settings.text_decoder.width}, the text encoder's "
                    f"{self.text_encoder.width}; the decoder attends to it directly: set both to the same number"
                )
            self.weights["masked_lm"] = settings.masked_lm
            self.text_decoder = TextDecoder(settings.text_decoder, vocabulary)
            load_decoder_start(settings.text_decoder, self.text_decoder, vocabulary)
            self.counted_apart = ("text_decoder",)
        self.unread_embeddings = {"visual.transformer.embed_tokens": vocabulary.size * self.visual.width}

    def tokenise(self, encode: Encode, batch: VideoBatch, seed: tuple[int, int]) -> TextBatch:
        text = encode(batch.texts, batch.languages)
        if "masked_lm" not in self.weights:
            return text
        masked = [
            mask_words(
                sentence,
                language,
                sentence_generator(*seed, clip),
                noise=self.settings.noise,
                rate=self.settings.noise_rate,
                shuffle=self.settings.shuffle_words,
            )
            for clip, sentence, language in zip(batch.ids, batch.texts, batch.languages, strict=True)
        ]
        return dataclasses.replace(text, masked=encode(masked, batch.languages))

    def encode(
        self, batch: VideoBatch, text: TextBatch, *, features_only: bool
    ) -> tuple[dict[str, LossOutput], Features]:
        video, sentence = self._video(batch.frames), self._sentence(text)
        rows = {"video": video, "text": sentence} | comparison_rows(self.settings, batch, video.device)
        losses = {}
        if "masked_lm" in self.weights and not features_only:
            given = text if text.masked is None else text.masked
            with torch.no_grad():
                memory = self.text_encoder(given.input_ids, given.attention_mask)
            decoder_ids, labels = teacher_forcing(text, self.vocabulary)
            logits = self.text_decoder(decoder_ids, memory, given.attention_mask)
            losses["masked_lm"] = label_smoothed_cross_entropy(logits, labels, self.settings.label_smoothing)
        return losses, Features(rows, {"scale": self.logit_scale()})

    def contrast(self, features: Features) -> dict[str, LossOutput]:
        """Anchors are this rank's own pairs, candidates those of their groups on all ranks."""
        rows, scale = features.rows, features.shared["scale"]
        pairs = torch.stack([rows["video"], rows["text"]], 1)
        pairs, _, own = parallel.gather(pairs, torch.ones_like(pairs[..., 0]))
        groups, text_ids = gathered_comparison(self.settings, rows)
        loss = clip_loss(
            pairs[:, 0],
            pairs[:, 1],
            scale,
            targets=self.settings.targets,
            text_ids=text_ids,
            groups=groups,
            anchors=own,
        )
        metrics = {**loss.metrics, "logit_scale": scale.detach()[0]}
        return {"contrastive": LossOutput(loss.loss_sum, loss.count, metrics)}

    def counts(self, text: TextBatch) -> dict[str, Tensor]:
        clips, tokens = torch.tensor(len(text.input_ids), device=text.input_ids.device), text.attention_mask.sum()
        return {part: count for part, count in (("contrastive", clips), ("masked_lm", tokens)) if part in self.weights}

    def encode_video(self, frames: Ragged) -> tuple[Tensor, Tensor]:
        """(one vector a clip [A, 1, D], mask bool [A, 1])."""
        return _as_sequence(self._video(frames))

    def encode_text(self, text: TextBatch) -> tuple[Tensor, Tensor]:
        """(one vector a sentence [B, 1, D], mask bool [B, 1])."""
        return _as_sequence(self._sentence(text))

    @torch.no_grad()
    def similarity(self, video: Tensor, video_mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """[A, B]: the scaled cosines that training compares."""
        video, text = (nn.functional.normalize(vectors[:, 0].float(), dim=-1) for vectors in (video, text))
        return self.logit_scale() * video @ text.T

    def _video(self, frames: Ragged) -> Tensor:
        vectors: Tensor = self.video_head(self.visual(frames))
        return vectors

    def _sentence(self, text: TextBatch) -> Tensor:
        hidden: Tensor = self.text_encoder(text.input_ids, text.attention_mask)
        last = text.attention_mask.sum(1) - 1  # the language code; GFSLT-VLP finds it as the largest id
        return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _as_sequence(vectors: Tensor) -> tuple[Tensor, Tensor]:
    return vectors[:, None], torch.ones(len(vectors), 1, dtype=torch.bool, device=vectors.device)
