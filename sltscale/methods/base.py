"""What a training method is, and how one is built from a recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from sltscale.config import MethodSettings
from sltscale.models.language import Vocabulary
from sltscale.models.visual import StoredTokens
from sltscale.structures import Features, LossOutput, Ragged, TextBatch, VideoBatch

__all__ = ["Encode", "Method", "RetrievalMethod", "Vocabulary", "build_method"]

Encode = Callable[[Sequence[str], Sequence[str]], TextBatch]
"""Texts and their languages to ids (``TextTokenizer.encode``)."""


class Method(nn.Module, ABC):
    """A model and its losses.

    weights: loss part -> weight. The total that training minimises is the sum over the parts p of
    weights[p] * (sum over ranks of loss_sum[p]) / (sum over ranks of count[p]).
    """

    weights: dict[str, float]
    compared: tuple[str, ...] = ()  # the parts that ``contrast`` gives
    # For comparison with published sizes: parts that those leave out, and token embeddings that they count although
    # nothing reads them (so they are not built), by name with their parameters.
    counted_apart: tuple[str, ...] = ()
    unread_embeddings: dict[str, int] = {}  # noqa: RUF012

    def tokenise(self, encode: Encode, batch: VideoBatch, seed: tuple[int, int]) -> TextBatch:
        """The ``text`` that ``forward`` takes along with ``batch``. seed: the run's and the step, which with a clip's
        id give whatever is random in it, so that it is the same however the global batch is dealt out."""
        return encode(batch.texts, batch.languages)

    def forward(
        self, batch: VideoBatch, text: TextBatch, *, encode_only: bool = False, features_only: bool = False
    ) -> Any:
        """Loss parts of this rank's share of the global batch, one entry per key of ``weights``; with ``encode_only``
        what ``encode`` returns.

        ``text`` holds the tokenised ``batch.texts`` (tokens, </s>, language code, padding on the right), on the device
        of ``batch``.
        """
        losses, features = self.encode(batch, text, features_only=features_only)
        return (losses, features) if encode_only else losses | self.contrast(features)

    @abstractmethod
    def encode(
        self, batch: VideoBatch, text: TextBatch, *, features_only: bool
    ) -> tuple[dict[str, LossOutput], Features]:
        """The parts that are sums over single clips, and the features that clips are compared by.

        features_only: no losses. Random numbers for the features are drawn first, so that they are the same in both
        cases.
        """

    def contrast(self, features: Features) -> dict[str, LossOutput]:
        """The parts that compare clips, over the global batch (a collective), from this rank's features alone."""
        return {}

    @abstractmethod
    def counts(self, text: TextBatch) -> dict[str, Tensor]:
        """``LossOutput.count`` of every part, from the sentences of this rank's share."""


class RetrievalMethod(Method):
    """One that compares videos with sentences.

    Letters: A videos, B sentences, I and J their tokens, D width.
    """

    @abstractmethod
    def encode_video(self, frames: Ragged) -> tuple[Tensor, Tensor]:
        """(what videos are compared by [A, I, D], mask bool [A, I])."""

    @abstractmethod
    def encode_text(self, text: TextBatch) -> tuple[Tensor, Tensor]:
        """(what sentences are compared by [B, J, D], mask bool [B, J])."""

    @abstractmethod
    def similarity(self, video: Tensor, video_mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """[A, B] of what was encoded."""


def build_method(settings: MethodSettings, vocabulary: Vocabulary, *, stored_tokens: bool = False) -> Method:
    """The method of that recipe, with fresh or published weights. InputError if its sizes do not fit together.

    stored_tokens: without its visual encoder, whose tokens come in place of frames. The other weights are drawn as with
    it, so that training on stored tokens takes the very steps that it takes on clips and a frozen encoder.
    """
    method = _build(settings, vocabulary)
    if stored_tokens:
        method.visual = StoredTokens(method.visual.width)  # type: ignore[arg-type, union-attr]
    return method


def _build(settings: MethodSettings, vocabulary: Vocabulary) -> Method:
    from sltscale.methods.c2rl import C2RL  # the methods import this module
    from sltscale.methods.features import FeatureExtraction
    from sltscale.methods.gfslt import GFSLT
    from sltscale.methods.gfslt_vlp import GFSLTVLP
    from sltscale.methods.hfa import HFAPretraining, HFATranslation
    from sltscale.methods.retrieval import Retrieval
    from sltscale.methods.translation import Translation

    table: dict[str, Callable[[Any, Vocabulary], Method]] = {
        "c2rl": C2RL,
        "features": FeatureExtraction,
        "gfslt": GFSLT,
        "gfslt_vlp": GFSLTVLP,
        "hfa_pretraining": HFAPretraining,
        "hfa_translation": HFATranslation,
        "retrieval": Retrieval,
        "translation": Translation,
    }
    return table[settings.name](settings, vocabulary)
