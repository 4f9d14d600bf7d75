"""The rules behind the answer as rows: which number, which threshold and whose, what it says and what it does not say."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from collapse_probe.statistics.pair_tests import FEWEST_IMAGES as FEWEST_IMAGES  # below it nothing is judged of maps or tokens

ROWS = "attention-similarity@row"
OURS = "our convention"
FACT = "a fact of the run"
TWIN_HALF = f"{OURS}: half of what the same architecture has with fresh parameters"


@dataclass(frozen=True)
class Rule:
    """One rule: `quantity`, read off `metric`, on one side of `threshold` means what `says` says, and not `does_not_say`.

    `source` is whose threshold it is. `spoken` rules speak in a sentence of their own where they answer yes; the others
    decide together what the first sentences say.
    """

    name: str
    metric: str
    quantity: str
    says: str
    does_not_say: str
    threshold: float
    level: Literal["attention", "tokens", "weights", "run"] = "attention"
    direction: Literal["above", "below"] = "above"
    source: str = OURS
    spoken: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` is on the side that the rule names; never for NaN, nor on the threshold itself."""
        return value > self.threshold if self.direction == "above" else value < self.threshold


_tokens = partial(Rule, level="tokens", spoken=True)
_half_of_twin = partial(_tokens, threshold=0.5, direction="below", source=TWIN_HALF)
_fact = partial(Rule, threshold=0.5, level="run", source=FACT)
RULES = (
    Rule(
        "shared",
        "attention-similarity",
        "kappa with the block before (columns)",
        "the block attends like the block before, token by token, beyond what other tokens' attention explains",
        "Similar maps do not prove that a block is useless, and different maps do not prove that it is useful: "
        "values and MLPs are not compared.",
        0.5,
    ),
    Rule(
        "shared-row",
        ROWS,
        "(row similarity − level of other heads) / (1 − level of other heads)",
        "the two blocks share where each head attends, beyond what different heads share",
        "That tokens matter: rows may agree although they hardly depend on the query.",
        0.5,
    ),
    Rule(
        "same-row",
        ROWS,
        "(row similarity − level of other keys) / (1 − level of other keys), where neither queries nor heads differ",
        "every query of every head attends with the same row in both blocks",
        "That heads or tokens have anything of their own to share: nothing is left to tell that from.",
        0.5,
    ),
    Rule(
        "other-order",
        ROWS,
        "(row similarity − that of other heads) / (1 − that of other heads), heads paired as they are most alike",
        "the two blocks have the same maps under other head numbers",
        "That no heads are alike where it does not hold: heads paired as they are most alike agree somewhat in any maps.",
        0.9,
    ),
    Rule(
        "beyond-untrained",
        "attention-similarity",
        "(share − that of untrained copies) / (1 − that of untrained copies), in pairs that share their attention",
        "the two blocks share more than blocks of untrained copies do",
        "Whether training or its starting point did it.",
        0.5,
        source=f"{OURS}: half of what untrained copies leave",
    ),
    Rule(
        "columns-alike",
        "attention-similarity",
        "chance level with the block before (columns)",
        "columns are alike whichever tokens are compared, so that rows alone can tell whether blocks share them",
        "Whether two blocks attend to the same tokens.",
        0.9,
    ),
    Rule(
        "query-independent",
        ROWS,
        "cosine between the rows of different queries, the lower of the two blocks'",
        "every query attends alike, or nearly uniformly",
        "Whether two blocks attend to the same tokens; the rows against their level of other heads say that.",
        0.98,
    ),
    Rule(
        "same-everywhere",
        ROWS,
        "level of other heads with the block before (rows)",
        "all heads of both blocks attend with nearly the same row",
        "That two blocks share more than any two heads do: the rows against their level of other keys say that.",
        0.98,
    ),
    Rule(
        "high-raw",
        "attention-similarity",
        "similarity with the block before (columns)",
        "the raw similarity is as high as that of a block counted as similar",
        "That the network learned it: near-uniform maps score as high without training.",
        0.9,
        source=f"DeepViT (arXiv 2103.11886) sets 0.9 for a share of vectors; for the mean cosine it is {OURS}",
    ),
    Rule(
        "near-uniform",
        "attention-entropy",
        "entropy over log N, mean over the heads of the two blocks",
        "attention is spread over nearly all tokens",
        "That the block does nothing: small differences from uniform may matter.",
        0.9,
    ),
    Rule(
        "mostly-query-independent",
        "attention-similarity",
        "share of the neighbouring pairs of blocks whose maps are query-independent without sharing their row",
        "attention ignores the query in most pairs of blocks",
        "Anything about the other pairs.",
        0.5,
    ),
    Rule(
        "mostly-explained",
        "attention-similarity",
        "share of the neighbouring pairs of blocks whose high raw similarity the chance levels explain",
        "raw similarity is high in most pairs of blocks, but no more than chance would give",
        "Anything about the other pairs.",
        0.5,
    ),
    Rule(
        "entropy-collapse",
        "attention-entropy",
        "entropy over log N, mean over the heads of a block",
        "the heads of a block attend to hardly more than one key each",
        "That training was unstable, or that heads which attend to one key are useless.",
        0.1,
        direction="below",
        source=f"{OURS}; the failure type is named in arXiv 2303.06296",
        spoken=True,
    ),
    _tokens(
        "parallel-patches",
        "patch-diversity",
        "mean absolute cosine between different patches after the last block",
        "the patches of an image have become nearly parallel",
        "That attention did it: MLPs, norms and the embedding move patches as well.",
        0.7,
        source=f"the last layer of DeiT-Base24 as published with arXiv 2104.12753; that it is a threshold is {OURS}",
    ),
    _half_of_twin(
        "less-diverse-than-untrained",
        "patch-diversity",
        "patch diversity after the last block over that of the untrained copy",
        "training has made the patches of an image more alike",
        "That they are alike: a copy may start with very different patches.",
    ),
    _tokens(
        "constant-tokens",
        "rank-residual",
        "distance of the patches from their mean after the last block, over their norm",
        "the patches of an image have become one vector, up to a tenth",
        "That what is left of the differences is not used.",
        0.1,
        direction="below",
        source=f"{OURS}; arXiv 2103.03404 shows the limit 0",
    ),
    _tokens(
        "constant-tokens-composite",
        "rank-residual@composite@all",
        "distance of all tokens from their mean after the last block, over their norm (composite norm)",
        "the tokens of an image have become one vector, up to a tenth",
        "That what is left of the differences is not used.",
        0.1,
        direction="below",
        source=f"{OURS}; arXiv 2103.03404 shows the limit 0",
    ),
    _half_of_twin(
        "less-high-frequency-than-untrained",
        "token-frequency@all",
        "‖HC‖/‖DC‖ after the last block over that of the untrained copy",
        "training has made the tokens' mean outweigh their differences",
        "That attention is the filter: MLPs and norms move the mean as well.",
    ),
    _half_of_twin(
        "lower-rank-than-untrained",
        "token-rank",
        "effective rank of the patches after the last block over that of the untrained copy",
        "training has left the patches of an image fewer directions",
        "That directions are missing: a network may need few, and a few long tokens lower the rank by themselves.",
    ),
    _tokens(
        "outlier-tokens",
        "token-norm@outliers",
        "share of patches longer than their image's median + 6 MAD after the last block, less the untrained copy's",
        "training has made some patches far longer than the rest",
        "That they hold global information, or that registers would remove them.",
        0.01,
        source=f"{OURS}; 0.0237 above a norm of 150 is published for DINOv2 ViT-g/14 (arXiv 2309.16588)",
    ),
    _tokens(
        "norm-above-150",
        "token-norm@150",
        "share of patches with a norm above 150 after the last block",
        "some patches are longer than 150",
        "Anything about models with another scale than DINOv2's.",
        0.01,
        source=f"norm 150: arXiv 2309.16588, by hand for DINOv2; that 1 % of the patches is enough is {OURS}",
    ),
    _tokens(
        "massive-activations",
        "massive-activations",
        "largest absolute activation of a depth over the median one, less the untrained copy's",
        "training has made single activations a thousand times as large as the median one",
        "That the model needs them; cosines and CKA at these depths may be those of one channel.",
        1000.0,
        source=f"1,000 times the median is told of arXiv 2402.17762 by others; that it is a threshold is {OURS}",
    ),
    Rule(
        "heads-switched-off",
        "sink-kind@no-op",
        "share of images in which a head has a no-op sink, mean over a block's heads, less the untrained copy's",
        "most heads of a block are switched off in most images: they attend to one token that has almost no value",
        "That the heads are useless: in other images they may work.",
        0.5,
        source=f"no-op: arXiv 2606.08105 and its code; that half of the heads and images is enough is {OURS}",
        spoken=True,
    ),
    Rule(
        "one-value-for-all",
        "sink-kind@broadcast",
        "share of images in which a head has a broadcast sink, mean over a block's heads, less the untrained copy's",
        "most heads of a block write one token's value to all tokens, in most images",
        "That this makes the tokens alike: what the heads write is added to what is there.",
        0.5,
        source=f"broadcast: arXiv 2606.08105 and its code; that half of the heads and images is enough is {OURS}",
        spoken=True,
    ),
    _half_of_twin(
        "weights-lost-rank",
        "weight-rank",
        "effective rank of a block's matrices over that of the untrained copy (mean over matrices)",
        "training has left the weight matrices of a block fewer directions",
        "That the block could be smaller without loss.",
        level="weights",
    ),
    Rule(
        "rows-more-alike",
        "weight-similarity",
        "mean absolute cosine between rows of a block's matrices over that of the untrained copy (mean over matrices)",
        "training has made the neurons of a block's matrices more alike",
        "That neurons are redundant: a mean over pairs hides which are.",
        2.0,
        level="weights",
        source=f"{OURS}: twice what the same architecture has with fresh parameters",
        spoken=True,
    ),
    _fact(
        "untrained",
        "",
        "1 where the model's parameters are random, else 0",
        "the model is untrained: these numbers describe its architecture and initialisation, not anything learned",
        "What training would change.",
    ),
    _fact(
        "loaded-in-part",
        "",
        "1 where blocks hold parameters that are not the checkpoint's, else 0",
        "the checkpoint lacks parameters of some blocks: theirs are from elsewhere",
        "That the other blocks work as they did in the model that was saved.",
    ),
    _fact(
        "mixed-maps",
        "",
        "1 where the model changes its maps after the softmax, else 0",
        "this model changes its maps after the softmax. The similarity is that of the final maps, which multiply the "
        "values; its softmax maps (the @probs metrics) may be more or less alike",
        "Which of the two matters.",
    ),
)
BY_NAME = {rule.name: rule for rule in RULES}

RAW_ABOVE = BY_NAME["high-raw"].threshold  # a block counts as similar to the one before where the mean cosine is above this
KAPPA_ABOVE = BY_NAME["shared"].threshold  # the same, corrected for chance
COUNT_THRESHOLDS = (0.8, RAW_ABOVE, 0.95)  # the mean cosines above which similar-blocks counts

BEYOND_WEIGHTS = 4.0  # how many times the root mean square of a model's negative shares a share must exceed (Fisher's z)

# Conventions of comparisons, interventions and the demonstration; all are ours.
NOTABLE = 0.1  # a difference of similarity, or of kappa, that a sentence names
FALSE_DISCOVERY_RATE = 0.05  # over the blocks of a metric, at which a difference counts
OF_ARCHITECTURE = 0.5  # share of a contrast that untrained copies show as well, from which on it is the architecture's
ROUNDING = 1e-5
"""A model whose logits vary less than this over the images, as a share of the largest, gives the same output for all."""
SETTLES = 0.975  # half of what KEEPS_ANSWERS allows to be lost, so that other images are likely to bear it out
KEEPS_ANSWERS = 0.95  # share of unchanged top answers from which on a replacement costs little
MOST_BLOCKS = 0.5  # share of the blocks
CONTROL_COLLAPSED = 0.9  # of the positive control: κ, and with Re-attention the raw cosine at the softmax
CONTROL_MIXED = 0.1  # of the positive control with Re-attention: the raw cosine after the mixing, at most
SHARES_ATTENTION = 0.35  # κ of the ordinary ViT from which on its blocks share attention
