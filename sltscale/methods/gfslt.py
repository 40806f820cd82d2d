"""GFSLT (arXiv 2307.14768): frames to sentence, from nothing or from what GFSLT-VLP has pretrained."""

from __future__ import annotations

from torch import Tensor, nn

from sltscale.config import GFSLTSettings
from sltscale.losses.seq2seq import label_smoothed_cross_entropy
from sltscale.methods.base import Method, Vocabulary
from sltscale.models.language import build_encoder_decoder, teacher_forcing
from sltscale.models.translator import Translator
from sltscale.models.visual import PackedVisualTokens
from sltscale.structures import Features, LossOutput, TextBatch, VideoBatch


class GFSLT(Translator, Method):
    """Visual tokens, and an encoder-decoder of mBART's blocks that reads them as they are. There is no class token, so
    positions are one lower than in pretraining."""

    def __init__(self, settings: GFSLTSettings, vocabulary: Vocabulary) -> None:
        language_model = build_encoder_decoder(settings.visual.transformer, settings.text_decoder, vocabulary)
        super().__init__(PackedVisualTokens(settings.visual), nn.Identity(), language_model)
        self.weights = {"lm": 1.0}
        self.settings, self.vocabulary = settings, vocabulary

    def encode(
        self, batch: VideoBatch, text: TextBatch, *, features_only: bool
    ) -> tuple[dict[str, LossOutput], Features]:
        decoder_ids, labels = teacher_forcing(text, self.vocabulary)
        logits = self.logits(batch.frames, decoder_ids)
        return {"lm": label_smoothed_cross_entropy(logits, labels, self.settings.label_smoothing)}, Features()

    def counts(self, text: TextBatch) -> dict[str, Tensor]:
        return {"lm": text.attention_mask.sum()}
