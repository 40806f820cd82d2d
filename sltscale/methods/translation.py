"""Translation, trained end to end: frames to sentence with cross-entropy under teacher forcing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sltscale.config import CausalSettings, MT5Settings, TranslationSettings
from sltscale.losses.seq2seq import IGNORED, label_smoothed_cross_entropy
from sltscale.methods.base import Method, Vocabulary
from sltscale.models.causal import PrefixCoupling, build_causal
from sltscale.models.decoding import Coupling
from sltscale.models.lora import add_lora, layers_called
from sltscale.models.mbart import MBartCoupling, build_mbart
from sltscale.models.mt5 import MT5Coupling, build_mt5
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
        coupling: Coupling,
        label_smoothing: float,
    ) -> None:
        super().__init__(visual, projection, language_model, coupling)
        self.weights = {"lm": 1.0}
        self.label_smoothing = label_smoothing

    def encode(
        self, batch: VideoBatch, text: TextBatch, *, features_only: bool
    ) -> tuple[dict[str, LossOutput], Features]:
        logits, labels = self.logits(batch.frames, text), self.coupling.labels(text)
        return {"lm": label_smoothed_cross_entropy(logits, labels, self.label_smoothing)}, Features()

    def counts(self, text: TextBatch) -> dict[str, Tensor]:
        return {"lm": (self.coupling.labels(text) != IGNORED).sum()}


class Translation(TranslationMethod):
    """Visual encoder, linear projection, language model (C2RL section IV-B, with mBART or mT5; decoder-only models)."""

    def __init__(self, settings: TranslationSettings, vocabulary: Vocabulary) -> None:
        visual = VisualEncoder(settings.visual)
        language_model, coupling = _language_model(settings, vocabulary)
        if settings.lora is not None:
            add_lora(language_model, settings.lora, layers_called(language_model, settings.lora_modules))
        projection = nn.Linear(visual.width, language_model.get_input_embeddings().embedding_dim)
        super().__init__(visual, projection, language_model, coupling, settings.label_smoothing)


def _language_model(settings: TranslationSettings, vocabulary: Vocabulary) -> tuple[Any, Coupling]:
    wanted = settings.language_model
    if isinstance(wanted, MT5Settings):
        return build_mt5(wanted, vocabulary), MT5Coupling(vocabulary)
    if isinstance(wanted, CausalSettings):
        return build_causal(wanted, vocabulary), PrefixCoupling(vocabulary)
    return build_mbart(wanted, vocabulary), MBartCoupling(vocabulary, settings.source_tokens)
