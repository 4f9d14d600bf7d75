"""The rules behind the answer as rows: which number, which threshold and whose, what it says and what it does not say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OURS = "our convention"
FACT = "a fact of the run"
TWIN_HALF = f"{OURS}: half of what the same architecture has with fresh weights"


@dataclass(frozen=True)
class Rule:
    """One rule: `quantity`, read off `metric`, on one side of `threshold` means what `says` says, and not `does_not_say`.

    `source` is whose threshold it is. `spoken` rules speak in a sentence of their own where they answer yes; the others
    decide together what the first sentences say.
    """

    name: str
    level: Literal["attention", "tokens", "weights", "run"]
    metric: str
    quantity: str
    threshold: float
    says: str
    does_not_say: str
    direction: Literal["above", "below"] = "above"
    source: str = OURS
    spoken: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` is on the side that the rule names; never for NaN, nor on the threshold itself."""
        return value > self.threshold if self.direction == "above" else value < self.threshold


RULES = (
    Rule(
        name="shared",
        level="attention",
        metric="attention-similarity",
        quantity="kappa with the block before (columns)",
        threshold=0.5,
        says="the block attends like the block before, token by token, beyond what other tokens' attention explains",
        does_not_say="Similar maps do not prove that a block is useless, and different maps do not prove that it is useful: "
        "values and MLPs are not compared.",
    ),
    Rule(
        name="query-independent",
        level="attention",
        metric="attention-similarity",
        quantity="wrong-token null with the block before (columns)",
        threshold=0.98,
        says="columns are alike whichever tokens are compared: every query attends alike, or nearly uniformly",
        does_not_say="Whether two blocks attend to the same tokens; the row version against its wrong-head null says that.",
    ),
    Rule(
        name="same-everywhere",
        level="attention",
        metric="attention-similarity@row",
        quantity="wrong-head null with the block before (rows)",
        threshold=0.98,
        says="all heads of both blocks attend with nearly the same row",
        does_not_say="That two blocks share more than any two heads do: nothing is left to tell that from.",
    ),
    Rule(
        name="shared-row",
        level="attention",
        metric="attention-similarity@row",
        quantity="(row similarity − wrong-head null) / (1 − wrong-head null), where maps are query-independent",
        threshold=0.5,
        says="the two blocks share one row of attention, more than different heads do",
        does_not_say="Anything about maps that depend on the query.",
    ),
    Rule(
        name="high-raw",
        level="attention",
        metric="attention-similarity",
        quantity="similarity with the block before (columns)",
        threshold=0.9,
        source=f"DeepViT (arXiv 2103.11886) sets 0.9 for a share of vectors; for the mean cosine it is {OURS}",
        says="the raw similarity is as high as that of a block counted as similar",
        does_not_say="That the network learned it: near-uniform maps score as high without training.",
    ),
    Rule(
        name="near-uniform",
        level="attention",
        metric="attention-entropy",
        quantity="entropy over log N, mean over the heads of the two blocks",
        threshold=0.9,
        says="attention is spread over nearly all tokens",
        does_not_say="That the block does nothing: small differences from uniform may matter.",
    ),
    Rule(
        name="mostly-query-independent",
        level="attention",
        metric="attention-similarity",
        quantity="share of the neighbouring pairs of blocks whose maps are query-independent without sharing their row",
        threshold=0.5,
        says="attention ignores the query in most pairs of blocks",
        does_not_say="Anything about the other pairs.",
    ),
    Rule(
        name="mostly-explained",
        level="attention",
        metric="attention-similarity",
        quantity="share of the neighbouring pairs of blocks whose high raw similarity the nulls explain",
        threshold=0.5,
        says="raw similarity is high in most pairs of blocks, but no more than chance would give",
        does_not_say="Anything about the other pairs.",
    ),
    Rule(
        name="entropy-collapse",
        level="attention",
        metric="attention-entropy",
        quantity="entropy over log N, mean over the heads of a block",
        threshold=0.1,
        direction="below",
        source=f"{OURS}; the illness is named in arXiv 2303.06296",
        says="the heads of a block attend to hardly more than one key each",
        does_not_say="That training was unstable, or that heads which attend to one key are useless.",
        spoken=True,
    ),
    Rule(
        name="parallel-patches",
        level="tokens",
        metric="patch-diversity",
        quantity="mean absolute cosine between different patches after the last block",
        threshold=0.7,
        source=f"the last layer of DeiT-Base24 as published with arXiv 2104.12753; that it is a threshold is {OURS}",
        says="the patches of an image have become nearly parallel",
        does_not_say="That attention did it: MLPs, norms and the embedding move patches as well.",
        spoken=True,
    ),
    Rule(
        name="less-diverse-than-untrained",
        level="tokens",
        metric="patch-diversity",
        quantity="patch diversity after the last block over that of the untrained twin",
        threshold=0.5,
        direction="below",
        source=TWIN_HALF,
        says="training has made the patches of an image more alike",
        does_not_say="That they are alike: a twin may start with very different patches.",
        spoken=True,
    ),
    Rule(
        name="constant-tokens",
        level="tokens",
        metric="rank-residual",
        quantity="distance of the patches from their mean after the last block, over their norm",
        threshold=0.1,
        direction="below",
        source=f"{OURS}; arXiv 2103.03404 shows the limit 0",
        says="the patches of an image have become one vector, up to a tenth",
        does_not_say="That what is left of the differences is not used.",
        spoken=True,
    ),
    Rule(
        name="constant-tokens-composite",
        level="tokens",
        metric="rank-residual@composite@all",
        quantity="distance of all tokens from their mean after the last block, over their norm (composite norm)",
        threshold=0.1,
        direction="below",
        source=f"{OURS}; arXiv 2103.03404 shows the limit 0",
        says="the tokens of an image have become one vector, up to a tenth",
        does_not_say="That what is left of the differences is not used.",
        spoken=True,
    ),
    Rule(
        name="less-high-frequency-than-untrained",
        level="tokens",
        metric="token-frequency@all",
        quantity="‖HC‖/‖DC‖ after the last block over that of the untrained twin",
        threshold=0.5,
        direction="below",
        source=TWIN_HALF,
        says="training has made the tokens' mean outweigh their differences",
        does_not_say="That attention is the filter: MLPs and norms move the mean as well.",
        spoken=True,
    ),
    Rule(
        name="lower-rank-than-untrained",
        level="tokens",
        metric="token-rank",
        quantity="effective rank of the patches after the last block over that of the untrained twin",
        threshold=0.5,
        direction="below",
        source=TWIN_HALF,
        says="training has left the patches of an image fewer directions",
        does_not_say="That directions are missing: a network may need few, and a few long tokens lower the rank by themselves.",
        spoken=True,
    ),
    Rule(
        name="outlier-tokens",
        level="tokens",
        metric="token-norm@outliers",
        quantity="share of patches longer than their image's median + 6 MAD after the last block, less the untrained twin's",
        threshold=0.01,
        source=f"{OURS}; 0.0237 above a norm of 150 is published for DINOv2 ViT-g/14 (arXiv 2309.16588)",
        says="training has made some patches far longer than the rest",
        does_not_say="That they hold global information, or that registers would remove them.",
        spoken=True,
    ),
    Rule(
        name="norm-above-150",
        level="tokens",
        metric="token-norm@150",
        quantity="share of patches with a norm above 150 after the last block",
        threshold=0.01,
        source=f"norm 150: arXiv 2309.16588, by hand for DINOv2; that 1 % of the patches is enough is {OURS}",
        says="some patches are longer than 150",
        does_not_say="Anything about models with another scale than DINOv2's.",
        spoken=True,
    ),
    Rule(
        name="weights-lost-rank",
        level="weights",
        metric="weight-rank",
        quantity="effective rank of a block's matrices over that of the untrained twin (mean over matrices)",
        threshold=0.5,
        direction="below",
        source=TWIN_HALF,
        says="training has left the weight matrices of a block fewer directions",
        does_not_say="That the block could be smaller without loss.",
        spoken=True,
    ),
    Rule(
        name="rows-more-alike",
        level="weights",
        metric="weight-similarity",
        quantity="mean absolute cosine between rows of a block's matrices over that of the untrained twin (mean over matrices)",
        threshold=2.0,
        source=f"{OURS}: twice what the same architecture has with fresh weights",
        says="training has made the neurons of a block's matrices more alike",
        does_not_say="That neurons are redundant: a mean over pairs hides which are.",
        spoken=True,
    ),
    Rule(
        name="untrained",
        level="run",
        metric="",
        quantity="1 where the model's weights are random, else 0",
        threshold=0.5,
        source=FACT,
        says="the model is untrained: these numbers describe its architecture and initialisation, not anything learned",
        does_not_say="What training would change.",
    ),
    Rule(
        name="mixed-maps",
        level="run",
        metric="",
        quantity="1 where the model changes its maps after the softmax, else 0",
        threshold=0.5,
        source=FACT,
        says="this model changes its maps after the softmax. The similarity is that of the changed maps, which multiply V "
        "(weights); the softmax itself (the @probs metrics) may be more or less alike",
        does_not_say="Which of the two matters.",
    ),
)
BY_NAME = {rule.name: rule for rule in RULES}

RAW_ABOVE = BY_NAME["high-raw"].threshold  # a block counts as similar to the one before where the mean cosine is above this
KAPPA_ABOVE = BY_NAME["shared"].threshold  # the same, corrected for chance
COUNT_THRESHOLDS = (0.8, RAW_ABOVE, 0.95)  # the mean cosines above which similar-blocks counts

# Conventions of comparisons, interventions and the demonstration; all are ours.
NOTABLE = 0.1  # a difference of similarity, or of kappa, that a sentence names
FALSE_DISCOVERY_RATE = 0.05  # over the blocks of a metric, at which a difference counts
OF_ARCHITECTURE = 0.5  # share of a contrast that untrained twins show as well, from which on it is the architecture's
KEEPS_ANSWERS = 0.95  # share of unchanged top answers from which on a replacement costs little
MOST_BLOCKS = 0.5  # share of the blocks
CONTROL_COLLAPSED = 0.9  # of the positive control: κ, and with Re-attention the raw cosine at the softmax
CONTROL_MIXED = 0.1  # of the positive control with Re-attention: the raw cosine after the mixing, at most
SHARES_ATTENTION = 0.35  # κ of the ordinary ViT from which on its blocks share attention
