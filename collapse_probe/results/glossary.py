"""The words that pages, terminal and documentation use for one thing each, in one or two plain sentences."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """One word: how it is written (`word`), other spellings that mean it (`also`), and what it means."""

    word: str
    means: str
    also: tuple[str, ...] = ()

    @property
    def anchor(self) -> str:
        """Its address on a page.

        >>> Term("95 % CI", "").anchor, Term("κ (kappa)", "").anchor
        ('word-95-ci', 'word-kappa')
        """
        letters = self.word.lower().replace("κ (kappa)", "kappa").partition(" (")[0]
        return "word-" + re.sub(r"[^a-z0-9]+", "-", letters).strip("-")


GLOSSARY = (
    Term(
        "κ (kappa)",
        "How much of the possible agreement beyond chance is reached: 0 is no more than chance, 1 is identical maps. "
        "It is (similarity − chance level) / (1 − chance level), and undefined where the chance level is 1.",
        ("κ", "kappa"),
    ),
    Term(
        "chance level (other tokens)",
        "What the same similarity would be if the tokens of the second block were swapped at random: agreement that needs "
        "no token to be treated alike. A similarity at its chance level is no sign of collapse.",
        ("chance level",),
    ),
    Term(
        "untrained copy",
        "The same architecture with fresh parameters drawn at random, measured on the same images in the same run. What it "
        "shows as well comes with the architecture, not with training.",
        ("untrained copies",),
    ),
    Term(
        "raw similarity",
        "The mean cosine between the attention of the same head and token in two blocks, from 0 to 1 for maps without "
        "negative entries. It is near 1 for nearly uniform maps too, so it is read against the chance level.",
    ),
    Term(
        "adjacent pair",
        "A block and the block right before it. Pairs of different token counts or windows are not compared.",
        ("adjacent pairs",),
    ),
    Term(
        "similar block",
        "A block whose similarity with the block before is above a threshold: raw similarity above 0.9, or κ above 0.5.",
        ("similar blocks",),
    ),
    Term(
        "prefix token",
        "A token that stands for no patch of the image: CLS, distillation and register tokens.",
        ("prefix tokens",),
    ),
    Term(
        "softmax map / final map",
        "The softmax map is the attention that softmax gives; the final map is what multiplies the values. They are the same "
        "unless the model mixes its maps after the softmax, as Re-attention and talking heads do.",
        ("softmax map", "softmax maps", "final map", "final maps"),
    ),
    Term(
        "patch diversity",
        "One minus the mean absolute cosine between different patches of one image: near 0 all patches have become alike, "
        "near 1 they point in different directions.",
    ),
    Term(
        "attention entropy",
        "How widely a query spreads its attention, in nats. As a share of log N, for N keys, 1 is uniform attention and 0 is a "
        "single key.",
        ("entropy",),
    ),
    Term(
        "95 % CI",
        "A range that holds the value for all images like these in about 95 of 100 such runs. It covers the choice of images, "
        "not that of the training run.",
    ),
    Term(
        "q (false discovery rate)",
        "A p-value corrected for many tests at once: among the findings with q up to 0.05, about one in twenty at most is "
        "expected to be chance.",
        ("q",),
    ),
    Term(
        "sign-flip test",
        "Tests whether a mean difference over images is 0: if it were, plus and minus would be interchangeable, so the signs "
        "are flipped at random and the result compared.",
        ("sign flips",),
    ),
    Term(
        "effective rank",
        "How many directions a matrix really uses: the exponential of the entropy of its singular values' shares. 1 means "
        "that all rows are multiples of one another.",
    ),
    Term(
        "CKA",
        "Centred kernel alignment: how alike two layers arrange the images, whatever the axes that they use. 1 is the same "
        "arrangement up to rotation and scale.",
    ),
)
