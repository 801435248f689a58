"""Figures from log-likelihoods, for the library `evaluate`. Needs nothing of gpt2_hf, only its place.

import evaluate
choice = evaluate.load("gpt2_hf/assets/evaluate/likelihood")        # multiple choice, as HellaSwag
choice.compute(predictions=..., references=..., characters=..., tokens=...)
text = evaluate.load("gpt2_hf/assets/evaluate/likelihood", "text")  # running text
text.compute(predictions=..., references=...)
"""

import math
from typing import Any

import evaluate
from datasets import Features, Sequence, Value

INPUTS = """
Multiple choice:
    predictions: of each item the log-likelihoods of its endings, in nats
    references: of each item the number of the right ending
    characters, tokens: of each item the lengths of its endings
Running text (configuration "text"):
    predictions: the log-likelihood of each text, in nats
    references: the length of each text in UTF-8 bytes
Returns:
    acc, acc_norm (as lm-evaluation-harness) and lecture_acc (highest mean over the tokens), or bits_per_byte
"""


class Likelihood(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        number, count = Value("float64"), Value("int64")
        features = {"predictions": number, "references": count}
        if self.config_name != "text":
            lengths = {"characters": Sequence(count), "tokens": Sequence(count)}
            features = {"predictions": Sequence(number), "references": count} | lengths
        return evaluate.MetricInfo(
            description="HellaSwag's three scores, or bits per byte.",
            citation="",
            inputs_description=INPUTS,
            features=Features(features),
        )

    def _compute(
        self, predictions: list[Any], references: list[int], characters: Any = None, tokens: Any = None
    ) -> dict[str, float]:
        if self.config_name == "text":
            return {"bits_per_byte": -sum(predictions) / math.log(2) / sum(references)}
        ones = [[1] * len(scores) for scores in predictions]
        return {
            name: sum(map(_is_right, predictions, lengths, references)) / len(references)
            for name, lengths in (("acc", ones), ("acc_norm", characters), ("lecture_acc", tokens))
        }


def _is_right(loglikelihoods: list[float], lengths: list[int], right: int) -> bool:
    """Whether the right ending has the highest log-likelihood per unit of length; of equal ones the first counts."""
    scores = [loglikelihood / length for loglikelihood, length in zip(loglikelihoods, lengths, strict=True)]
    return scores.index(max(scores)) == right
