"""C2RL pretraining (arXiv 2408.09949): token-level contrastive learning and language modelling on one visual encoder.

Letters: A and B videos and sentences, I and J their tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sltscale import parallel
from sltscale.config import C2RLSettings
from sltscale.errors import InputError
from sltscale.losses.contrastive import clcl_pair_loss, clcl_similarity
from sltscale.losses.seq2seq import label_smoothed_cross_entropy
from sltscale.methods.base import RetrievalMethod, Vocabulary
from sltscale.models.language import TextDecoder, TextEncoder, teacher_forcing
from sltscale.models.layers import LogitScale
from sltscale.models.visual import VisualEncoder
from sltscale.structures import Features, LossOutput, Ragged, TextBatch, VideoBatch

SIMILARITY_ELEMENTS = 2**24  # of the [A, I, B, J] cosines held at a time when all pairs are compared (64 MiB)


class C2RL(RetrievalMethod):
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
        self.settings, self.vocabulary = settings, vocabulary
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
            sentence, sentence_mask = self.encode_text(text)
            rows = {"video": video, "video_mask": video_mask, "text": sentence, "text_mask": sentence_mask}
            features = Features(rows, {"scale": self.logit_scale()})
        if "lm" in self.weights and not features_only:
            decoder_ids, labels = teacher_forcing(text, self.vocabulary)
            logits = self.text_decoder(decoder_ids, video, video_mask)
            losses["lm"] = label_smoothed_cross_entropy(logits, labels, self.settings.label_smoothing)
        return losses, features

    def contrast(self, features: Features) -> dict[str, LossOutput]:
        """Anchors are this rank's own pairs, candidates all ranks': sums and counts over the ranks are the loss of the
        whole global batch, and gradients come out exact (see sltscale.parallel)."""
        if "contrastive" not in self.weights:
            return {}
        rows, scale = features.rows, features.shared["scale"]
        # Padding is zero on every rank, as the gather's own is: with mask_inner off it takes part in the softmax.
        text, text_mask, _ = parallel.gather(rows["text"] * rows["text_mask"][..., None], rows["text_mask"])
        video, video_mask, own = parallel.gather(rows["video"], rows["video_mask"])
        loss = clcl_pair_loss(
            video,
            text,
            video_mask,
            text_mask,
            scale,
            temperature=self.settings.inner_temperature,
            mask_inner=self.settings.mask_inner,
            mix=self.settings.mix,
            anchors=own,
        )
        metrics = {**loss.metrics, "logit_scale": scale.detach()[0]}
        return {"contrastive": LossOutput(loss.loss_sum, loss.count, metrics)}

    def counts(self, text: TextBatch) -> dict[str, Tensor]:
        clips, tokens = torch.tensor(len(text.input_ids), device=text.input_ids.device), text.attention_mask.sum()
        return {part: count for part, count in (("contrastive", clips), ("lm", tokens)) if part in self.weights}

    def encode_video(self, frames: Ragged) -> tuple[Tensor, Tensor]:
        """(visual tokens [A, I, D], mask bool [A, I])."""
        tokens: Ragged = self.visual(frames)
        return tokens.to_padded()

    def encode_text(self, text: TextBatch) -> tuple[Tensor, Tensor]:
        """(text tokens [B, J, D], mask bool [B, J])."""
        self._require_contrastive()
        return self.text_encoder(text.input_ids, text.attention_mask), text.attention_mask.bool()

    @torch.no_grad()
    def similarity(self, video: Tensor, video_mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """[A, B]: mean of both CLCL similarities of all pairs, for retrieval in both directions (CiCo).

        Takes encoded tokens and masks; works through the videos in chunks, so that memory stays bounded.
        """
        self._require_contrastive()
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
                temperature=self.settings.inner_temperature,
                mask_inner=self.settings.mask_inner,
            )
            rows.append((v2t + t2v) / 2)
        return torch.cat(rows)

    def _require_contrastive(self) -> None:
        if "contrastive" not in self.weights:
            raise InputError("this model was trained with alpha = 0 and has no text encoder; retrieval needs alpha > 0")


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
