"""Texts in, a word n-gram model of them out: interpolated Kneser-Ney, in the ARPA format that KenLM reads.

Kneser and Ney (1995), interpolated as in Chen and Goodman (1999): the highest order counts how often words follow each
other, the lower orders in how many different places (but for what begins a sentence, which nothing precedes), and each
order gives a discount D = n1 / (n1 + 2 n2) of every count to the order below, the lowest to all words alike. It is here
because the estimator of KenLM is a program to be built, and other kept packages write no ARPA file.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from math import log10
from typing import NamedTuple

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
Gram = tuple[str, ...]


class NGrams(NamedTuple):
    """Probabilities of the n-grams that were seen, and what the others get of the order below."""

    order: int
    probabilities: dict[Gram, float]
    """P(last word | the words before it)."""
    backoff: dict[Gram, float]
    """Of a context: what it leaves to the order below. 1 of a context that was never seen."""

    def probability(self, context: Gram, word: str) -> float:
        """P(word | context), whatever they are."""
        context = context[max(0, len(context) - self.order + 1) :]
        if (*context, word) in self.probabilities:
            return self.probabilities[*context, word]
        if not context:
            return self.probabilities[UNKNOWN,]
        return self.backoff.get(context, 1.0) * self.probability(context[1:], word)


def estimate(texts: Sequence[str], order: int) -> NGrams:
    """The model of some texts, whose words are apart by white space."""
    raw = counts(texts, order)
    probabilities: dict[Gram, float] = {}
    backoff: dict[Gram, float] = {}
    words = {END, UNKNOWN}.union(*(text.split() for text in texts))
    for size in range(1, order + 1):
        adjusted = raw[size] if size == order else continuations(raw[size], raw[size + 1])
        if size == 1:
            del adjusted[BEGIN,]  # it is given, never predicted
        discount = discount_of(adjusted.values())
        total, kinds = Counter[Gram](), Counter[Gram]()
        for gram, count in adjusted.items():
            total[gram[:-1]] += count
            kinds[gram[:-1]] += 1
        left = {context: discount * kinds[context] / total[context] for context in total}
        for gram in adjusted if size > 1 else [(word,) for word in words]:
            context, word = gram[:-1], gram[-1]
            lower = probabilities[*context[1:], word] if size > 1 else 1 / len(words)
            kept = max(adjusted[gram] - discount, 0) if gram in adjusted else 0
            probabilities[gram] = kept / total[context] + left[context] * lower
        if size > 1:
            backoff |= left
    return NGrams(order, probabilities, backoff)


def counts(texts: Iterable[str], order: int) -> dict[int, Counter[Gram]]:
    """How often every n-gram of every size is there, between the marks of a sentence."""
    seen: dict[int, Counter[Gram]] = defaultdict(Counter)
    for text in texts:
        sentence = (BEGIN, *text.split(), END)
        for size in range(1, order + 1):
            seen[size].update(sentence[at : at + size] for at in range(len(sentence) - size + 1))
    return seen


def continuations(grams: Counter[Gram], longer: Counter[Gram]) -> Counter[Gram]:
    """After how many different words each n-gram is seen; what begins a sentence keeps its count."""
    found = Counter(gram[1:] for gram in longer)
    found.update({gram: count for gram, count in grams.items() if gram[0] == BEGIN})
    return found


def discount_of(values: Iterable[int]) -> float:
    """n1 / (n1 + 2 n2) of the counts that are one and two; a half where the texts are too few for one of them."""
    sizes = Counter(values)
    return sizes[1] / (sizes[1] + 2 * sizes[2]) if sizes[1] and sizes[2] else 0.5


def arpa(model: NGrams) -> str:
    """The model as an ARPA file: logarithms to the base 10 of probabilities and of what is left to the order below."""
    grams = {size: sorted(g for g in model.probabilities if len(g) == size) for size in range(1, model.order + 1)}
    grams[1] = sorted([*grams[1], (BEGIN,)])
    lines = ["\\data\\", *(f"ngram {size}={len(some)}" for size, some in grams.items()), ""]
    for size, some in grams.items():
        lines.append(f"\\{size}-grams:")
        for gram in some:
            chance = log10(model.probabilities[gram]) if gram in model.probabilities else -99.0
            rest = f"\t{log10(model.backoff[gram]):.7f}" if gram in model.backoff else ""
            lines.append(f"{chance:.7f}\t{' '.join(gram)}{rest}")
        lines.append("")
    return "\n".join([*lines, "\\end\\", ""])
