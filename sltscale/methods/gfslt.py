"""GFSLT (arXiv 2307.14768): frames to sentence, from nothing or from what GFSLT-VLP has pretrained."""

from __future__ import annotations

from torch import nn

from sltscale.config import GFSLTSettings
from sltscale.methods.base import Vocabulary
from sltscale.methods.translation import TranslationMethod
from sltscale.models.mbart import MBartCoupling, build_encoder_decoder
from sltscale.models.visual import PackedVisualTokens


class GFSLT(TranslationMethod):
    """Visual tokens, and an encoder-decoder of mBART's blocks that reads them as they are. There is no class token, so
    positions are one lower than in pretraining."""

    def __init__(self, settings: GFSLTSettings, vocabulary: Vocabulary) -> None:
        language_model = build_encoder_decoder(settings.visual.transformer, settings.text_decoder, vocabulary)
        visual = PackedVisualTokens(settings.visual)
        super().__init__(visual, nn.Identity(), language_model, MBartCoupling(vocabulary), settings.label_smoothing)
