"""C2RL's retrieval (arXiv 2408.09949 section IV-B): two encoders of one kind, compared token by token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sltscale.config import RetrievalSettings
from sltscale.methods.base import Vocabulary
from sltscale.methods.token_contrast import TokenContrast
from sltscale.models.language import TextEncoder
from sltscale.models.layers import LogitScale
from sltscale.models.visual import VisualEncoder
from sltscale.structures import Features, LossOutput, Ragged, TextBatch, VideoBatch


class Retrieval(TokenContrast):
    """Visual encoder, linear projection and an mBART encoder for videos; another, with weights of its own, for
    sentences. The paper trains it on stored features: freeze ``visual`` (optim.groups) and set data.augment = "off"."""

    compared = ("contrastive",)

    def __init__(self, settings: RetrievalSettings, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.weights = {"contrastive": 1.0}
        self.settings: RetrievalSettings = settings
        self.visual = VisualEncoder(settings.visual)
        self.text_encoder = TextEncoder(settings.encoder, vocabulary)
        width = self.text_encoder.width
        self.projection = nn.Linear(self.visual.width, width)
        self.video_encoder = TextEncoder(settings.encoder, vocabulary).blocks
        del self.video_encoder.embed_tokens  # never read when vectors come in
        self.unread_embeddings = {"video_encoder": vocabulary.size * width}
        self.logit_scale = LogitScale(settings.max_logit_scale, settings.initial_temperature)

    def encode(
        self, batch: VideoBatch, text: TextBatch, *, features_only: bool
    ) -> tuple[dict[str, LossOutput], Features]:
        return {}, self.compared_features(*self.encode_video(batch.frames), text, batch)

    def encode_video(self, frames: Ragged) -> tuple[Tensor, Tensor]:
        tokens: Ragged = self.visual(frames)
        values, mask = tokens.with_values(self.projection(tokens.values)).to_padded()
        return self.video_encoder(inputs_embeds=values, attention_mask=mask).last_hidden_state, mask

    def counts(self, text: TextBatch) -> dict[str, Tensor]:
        return {"contrastive": torch.tensor(len(text.input_ids), device=text.input_ids.device)}
