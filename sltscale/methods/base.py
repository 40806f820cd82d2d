"""What a training method is, and how one is built from a recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn

from sltscale.config import MethodSettings
from sltscale.models.language import Vocabulary
from sltscale.structures import LossOutput, TextBatch, VideoBatch

__all__ = ["Method", "Vocabulary", "build_method"]


class Method(nn.Module, ABC):
    """A model and its losses.

    weights: loss part -> weight. The total that training minimises is the sum over the parts p of
    weights[p] * (sum over ranks of loss_sum[p]) / (sum over ranks of count[p]).
    """

    weights: dict[str, float]

    @abstractmethod
    def forward(self, batch: VideoBatch, text: TextBatch) -> dict[str, LossOutput]:
        """Loss parts of this rank's share of the global batch: one entry per key of ``weights``.

        ``text`` holds the tokenised ``batch.texts`` (tokens, </s>, language code, padding on the right), on the device
        of ``batch``.
        """


def build_method(settings: MethodSettings, vocabulary: Vocabulary) -> Method:
    """The method of that recipe, with fresh or published weights. InputError if its sizes do not fit together."""
    from sltscale.methods.c2rl import C2RL  # the methods import this module
    from sltscale.methods.translation import Translation

    table: dict[str, Callable[[Any, Vocabulary], Method]] = {"c2rl": C2RL, "translation": Translation}
    return table[settings.name](settings, vocabulary)
