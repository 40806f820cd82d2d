"""The same work as GFSLT-VLP's code does it (zhoubenjia/GFSLT-VLP@91ba953), for the ratio in bench_train.py.

The weights and the transformers' blocks are those of our method; what is done with them is plain torch: frames come as
normalised float32 in NCHW with the copies at the clips' ends, batch norm and temporal convolutions run over sequences
padded with 1.0, one torch SGD updates everything in float32. With ``edge_copies frames`` and ``norm_over padded`` our
method computes the same losses.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltscale.config import OptimSettings
from sltscale.errors import InputError
from sltscale.methods.base import Method
from sltscale.methods.gfslt import GFSLT
from sltscale.methods.gfslt_vlp import GFSLTVLP
from sltscale.models.decoding import beam_search
from sltscale.models.frames import yuv_to_rgb
from sltscale.models.mbart import teacher_forcing
from sltscale.models.packed_temporal import PAD_VALUE, edge_copies
from sltscale.structures import Ragged, TextBatch


class Baseline:
    """InputError for a method that is not GFSLT-VLP's or has parts that its release has not."""

    def __init__(self, method: Method, optim: OptimSettings) -> None:
        if not isinstance(method, GFSLT | GFSLTVLP) or "masked_lm" in method.weights:
            raise InputError(
                "there is a baseline for gfslt_vlp without masked sentences and for gfslt; take one of them"
            )
        self.method = method
        self.visual = cast(Any, method.visual)
        for module in self.visual.frames.resnet.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = True  # as torchvision's
        self.optimizer = torch.optim.SGD(
            method.parameters(), lr=optim.lr, momentum=0.9, nesterov=True, weight_decay=optim.weight_decay
        )

    def images(self, frames: Ragged) -> tuple[Tensor, list[int]]:
        """What its loader hands over: float32 [sum L', 3, H, W] and the lengths L'."""
        copied = edge_copies(frames)
        encoder = self.visual.frames
        pixels = yuv_to_rgb(copied.values).mul_(encoder.scale).add_(encoder.shift)
        return pixels.contiguous(), copied.lengths.tolist()

    def step(self, images: Tensor, lengths: list[int], text: TextBatch) -> float:
        loss = self._loss(images, lengths, text)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def _loss(self, images: Tensor, lengths: list[int], text: TextBatch) -> Tensor:
        method = self.method
        tokens, mask = self._tokens(images, lengths)
        if isinstance(method, GFSLT):
            decoder_ids, labels = teacher_forcing(text, method.coupling.vocabulary)
            logits = method.language_model(
                inputs_embeds=tokens, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False
            ).logits
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=method.label_smoothing)
        first = method.visual.class_token.expand(len(tokens), 1, -1)
        encoded = method.visual.transformer(torch.cat([first, tokens], 1), F.pad(mask, (1, 0), value=True))
        video = F.normalize(method.video_head(encoded[:, 0]), dim=-1)
        hidden = method.text_encoder(text.input_ids, text.attention_mask)
        sentence = F.normalize(hidden[torch.arange(len(hidden)), text.attention_mask.sum(1) - 1], dim=-1)
        logits = method.logit_scale() * video @ sentence.T
        target = (10 * torch.eye(len(logits), device=logits.device)).softmax(1)
        both = [F.kl_div(z.log_softmax(1), target, reduction="batchmean") for z in (logits, logits.T)]
        return (both[0] + both[1]) / 2

    def _tokens(self, images: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Visual tokens [B, M, D], of which those behind a clip's end are computed too, and their mask."""
        visual = self.visual
        features = visual.frames.resnet(images).pooler_output.flatten(1)
        padded = nn.utils.rnn.pad_sequence(list(features.split(lengths)), batch_first=True, padding_value=PAD_VALUE)
        steps = padded.transpose(1, 2)
        for block in (visual.temporal.first, visual.temporal.second):
            steps = F.max_pool1d(F.relu(block.norm(block.conv(steps))), 2)
        tokens = steps.transpose(1, 2)
        embedding = visual.temporal.sign_embedding
        if embedding is not None:
            tokens = F.relu(embedding.norm(embedding.linear(tokens).transpose(1, 2))).transpose(1, 2)
        counts = torch.tensor([((length - 4) // 2 - 4) // 2 for length in lengths], device=tokens.device)
        return tokens, torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]

    @torch.no_grad()
    def translate(
        self, images: Tensor, lengths: list[int], language_ids: Tensor, beams: int, max_new_tokens: int
    ) -> list[list[int]]:
        tokens, mask = self._tokens(images, lengths)
        method = cast(Any, self.method)
        return beam_search(
            method.language_model,
            method.coupling,
            tokens,
            mask,
            language_ids,
            beams=beams,
            length_penalty=1.0,
            max_new_tokens=max_new_tokens,
        )
