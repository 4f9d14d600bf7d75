"""What each figure shows, and what it does not say."""

from __future__ import annotations

from collapse_probe.report.html import Caption

TESTED_PAIRS = Caption(
    "",
    "Below the diagonal a dot marks the pairs that are more alike than with the wrong tokens (q ≤ {level:g}: {test}, false "
    "discoveries controlled over all pairs of blocks), here {significant} of {tested}.",
    "A dot says that a pair agrees on more than chance would give, however little: how much, κ says. No dot is no proof of "
    "κ = 0: more images find more pairs.",
)
"""What the dots on the κ panel add to the caption of a similarity whose pairs of blocks were tested."""

CAPTIONS: dict[str, Caption] = {
    "attention-similarity": Caption(
        "How alike the attention maps of two blocks are",
        "Raw: the mean cosine between the attention vectors of the same head and token in two blocks. "
        "Null-corrected: κ, the share of the room above the other-token null that it fills: 1 is the same "
        "map, 0 is as alike as maps of unrelated tokens. Both scales are fixed, so that pages of two "
        "models can be laid side by side.",
        "A dark raw panel alone is no collapse. Near-uniform maps, and maps in which every query looks at "
        "the same keys, have a raw cosine near 1 whatever they attend to; only κ and the other readings "
        "below tell these apart.",
    ),
    "attention-adjacent": Caption(
        "Each block compared with the one before",
        "Above: the measured similarity with its 95 % interval over images, and what it would be with "
        "nothing to find: another token, another image, another head, and the same architecture with "
        "fresh weights. Dotted lines are the thresholds at which blocks are counted as similar. Beneath: "
        "κ on the same blocks.",
        "The interval covers the choice of images, not the training run: another seed may differ by more. "
        "A line at its null says that the number is explained without the two blocks agreeing on "
        "anything.",
    ),
    "similar-blocks": Caption(
        "How many blocks count as similar",
        "Adjacent pairs whose mean similarity passes each threshold, with 95 % intervals over "
        "images; in the last row, pairs whose κ passes 0.5.",
        "A count depends on its threshold, and a network with random weights can pass all of them; the "
        "raw rows are meant for comparison with published counts.",
    ),
    "attention-gallery": Caption(
        "Where each block looks",
        "First the picture as the model sees it, then the map of every block laid over it, numbered from "
        "0. Blue patches get less attention than a uniform map would pay, orange and red ones more; where "
        "the picture stays grey, attention is close to uniform. All maps share one scale.",
        "A map is a mean over heads and queries and can look flat although single heads are sharp. What "
        "is attended to is not thereby what decides the output.",
    ),
    "rollout-gallery": Caption(
        "Attention rollout over the picture",
        "What has come from each patch up to every block when the maps of all blocks before are multiplied, skip connections "
        "counted as identity and heads averaged (Abnar & Zuidema): the first block's tile holds one map, the last one's the "
        "product of all. Scale and order as in the gallery of single blocks.",
        "Rollout ignores values and MLPs, and evens out with depth in every network. It does not show what the decision "
        "rests on.",
    ),
    "token-norm-places": Caption(
        "Where the tokens of unusual length sit",
        "For each depth the share of images in which the patch at that place is an outlier by its norm, and above each map "
        "the share of all patch tokens that are. One scale for all maps.",
        "The rule compares a token with the others of its image and depth: a heavy tail of ordinary lengths gives outliers "
        "too, with random weights as well.",
    ),
    "attention-variants": Caption(
        "The same comparison, read in other ways",
        "Rows compare where one query looks; the default compares columns, how one key is looked at by "
        "all queries. Centred takes the mean off each vector first, which removes what uniform attention "
        "contributes.",
        "No reading is the true one. Where they disagree, the similarity is of the kind that only one of "
        "them sees: high by columns and low by rows, for instance, is what query-independent maps give.",
    ),
    "probs-and-weights": Caption(
        "What softmax gives, and what multiplies the values",
        "This model changes its map between the softmax and the values. probs is the softmax, weights is "
        "what is used; both are on one scale.",
        "A lower similarity of the weights can come from the mixing itself, also with random weights; it "
        "does not show that the softmax has become more diverse.",
    ),
    "attention-entropy": Caption(
        "How spread out each head attends",
        "Entropy of the attention of every head as a share of log N, where N is the number of keys: 1 is "
        "uniform, 0 is a single key. Beneath, the mean over heads with its interval, the single heads as "
        "dots, and the untrained twin.",
        "High entropy is not collapse by itself, yet it makes raw similarities high; low entropy says how "
        "sharp a head is, not whether it looks at the right place.",
    ),
    "per-block": Caption(
        "Heads, images and patches",
        "How alike the heads of one block are, how alike a block's maps are for different images (near 1: "
        "attention ignores the picture), and how different the patches of one image remain through depth, "
        "each where measured and with its references.",
        "These are different illnesses: patches can grow alike while attention stays diverse, and the other way round.",
    ),
    "feature-similarity": Caption(
        "How alike the patch embeddings at two depths are",
        "Cosine of the embeddings of the same patch at two depths, raw and null-corrected; depth 0 is "
        "what enters the first block.",
        "The residual stream carries each embedding on, so neighbouring depths are close to 1 in nearly "
        "every deep network, healthy or not.",
    ),
    "convergence": Caption(
        "How the headline numbers settle as images come in",
        "Value and 95 % interval over the first images of a seeded shuffle, on a logarithmic axis. Dotted: the value over all "
        "images; the grey band is the tolerance that the number is held against. The scale follows each number.",
        "A curve that has settled has settled for images like these, not for other data. The points share images, so that "
        "the curve is smoother than as many independent samples would be.",
    ),
    "weights": Caption(
        "How redundant the weights of each block are",
        "For the query, key, value and projection matrices and the two layers of the MLP: mean |cosine| between the "
        "rows, effective rank as a share of the full one, the spread of the eigenvalues of W Wᵀ, and how crowded the "
        "rows are on the sphere. Dashed lines of the same colour are the same matrices before training.",
        "Weights are one sample of themselves, so there is no interval. A random matrix already has a rank below the "
        "full one and rows that are not quite orthogonal: only the distance from the dashed line is learned. The gap "
        "follows the largest direction, so that one outlying entry, which some initialisations draw, is enough to raise it. "
        "Redundant weights do not say that attention or tokens are alike.",
    ),
    "weights-depth": Caption(
        "How alike the same weight matrix is in two blocks",
        "Mean over q, k, v, proj, fc1 and fc2 of the cosine between two blocks: of all entries, or of how strongly "
        "each direction of the token stream is read or written.",
        "Blocks whose neurons are the same but stand in another order look unrelated entry by entry.",
    ),
}
