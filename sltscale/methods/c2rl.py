"""C2RL pretraining (arXiv 2408.09949): token-level contrast and language modelling on one visual encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sltscale.config import C2RLSettings
from sltscale.errors import InputError
from sltscale.losses.seq2seq import label_smoothed_cross_entropy
from sltscale.methods.base import Vocabulary
from sltscale.methods.token_contrast import TokenContrast
from sltscale.models.language import TextDecoder, TextEncoder
from sltscale.models.layers import LogitScale
from sltscale.models.mbart import teacher_forcing
from sltscale.models.visual import VisualEncoder
from sltscale.structures import Features, LossOutput, Ragged, TextBatch, VideoBatch


class C2RL(TokenContrast):
    """L = alpha L_con + beta L_lm. A part with weight 0 is neither built nor computed.

    L_con: CLCL between all videos and sentences of the global batch (the sentence encoder reads the full target ids,
    </s> and language code included; whether these two are compared is a setting). L_lm: the decoder writes the sentence
    from the visual tokens.
    """

    def __init__(self, settings: C2RLSettings, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.weights = {
            part: weight for part, weight in (("contrastive", settings.alpha), ("lm", settings.beta)) if weight > 0
        }
        self.compared = ("contrastive",) if "contrastive" in self.weights else ()
        _check(settings, self.weights)
        self.settings: C2RLSettings = settings
        self.vocabulary = vocabulary
        self.visual = VisualEncoder(settings.visual)
        self.text_projection: nn.Linear | None = None
        if "contrastive" in self.weights:
            self.text_encoder = TextEncoder(settings.text_encoder, vocabulary)
            width = self.text_encoder.width
            if width != settings.text_encoder.width:
                raise InputError(f"{settings.text_encoder.pretrained} is {width} wide: set method.text_encoder.width")
            if width != self.visual.width:
                self.text_projection = nn.Linear(width, self.visual.width)
            self.logit_scale = LogitScale(settings.max_logit_scale, settings.initial_temperature)
        if "lm" in self.weights:
            self.text_decoder = TextDecoder(settings.text_decoder, vocabulary)
            if settings.share_embeddings:
                self.text_decoder.blocks.embed_tokens.weight = self.text_encoder.blocks.embed_tokens.weight
            if settings.tied:
                self.text_decoder.lm_head.weight = self.text_decoder.blocks.embed_tokens.weight

    def encode(
        self, batch: VideoBatch, text: TextBatch, *, features_only: bool
    ) -> tuple[dict[str, LossOutput], Features]:
        video, video_mask = self.encode_video(batch.frames)
        features, losses = Features(), {}
        if "contrastive" in self.weights:
            features = self.compared_features(video, video_mask, text, batch)
        if "lm" in self.weights and not features_only:
            decoder_ids, labels = teacher_forcing(text, self.vocabulary)
            logits = self.text_decoder(decoder_ids, video, video_mask)
            losses["lm"] = label_smoothed_cross_entropy(logits, labels, self.settings.label_smoothing)
        return losses, features

    def encode_video(self, frames: Ragged) -> tuple[Tensor, Tensor]:
        """(visual tokens [A, I, D] of A videos with I steps, mask bool [A, I])."""
        tokens: Ragged = self.visual(frames)
        return tokens.to_padded()

    def encode_text(self, text: TextBatch) -> tuple[Tensor, Tensor]:
        hidden, mask = super().encode_text(text)
        return hidden if self.text_projection is None else self.text_projection(hidden), mask

    def counts(self, text: TextBatch) -> dict[str, Tensor]:
        clips, tokens = torch.tensor(len(text.input_ids), device=text.input_ids.device), text.attention_mask.sum()
        return {part: count for part, count in (("contrastive", clips), ("lm", tokens)) if part in self.weights}


def _check(settings: C2RLSettings, weights: dict[str, float]) -> None:
    if not weights:
        raise InputError("method.alpha and method.beta are both 0; at least one loss must have a weight")
    width, own = settings.visual.transformer.width, settings.text_decoder.width
    if "lm" in weights and own != width:
        raise InputError(
            f"method.text_decoder.width is {own}, method.visual.transformer.width {width}; "
            f"the decoder attends to visual tokens directly: set both to the same number"
        )
    if settings.share_embeddings and "contrastive" not in weights:
        raise InputError("method.share_embeddings is set, but with alpha 0 there is no text encoder to share with")
    if settings.share_embeddings and settings.text_encoder.width != own:
        raise InputError(
            f"method.share_embeddings: the text encoder's width is {settings.text_encoder.width}, "
            f"method.text_decoder.width {own}; one embedding needs the same number"
        )
