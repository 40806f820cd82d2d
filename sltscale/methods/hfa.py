"""HFA (arXiv 2507.06732): frames, segments and sentences aligned one level at a time, then translation.

Letters: A and B videos and sentences, N packed segments, M longest video's segments, D width, K pseudo-glosses.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from sltscale import parallel
from sltscale.config import HFAPretrainingSettings, HFATranslationSettings, HFAVisualSettings, LoraSettings
from sltscale.data.lexicon import Lexicon
from sltscale.errors import InputError
from sltscale.losses.contrastive import clip_loss
from sltscale.losses.lexical import pseudo_gloss_loss, pseudo_gloss_scores
from sltscale.methods.base import RetrievalMethod, Vocabulary
from sltscale.methods.comparison import comparison_rows, gathered_comparison
from sltscale.methods.translation import TranslationMethod
from sltscale.models.dino import DinoEncoder
from sltscale.models.layers import GlobalBatchNorm, LogitScale
from sltscale.models.local_temporal import LocalTemporalEncoder
from sltscale.models.lora import add_lora
from sltscale.models.mbart import MBartCoupling, build_mbart
from sltscale.structures import Features, LossOutput, Ragged, TextBatch, VideoBatch

QUERIES_AND_VALUES = r".*\.(q_proj|v_proj)"


class HFAPretraining(RetrievalMethod):
    """L = alignment L_align + pseudo_gloss L_pg. A part with weight 0 is neither built nor computed.

    L_align: whole videos against whole sentences, GFSLT-VLP's contrastive loss over the global batch. The language
    model's encoder, frozen but for LoRA, reads a learned CLS and the segments; a second, frozen copy of it, always in
    evaluation mode, reads the sentence with </s> and language code; a feature is the mean over positions. L_pg: which
    words of the sentence are seen in the segments.
    """

    def __init__(self, settings: HFAPretrainingSettings, vocabulary: Vocabulary) -> None:
        super().__init__()
        weights = {"alignment": settings.alignment, "pseudo_gloss": settings.pseudo_gloss}
        self.weights = {part: weight for part, weight in weights.items() if weight > 0}
        self.settings = settings
        self.visual = HFAVisual(settings.visual)
        if "alignment" in self.weights:
            self.compared = ("alignment",)
            encoder = build_mbart(settings.language_model, vocabulary).model.encoder
            width = encoder.config.d_model
            _check_width(self.visual.width, width)
            self.text_encoder = _Frozen(encoder)
            self.video_encoder = VideoEncoder(copy.deepcopy(encoder), settings.lora)
            self.logit_scale = LogitScale(math.inf)
            self.unread_embeddings = {"video_encoder": vocabulary.size * width}
        if "pseudo_gloss" in self.weights:
            if not vocabulary.pseudo_glosses:
                raise InputError("method.pseudo_gloss is above 0, but there are no pseudo-glosses; give a lexicon")
            self.head = PseudoGlossHead(self.visual.width, vocabulary.pseudo_glosses, settings)
            self.lexicon: Lexicon | None = None

    def use_lexicon(self, lexicon: Lexicon) -> None:
        """Learn these pseudo-glosses, starting from their vectors. InputError if it is not the one that fits."""
        own = tuple(self.head.prototypes.shape)
        if lexicon.vectors.shape != own:
            found = f"{len(lexicon)} pseudo-glosses with vectors of width {lexicon.vectors.shape[1]}"
            raise InputError(f"the lexicon has {found}, the model {own[0]} of width {own[1]}; set method.head_width")
        with torch.no_grad():
            self.head.prototypes.copy_(torch.from_numpy(lexicon.vectors))
        self.lexicon = lexicon

    def encode(
        self, batch: VideoBatch, text: TextBatch, *, features_only: bool
    ) -> tuple[dict[str, LossOutput], Features]:
        segments: Ragged = self.visual(batch.frames)
        features, losses = Features(), {}
        if "alignment" in self.weights:
            rows = {"video": self._video(segments), "text": self._text(text)}
            rows |= comparison_rows(self.settings, batch, rows["video"].device)
            features = Features(rows, {"scale": self.logit_scale()})
        if "pseudo_gloss" in self.weights and not features_only:
            if self.lexicon is None:
                raise InputError(
                    "the model has no lexicon to learn from; its pseudo-glosses are learnt in training only"
                )
            scores = self.head(segments)
            targets = self.lexicon.targets(batch.texts).to(scores.device)
            losses["pseudo_gloss"] = pseudo_gloss_loss(scores, targets, variant=self.settings.loss)
        return losses, features

    def contrast(self, features: Features) -> dict[str, LossOutput]:
        if "alignment" not in self.weights:
            return {}
        every = {}
        own = slice(None)
        for name in ("video", "text"):
            one = features.rows[name][:, None]
            gathered, _, own = parallel.gather(one, torch.ones(one.shape[:2], device=one.device))
            every[name] = gathered[:, 0]
        scale = features.shared["scale"]
        groups, text_ids = gathered_comparison(self.settings, features.rows)
        loss = clip_loss(
            every["video"],
            every["text"],
            scale,
            targets="softmax10",
            text_ids=text_ids,
            groups=groups,
            anchors=own,
        )
        return {"alignment": LossOutput(loss.loss_sum, loss.count, {**loss.metrics, "logit_scale": scale.detach()[0]})}

    def counts(self, text: TextBatch) -> dict[str, Tensor]:
        clips = torch.tensor(len(text.input_ids), device=text.input_ids.device)
        counts = {"alignment": clips}
        if "pseudo_gloss" in self.weights:
            counts["pseudo_gloss"] = clips * self.head.outputs
        return {part: counts[part] for part in self.weights}

    def encode_video(self, frames: Ragged) -> tuple[Tensor, Tensor]:
        """(features [A, 1, D], mask [A, 1], all true): one for the whole video."""
        self._require_alignment()
        return _as_tokens(self._video(self.visual(frames)))

    def encode_text(self, text: TextBatch) -> tuple[Tensor, Tensor]:
        """(features [B, 1, D], mask [B, 1], all true): one for the whole sentence."""
        self._require_alignment()
        return _as_tokens(self._text(text))

    @torch.no_grad()
    def similarity(self, video: Tensor, video_mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Cosines [A, B]."""
        one, other = (nn.functional.normalize(features[:, 0].float(), dim=-1) for features in (video, text))
        return one @ other.T

    def _video(self, segments: Ragged) -> Tensor:
        values, mask = self.video_encoder(segments)
        start = 0 if self.settings.pool_cls else 1
        return _mean(values[:, start:], mask[:, start:], self.settings.pool_masked)

    def _text(self, text: TextBatch) -> Tensor:
        with torch.no_grad():
            values = self.text_encoder.module(input_ids=text.input_ids, attention_mask=text.attention_mask)
        return _mean(values.last_hidden_state, text.attention_mask, self.settings.pool_masked)

    def _require_alignment(self) -> None:
        if "alignment" not in self.weights:
            raise InputError("this model was trained with alignment = 0 and compares no sentences; retrieval needs it")


class HFATranslation(TranslationMethod):
    """Segments, mapper, and an mBART-architecture model that is frozen but for LoRA: on query and value layers of its
    encoder, and of self- and cross-attention in its decoder. Embedding and output layer are one and frozen."""

    def __init__(self, settings: HFATranslationSettings, vocabulary: Vocabulary) -> None:
        visual = HFAVisual(settings.visual)
        language_model = build_mbart(settings.language_model, vocabulary)
        _check_width(visual.width, language_model.config.d_model)
        add_lora(language_model, settings.lora, QUERIES_AND_VALUES)
        mapper = Mapper(visual.width, settings.mapper)
        super().__init__(visual, mapper, language_model, MBartCoupling(vocabulary), settings.label_smoothing)


class HFAVisual(nn.Module):
    """Ragged uint8 frames -> Ragged [N, width], ceil(length / 2) segments of each video."""

    def __init__(self, settings: HFAVisualSettings) -> None:
        super().__init__()
        self.frames = DinoEncoder(settings.frames)
        self.temporal = LocalTemporalEncoder(self.frames.width, settings.temporal)
        self.width: int = settings.temporal.output_width or settings.temporal.width

    def forward(self, frames: Ragged) -> Ragged:
        segments: Ragged = self.temporal(self.frames(frames))
        return segments


class VideoEncoder(nn.Module):
    """Ragged segments [N, D] -> (values [A, 1 + M, D], mask [A, 1 + M]): a learned CLS first, through a language
    model's encoder (without its token embedding, which nothing reads)."""

    def __init__(self, encoder: Any, lora: LoraSettings) -> None:
        super().__init__()
        del encoder.embed_tokens
        add_lora(encoder, lora, QUERIES_AND_VALUES)
        self.encoder = encoder
        self.cls = nn.Parameter(torch.randn(1, 1, encoder.config.d_model))

    def forward(self, segments: Ragged) -> tuple[Tensor, Tensor]:
        values, mask = segments.to_padded()
        values = torch.cat([self.cls.to(values.dtype).expand(len(values), -1, -1), values], 1)
        mask = nn.functional.pad(mask, (1, 0), value=True)
        return self.encoder(inputs_embeds=values, attention_mask=mask).last_hidden_state, mask


class PseudoGlossHead(nn.Module):
    """Ragged segments [N, D] -> scores [B, outputs]: K, and the blank's where the loss counts it."""

    def __init__(self, width: int, pseudo_glosses: int, settings: HFAPretrainingSettings) -> None:
        super().__init__()
        self.settings = settings
        self.keep_blank = settings.blank and settings.loss == "bce_logits"
        self.outputs = pseudo_glosses + self.keep_blank
        self.dropout = nn.Dropout(settings.head_dropout)
        self.linear = nn.Linear(width, settings.head_width)
        prototypes = torch.randn(pseudo_glosses, settings.head_width)
        self.prototypes = nn.Parameter(prototypes, requires_grad=settings.train_prototypes)
        if settings.learn_temperatures:
            self.tau_prototype = nn.Parameter(torch.full((1,), settings.tau_prototype))
            self.tau_time = nn.Parameter(torch.full((1,), settings.tau_time))

    def forward(self, segments: Ragged) -> Tensor:
        features, mask = segments.with_values(self.linear(self.dropout(segments.values))).to_padded()
        learned = self.settings.learn_temperatures
        return pseudo_gloss_scores(
            features,
            self.prototypes,
            mask,
            tau_prototype=self.tau_prototype if learned else self.settings.tau_prototype,
            tau_time=self.tau_time if learned else self.settings.tau_time,
            blank=self.settings.blank,
            keep_blank=self.keep_blank,
        )


class Mapper(nn.Module):
    """Linear layer [N, D] -> [N, D], alone or with norm and activation behind it."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.linear.weight, gain=nn.init.calculate_gain("relu"))
        self.norm: nn.Module = nn.Identity()
        self.activation: nn.Module = nn.Identity()
        if kind == "linear_ln_gelu":
            self.norm, self.activation = nn.LayerNorm(width), nn.GELU()
        elif kind == "linear_bn_relu":
            self.norm, self.activation = GlobalBatchNorm(width), nn.ReLU()

    def forward(self, values: Tensor) -> Tensor:
        mapped: Tensor = self.activation(self.norm(self.linear(values)))
        return mapped


class _Frozen(nn.Module):
    """A module that neither learns nor drops anything, in training too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> _Frozen:
        return super().train(False)


def _mean(values: Tensor, mask: Tensor, masked: bool) -> Tensor:
    """[B, T, D] -> [B, D] over the positions where ``mask`` [B, T] is true, or over all, padding included."""
    if not masked:
        return values.mean(1)
    weight = mask[..., None].to(values.dtype)
    return (values * weight).sum(1) / weight.sum(1).clamp(min=1)


def _as_tokens(features: Tensor) -> tuple[Tensor, Tensor]:
    return features[:, None], torch.ones(len(features), 1, dtype=torch.bool, device=features.device)


def _check_width(visual: int, language_model: int) -> None:
    if visual != language_model:
        raise InputError(
            f"segments have width {visual}, the language model {language_model}; set "
            "method.visual.temporal.output_width to the language model's"
        )
