"""C2RL pretraining (arXiv 2408.09949): token-level contrast and language modelling on one visual encoder."""

from __future__ import annotations

import torch
from torch import Tensor

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
    </s> and language code included). L_lm: the decoder writes the sentence from the visual tokens.
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
        if "contrastive" in self.weights:
            self.text_encoder = TextEncoder(settings.text_encoder, vocabulary)
            self.logit_scale = LogitScale(settings.max_logit_scale)
        if "lm" in self.weights:
            self.text_decoder = TextDecoder(settings.text_decoder, vocabulary)

    def encode(
        self, batch: VideoBatch, text: TextBatch, *, features_only: bool
    ) -> tuple[dict[str, LossOutput], Features]:
        video, video_mask = self.encode_video(batch.frames)
        features, losses = Features(), {}
        if "contrastive" in self.weights:
            features = self.compared_features(video, video_mask, text)
        if "lm" in self.weights and not features_only:
            decoder_ids, labels = teacher_forcing(text, self.vocabulary)
            logits = self.text_decoder(decoder_ids, video, video_mask)
            losses["lm"] = label_smoothed_cross_entropy(logits, labels, self.settings.label_smoothing)
        return losses, features

    def encode_video(self, frames: Ragged) -> tuple[Tensor, Tensor]:
        """(visual tokens [A, I, D] of A videos with I steps, mask bool [A, I])."""
        tokens: Ragged = self.visual(frames)
        return tokens.to_padded()

    def counts(self, text: TextBatch) -> dict[str, Tensor]:
        clips, tokens = torch.tensor(len(text.input_ids), device=text.input_ids.device), text.attention_mask.sum()
        return {part: count for part, count in (("contrastive", clips), ("lm", tokens)) if part in self.weights}


def _check(settings: C2RLSettings, weights: dict[str, float]) -> None:
    if not weights:
        raise InputError("method.alpha and method.beta are both 0; at least one loss must have a weight")
    width = settings.visual.transformer.width
    towers = {"text_encoder": settings.text_encoder, "text_decoder": settings.text_decoder}
    for name, part in (("text_encoder", "contrastive"), ("text_decoder", "lm")):
        if part in weights and towers[name].width != width:
            raise InputError(
                f"method.{name}.width is {towers[name].width}, method.visual.transformer.width {width}; "
                f"C2RL compares and attends to visual tokens directly: set both to the same number"
            )
