"""Translation, trained end to end: frames to sentence with cross-entropy under teacher forcing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sltscale.config import TranslationSettings
from sltscale.losses.seq2seq import label_smoothed_cross_entropy
from sltscale.methods.base import Method, Vocabulary
from sltscale.models.language import build_language_model, teacher_forcing
from sltscale.models.translator import Translator
from sltscale.models.visual import VisualEncoder
from sltscale.structures import Features, LossOutput, TextBatch, VideoBatch


class TranslationMethod(Translator, Method):
    """Any translator (parts: see there), with the loss part "lm"."""

    def __init__(
        self,
        visual: nn.Module,
        projection: nn.Module,
        language_model: Any,
        *,
        vocabulary: Vocabulary,
        label_smoothing: float,
    ) -> None:
        super().__init__(visual, projection, language_model)
        self.weights = {"lm": 1.0}
        self.vocabulary, self.label_smoothing = vocabulary, label_smoothing

    def encode(
        self, batch: VideoBatch, text: TextBatch, *, features_only: bool
    ) -> tuple[dict[str, LossOutput], Features]:
        decoder_ids, labels = teacher_forcing(text, self.vocabulary)
        logits = self.logits(batch.frames, decoder_ids)
        return {"lm": label_smoothed_cross_entropy(logits, labels, self.label_smoothing)}, Features()

    def counts(self, text: TextBatch) -> dict[str, Tensor]:
        return {"lm": text.attention_mask.sum()}


class Translation(TranslationMethod):
    """Visual encoder, linear projection, mBART-architecture encoder-decoder (C2RL section IV-B, GFSLT stage 2)."""

    def __init__(self, settings: TranslationSettings, vocabulary: Vocabulary) -> None:
        visual = VisualEncoder(settings.visual)
        language_model = build_language_model(settings.language_model, vocabulary)
        projection = nn.Linear(visual.width, language_model.config.d_model)
        super().__init__(
            visual, projection, language_model, vocabulary=vocabulary, label_smoothing=settings.label_smoothing
        )
