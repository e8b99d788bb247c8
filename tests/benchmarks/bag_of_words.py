"""The simplest reward model: logistic regression on the words of the two answers (Bradley-Terry on
counts). What a trained one must beat."""

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[str, str]
"""The chosen answer and the rejected one."""
PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3)
FOLDS = 5


def words(text: str) -> list[str]:
    """Lower-case words and marks."""
    return re.findall(r"[a-z']+|[^\sa-z]", text.lower())


class BagOfWords:
    """Scores a text by the sum of its words' weights, log(1 + count) each."""

    def __init__(self, train: Sequence[Pair], penalty: float, least: int = 3) -> None:
        counts = Counter(word for pair in train for text in pair for word in set(words(text)))
        known = sorted(word for word, count in counts.items() if count >= least)
        self.places = {word: place for place, word in enumerate(known)}
        features_NF = self.features([a for a, _ in train]) - self.features([b for _, b in train])
        self.weights_F = fitted(features_NF, penalty)

    def features(self, texts: Sequence[str]) -> Tensor:
        """log(1 + count) of each known word, [texts, words]."""
        found = torch.zeros(len(texts), len(self.places))
        for row, text in zip(found, texts, strict=True):
            for word, count in Counter(words(text)).items():
                if word in self.places:
                    row[self.places[word]] = count
        return found.log1p()

    def accuracy(self, pairs: Sequence[Pair]) -> float:
        """How often the chosen answer scores higher; a tie is half."""
        chosen, rejected = (self.features([pair[i] for pair in pairs]) for i in (0, 1))
        gaps = (chosen - rejected) @ self.weights_F
        return float(((gaps > 0).float() + 0.5 * (gaps == 0).float()).mean())


def fitted(features_NF: Tensor, penalty: float, steps: int = 60) -> Tensor:
    """Weights [F] that minimise the mean of -log sigmoid(x w) + penalty / 2 |w|^2."""
    weights = torch.zeros(features_NF.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -torch.nn.functional.logsigmoid(features_NF @ weights).mean()
        value = value + penalty / 2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def best_penalty(train: Sequence[Pair]) -> float:
    """The penalty that does best on parts of the training pairs which it was not fitted to."""

    def score(penalty: float) -> float:
        total = 0.0
        for fold in range(FOLDS):
            rest = [pair for i, pair in enumerate(train) if i % FOLDS != fold]
            model = BagOfWords(rest, penalty)
            total += model.accuracy(train[fold::FOLDS])
        return total / FOLDS

    return max(PENALTIES, key=score)
