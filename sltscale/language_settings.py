"""The settings of language models, a branch of the configuration tree in ``config``."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from sltscale.settings import ActivationSettings, Length, Positive, Share

DEFAULT_ARCHITECTURE = "mbart"
PROMPTS = {
    "de": "Übersetze die Gebärdensprache ins Deutsche:",
    "en": "Translate the sign language into English:",
    "zh": "把手语翻译成中文:",
}


class LanguageModelSettings(ActivationSettings):
    """An mBART-architecture encoder-decoder. pretrained: folder or hub name whose weights and sizes it takes.
    ``prompts``, of every language model's settings, is how it is told the language, see data.text.TextTokenizer.

    init_std: deviation of random weights. mBART's 0.02 is meant for a width of 1024; narrow models learn sooner with
    about 1 / sqrt(width).
    """

    prompts: ClassVar[dict[str, str] | None] = None
    architecture: Literal["mbart"] = "mbart"
    pretrained: str | None = None
    width: Positive = 1024
    encoder_layers: Positive = 12
    decoder_layers: Positive = 12
    heads: Positive = 16
    feed_forward: Positive = 4096
    dropout: Share = 0.3
    attention_dropout: Share = 0.1
    activation: Literal["relu", "gelu"] = "gelu"
    max_positions: Positive = 1024
    init_std: Annotated[float, Field(gt=0)] = 0.02

    def lengths(self, key: str, visual: int, tokens: int, generated: int) -> list[Length]:
        """Of visual tokens, whose number comes from the setting ``key``, and sentences; none if its own sizes are the
        checkpoint's."""
        wanted = ((key, visual), ("evaluation.max_new_tokens + 1", generated), ("text.max_tokens", tokens))
        fitting = [(name, length, "language_model", self.max_positions) for name, length in wanted]
        return fitting if self.pretrained is None else []


class MT5Settings(ActivationSettings):
    """An mT5 (arXiv 2010.11934), by default of mt5-base's sizes. pretrained: folder or hub name whose weights and sizes
    it takes. It is told no language, so one model writes one."""

    prompts: ClassVar[dict[str, str] | None] = {}
    architecture: Literal["mt5"]
    pretrained: str | None = None
    width: Positive = 768
    encoder_layers: Positive = 12
    decoder_layers: Positive = 12
    heads: Positive = 12
    feed_forward: Positive = 2048
    dropout: Share = 0.1

    def lengths(self, key: str, visual: int, tokens: int, generated: int) -> list[Length]:
        """Positions are relative: none is too long."""
        return []


class CausalSettings(ActivationSettings):
    """A decoder-only language model, which reads visual tokens and prompt in front of the sentence. pretrained: folder
    or hub name of any that transformers' ``AutoModelForCausalLM`` loads without code of its own; sizes and dropout come
    from there. Otherwise a Llama with random weights (init_std: as in LanguageModelSettings).

    prompts: what stands between video and sentence, by the sentence's language (BCP-47 primary subtag); a language
    without one is refused.
    """

    architecture: Literal["causal"]
    pretrained: str | None = None
    width: Positive = 896
    layers: Positive = 24
    heads: Positive = 14
    feed_forward: Positive = 4864
    attention_dropout: Share = 0.0
    max_positions: Positive = 2048
    init_std: Annotated[float, Field(gt=0)] = 0.02
    prompts: dict[Annotated[str, Field(pattern="^[a-z]{2,3}$")], str] = PROMPTS

    @model_validator(mode="after")
    def _some_prompt(self) -> CausalSettings:
        if not self.prompts:
            raise ValueError('prompts is empty; give one for each language, if need be without text, e.g. {de = ""}')
        return self

    def lengths(self, key: str, visual: int, tokens: int, generated: int) -> list[Length]:
        """As in LanguageModelSettings; visual tokens and sentence are one sequence. The prompt's length shows later."""
        wanted = ((f"{key} + evaluation.max_new_tokens + 1", generated), (f"{key} + text.max_tokens", tokens))
        fitting = [(name, visual + length, "language_model", self.max_positions) for name, length in wanted]
        return fitting if self.pretrained is None else []


def _architecture(settings: Any) -> Any:
    """Recipes may leave mBART's out."""
    if isinstance(settings, dict):
        return settings.get("architecture", DEFAULT_ARCHITECTURE)
    return getattr(settings, "architecture", DEFAULT_ARCHITECTURE)


AnyLanguageModelSettings = Annotated[
    Annotated[LanguageModelSettings, Tag("mbart")]
    | Annotated[MT5Settings, Tag("mt5")]
    | Annotated[CausalSettings, Tag("causal")],
    Discriminator(_architecture),
]
