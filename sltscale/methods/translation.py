"""Translation, trained end to end: frames to sentence with cross-entropy under teacher forcing."""

from __future__ import annotations

from sltscale.config import TranslationSettings
from sltscale.losses.seq2seq import label_smoothed_cross_entropy
from sltscale.methods.base import Method, Vocabulary
from sltscale.models.language import teacher_forcing
from sltscale.models.translator import Translator
from sltscale.structures import LossOutput, TextBatch, VideoBatch


class Translation(Translator, Method):
    """Visual encoder, linear projection, mBART-architecture encoder-decoder (C2RL section IV-B, GFSLT stage 2)."""

    def __init__(self, settings: TranslationSettings, vocabulary: Vocabulary) -> None:
        super().__init__(settings.visual, settings.language_model, vocabulary)
        self.weights = {"lm": 1.0}
        self.settings, self.vocabulary = settings, vocabulary

    def forward(self, batch: VideoBatch, text: TextBatch) -> dict[str, LossOutput]:
        decoder_ids, labels = teacher_forcing(text, self.vocabulary)
        logits = self.logits(batch.frames, decoder_ids)
        return {"lm": label_smoothed_cross_entropy(logits, labels, self.settings.label_smoothing)}
