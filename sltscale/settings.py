"""What all settings are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


Length = tuple[str, int, str, int]
"""(settings, the longest sequence they lead to, the part of the method that reads it, its positions). Every method's
settings list theirs in ``lengths``, from the longest clip in frames, sentence and generated sentence in tokens."""


class ActivationSettings(Settings):
    """What a tower keeps for the backward. checkpoint_activations: only what goes into each of its blocks; the rest is
    computed again. offload_activations: and this in the CPU's memory."""

    checkpoint_activations: bool = False
    offload_activations: bool = False

    @model_validator(mode="after")
    def _something_to_offload(self) -> ActivationSettings:
        if self.offload_activations and not self.checkpoint_activations:
            raise ValueError("offload_activations is set without checkpoint_activations; set both")
        return self
