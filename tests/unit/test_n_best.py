"""The n best sentences and their scores, against the model's own log probabilities."""

import pytest
import torch
from torch import Tensor
from transformers import MBartForConditionalGeneration

from sltscale.config import LanguageModelSettings
from sltscale.errors import InputError
from sltscale.models.decoding import beam_search, n_best
from sltscale.models.language import Vocabulary
from sltscale.models.mbart import MBartCoupling, build_mbart

VOCABULARY = Vocabulary(size=40, pad_id=1, eos_id=2)
COUPLING = MBartCoupling(VOCABULARY)
OPTIONS = {"length_penalty": 0.7, "max_new_tokens": 9}


@pytest.fixture
def decoding() -> tuple[MBartForConditionalGeneration, Tensor, Tensor, Tensor]:
    """(model, inputs [4, 6, 32], mask, language ids) with weights so large that hypotheses hang on the input."""
    torch.manual_seed(0)
    settings = LanguageModelSettings(
        width=32, encoder_layers=1, decoder_layers=1, heads=4, feed_forward=48, dropout=0.0, attention_dropout=0.0
    )
    model = build_mbart(settings, VOCABULARY).eval()
    for name, parameter in model.named_parameters():
        parameter.data.mul_(16 if "encoder_attn." in name else 4)
    model.final_logits_bias[0, VOCABULARY.eos_id] = 5.0  # so that sentences end at different steps
    lengths = torch.tensor([[6], [2], [4], [1]])
    return model, torch.randn(4, 6, 32), torch.arange(6)[None] < lengths, torch.tensor([33, 34, 33, 35])


@pytest.mark.parametrize(("beams", "n"), [(1, 1), (4, 1), (4, 4), (6, 3)])
def test_scores_are_the_models_log_probabilities(
    beams: int, n: int, decoding: tuple[MBartForConditionalGeneration, Tensor, Tensor, Tensor]
) -> None:
    model, inputs, mask, languages = decoding
    found = n_best(model, COUPLING, inputs, mask, languages, beams=beams, n=n, **OPTIONS)
    best = beam_search(model, COUPLING, inputs, mask, languages, beams=beams, **OPTIONS)
    assert [row[0].ids for row in found] == best
    lengths = set()
    for row, sentences in enumerate(found):
        assert len({tuple(one.ids) for one in sentences}) == n
        assert [one.score for one in sentences] == sorted((one.score for one in sentences), reverse=True)
        for one in sentences:
            generated = [*one.ids, VOCABULARY.eos_id][: OPTIONS["max_new_tokens"]]
            lengths.add(len(generated))
            with torch.no_grad():
                logits = model(
                    inputs_embeds=inputs[row : row + 1],
                    attention_mask=mask[row : row + 1],
                    decoder_input_ids=torch.tensor([[int(languages[row]), *generated[:-1]]]),
                ).logits[0]
            steps = logits.log_softmax(-1)[range(len(generated)), generated]
            assert one.score == pytest.approx(float(steps.sum()) / len(generated) ** 0.7, abs=1e-4)
    assert len(lengths) > 2


def test_more_sentences_than_beams(decoding: tuple[MBartForConditionalGeneration, Tensor, Tensor, Tensor]) -> None:
    with pytest.raises(InputError, match="5 sentences are wanted of 4 beams"):
        n_best(decoding[0], COUPLING, *decoding[1:], beams=4, n=5, **OPTIONS)
