"""Videos against sentences, token by token: what C2RL's pretraining and its retrieval share.

Letters: A and B videos and sentences, I and J their tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sltscale import parallel
from sltscale.config import TokenContrastSettings
from sltscale.errors import InputError
from sltscale.losses.contrastive import clcl_pair_loss, clcl_similarity
from sltscale.methods.base import RetrievalMethod
from sltscale.methods.comparison import comparison_rows, gathered_comparison
from sltscale.models.language import TextEncoder
from sltscale.models.layers import LogitScale
from sltscale.structures import Features, LossOutput, TextBatch, VideoBatch

SPECIAL_TOKENS = 2  # that end a sentence: </s> and language code
SIMILARITY_ELEMENTS = 2**24  # of the [A, I, B, J] cosines held at a time when all pairs are compared (64 MiB)


class TokenContrast(RetrievalMethod):
    """The loss part "contrastive": CLCL between all videos and sentences of the global batch (C2RL eq. 1, after CiCo).

    A method that inherits it has ``settings`` and, unless the part is left out, ``text_encoder`` and ``logit_scale``.
    """

    settings: TokenContrastSettings
    text_encoder: TextEncoder
    logit_scale: LogitScale

    def compared_features(self, video: Tensor, video_mask: Tensor, text: TextBatch, batch: VideoBatch) -> Features:
        """What the clips of ``batch`` are compared by: visual tokens, those of their sentences, the learned factor."""
        sentence, sentence_mask = self.encode_text(text)
        rows = {"video": video, "video_mask": video_mask, "text": sentence, "text_mask": sentence_mask}
        rows |= comparison_rows(self.settings, batch, video.device)
        return Features(rows, {"scale": self.logit_scale()})

    def contrast(self, features: Features) -> dict[str, LossOutput]:
        """Anchors are this rank's own pairs, candidates all ranks': sums and counts over the ranks are the loss of the
        whole global batch, and gradients come out exact (see sltscale.parallel)."""
        if "contrastive" not in self.weights:
            return {}
        rows, scale = features.rows, features.shared["scale"]
        # Padding is zero on every rank, as the gather's own is: with mask_inner off it takes part in the softmax.
        text, text_mask, _ = parallel.gather(rows["text"] * rows["text_mask"][..., None], rows["text_mask"])
        video, video_mask, own = parallel.gather(rows["video"] * rows["video_mask"][..., None], rows["video_mask"])
        settings = self.settings
        groups, text_ids = gathered_comparison(settings, rows)
        loss = clcl_pair_loss(
            video,
            text,
            video_mask,
            text_mask,
            scale,
            temperature=settings.inner_temperature,
            mask_inner=settings.mask_inner,
            mix=settings.mix,
            text_ids=text_ids,
            groups=groups,
            anchors=own,
        )
        metrics = {**loss.metrics, "logit_scale": scale.detach()[0]}
        return {"contrastive": LossOutput(loss.loss_sum, loss.count, metrics)}

    def encode_text(self, text: TextBatch) -> tuple[Tensor, Tensor]:
        """(text tokens [B, J, D], mask bool [B, J]); the mask holds </s> and language code unless the settings leave
        them out of the comparison."""
        self._require_contrastive()
        mask = text.attention_mask.bool()
        hidden = self.text_encoder(text.input_ids, text.attention_mask)
        if not self.settings.special_tokens:
            steps = torch.arange(mask.shape[1], device=mask.device)
            mask = steps < mask.sum(1, keepdim=True) - SPECIAL_TOKENS
        return hidden, mask

    @torch.no_grad()
    def similarity(self, video: Tensor, video_mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """[A, B]: mean of both CLCL similarities of all pairs, for retrieval in both directions (CiCo).

        Takes encoded tokens and masks; works through the videos in chunks, so that memory stays bounded. InputError
        from a model that was not trained to compare.
        """
        self._require_contrastive()
        settings = self.settings
        per_video = video.shape[1] * text.shape[0] * text.shape[1]
        chunk = max(1, SIMILARITY_ELEMENTS // max(1, per_video))
        rows = []
        for tokens, mask in zip(video.split(chunk), video_mask.split(chunk), strict=True):
            v2t, t2v = clcl_similarity(
                tokens,
                text,
                mask,
                text_mask,
                self.logit_scale(),
                temperature=settings.inner_temperature,
                mask_inner=settings.mask_inner,
            )
            rows.append((v2t + t2v) / 2)
        return torch.cat(rows)

    def _require_contrastive(self) -> None:
        if "contrastive" not in self.weights:
            raise InputError("this model was trained with alpha = 0 and has no text encoder; retrieval needs alpha > 0")
