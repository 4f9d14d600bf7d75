"""What a preset is: the metrics of one paper with every choice fixed, and who made each choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from collapse_probe.errors import SettingError
from collapse_probe.registry import PRESETS

Maker = Literal["paper", "code", "our reading"]


@dataclass(frozen=True)
class Choice:
    """One choice behind a number: what had to be decided, how it is decided here, and after whom.

    `follows` is "paper" (the text or a figure), "code" (the authors' released code) or "our reading" (neither settles it).
    """

    choice: str
    value: str
    follows: Maker


@dataclass(frozen=True)
class Preset:
    """The metrics of one paper, each under a name of the table of metrics and with the settings that the name stands for.

    `version` counts up whenever a metric, a setting or a choice changes, so that two findings with one preset and version
    were measured alike. `follows` says which of the two decides where paper and code differ; `paper` and `code` say where they
    are to be found.
    """

    name: str
    version: str
    summary: str
    paper: str
    code: str
    follows: Literal["paper", "code"]
    metrics: Mapping[str, Mapping[str, Any]]
    choices: tuple[Choice, ...]

    def record(self) -> dict[str, Any]:
        """What the findings keep of it: plain data."""
        return {
            "version": self.version,
            "summary": self.summary,
            "follows": self.follows,
            "source": {"paper": self.paper, "code": self.code},
            "metrics": list(self.metrics),
            "choices": [vars(choice) for choice in self.choices],
        }


def with_presets(metrics: Iterable[str], presets: Iterable[str]) -> tuple[str, ...]:
    """The metrics asked for by name and those of the presets, each once. Raises UnknownNameError for a preset that is none."""
    if isinstance(presets, str):
        raise SettingError(f"presets are a sequence of names, such as ({presets!r},), not the text {presets!r}")
    return tuple(dict.fromkeys((*metrics, *(metric for name in presets for metric in PRESETS[name].metrics))))


def records(presets: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The record of each preset by name, as the findings keep it."""
    return {name: PRESETS[name].record() for name in presets}


MAPS = {"axis": "column", "centred": False, "point": "weights"}
WHOLE = {"by_head": False}
RANKME = {"centred": False, "epsilon": 1e-7, "first": 4, "last": 100}
SINK = {"point": "weights"}
ROBUST = {"deviations": 6.0, "threshold": None}
PAPERS = (
    Preset(
        name="anti-oversmoothing",
        version="1",
        summary="‖HC‖/‖DC‖ by depth, class token included; beside it ‖HC‖/‖X‖",
        paper="Anti-Oversmoothing, arXiv 2203.05962",
        code="github.com/VITA-Group/ViT-Anti-Oversmoothing at 989559f",
        follows="code",
        metrics={
            "token-frequency@all": {"over": "mean", "prefix": True},
            "token-frequency@total@all": {"over": "total", "prefix": True},
        },
        choices=(
            Choice("ratio", "‖HC‖ over ‖DC‖ in the Frobenius norm", "paper"),
            Choice("DC", "the mean token, repeated; HC is the rest", "paper"),
            Choice("tokens", "all, the class token included in the mean", "code"),
            Choice("second ratio", "‖HC‖ over ‖X‖ beside it, which stays within 0 and 1", "our reading"),
            Choice("place", "the residual stream at every depth, before the final norm", "our reading"),
            Choice("cosine curves of the figure", "left out: their exact definition is not settled", "our reading"),
        ),
    ),
    Preset(
        name="attention-sinks",
        version="1",
        summary="which heads have a sink and whether it is a no-op or a broadcast, on head values and on projected ones",
        paper="A Unifying View of Attention Sinks, arXiv 2606.08105",
        code="github.com/KempnerInstitute/attention_sink at a83cd59, lejepa_sinks and vit_causal",
        follows="code",
        metrics={
            "sink-kind": {**SINK, "value": "sink", "of": "head"},
            "sink-kind@no-op": {**SINK, "value": "no_op", "of": "head"},
            "sink-kind@broadcast": {**SINK, "value": "broadcast", "of": "head"},
            "sink-kind@out": {**SINK, "value": "sink", "of": "out"},
            "sink-kind@no-op@out": {**SINK, "value": "no_op", "of": "out"},
            "sink-kind@broadcast@out": {**SINK, "value": "broadcast", "of": "out"},
        },
        choices=(
            Choice("sink", "nine of ten queries give the key half of their attention or more (the relaxed rule)", "code"),
            Choice("no-op", "the sink's value has at most 0.2 of the mean length of the others'", "code"),
            Choice("broadcast", "0.5 or more, and a stable rank of the output of 1.5 or less", "code"),
            Choice("rank in the table of counts", "required; the code's table of LeJEPA models leaves it out", "our reading"),
            Choice("rank on head values", "of A v, where the code measures the projected update alone", "our reading"),
            Choice("block 0", "measured as every block; the code's table leaves it out", "our reading"),
            Choice("map", "what multiplies the values, also where it is no softmax", "our reading"),
        ),
    ),
    Preset(
        name="deepvit",
        version="1",
        summary="similarity of maps between blocks (Eq. 2), its ratio and count (Fig. 3), heads and features (Fig. 3, 4)",
        paper="DeepViT, arXiv 2103.11886",
        code="github.com/zhoudaquan/dvit_repo at 1ccb152, which computes none of these similarities",
        follows="paper",
        metrics={
            "attention-similarity": {**MAPS, "prefix": True},
            "similarity-ratio": {**MAPS, "k": 1, "threshold": 0.9, "direction": "before"},
            "similar-blocks": {**MAPS, "thresholds": [0.8, 0.9, 0.95]},
            "head-similarity": MAPS,
            "feature-similarity": {},
        },
        choices=(
            Choice("vectors compared", "columns A[h, :, t]: what token t gives to every query (Eq. 2)", "paper"),
            Choice("heads", "matched by index; one cosine for each head and token", "paper"),
            Choice("which map after Re-attention", "what multiplies V, so that cosines may be negative", "our reading"),
            Choice("tokens", "all, the class token included: nothing says that it is left out", "our reading"),
            Choice("images", "cosines of each image, then the mean over images", "our reading"),
            Choice("scalar for a pair of blocks", "the mean over heads and tokens", "our reading"),
            Choice("similarity-ratio: neighbours", "the one block before", "our reading"),
            Choice("similarity-ratio: threshold", "share of vectors with a cosine above 0.9, not above a mean", "our reading"),
            Choice("similarity-ratio: similar blocks", "blocks with a ratio above 0.9", "our reading"),
            Choice("similar-blocks", "blocks whose mean similarity with the block before is above 0.9", "our reading"),
            Choice("head-similarity", "mean cosine of the same column in different heads of one block", "our reading"),
            Choice("feature-similarity: vectors", "the same patch at two depths, before the final norm", "our reading"),
            Choice("feature-similarity: tokens", "patches alone, mean over patches and images", "our reading"),
        ),
    ),
    Preset(
        name="diverse-vit",
        version="1",
        summary="redundancy at three levels, by the definitions of the released regularisers",
        paper="Diverse-ViT, arXiv 2203.06345",
        code="github.com/VITA-Group/Diverse-ViT at 8116a7d, whose regularisers are read as measures: it holds no others",
        follows="code",
        metrics={
            "patch-diversity": {},
            "cross-patch-similarity": {"prefix": False},
            "whole-map-similarity@probs": {"point": "probs"},
            "weight-orthogonality@squared": {"measure": "squared", **WHOLE},
            "weight-orthogonality@soft": {"measure": "soft", **WHOLE},
            "hyperspherical-energy@separation": {"measure": "separation", "power": 1.0, **WHOLE},
            "hyperspherical-energy@gram": {"measure": "gram", "power": 1.0, **WHOLE},
            "weight-rank": {"measure": "effective", "divided": False, **WHOLE},
            "weight-rank@pca90": {"measure": "pca", "share": 0.9, "divided": False, **WHOLE},
        },
        choices=(
            Choice("patches: tokens", "patches alone, the class token dropped", "code"),
            Choice("patches: cosine", "absolute, as in the variant that the released training leaves unused", "code"),
            Choice("patches within a depth", "different patches alone; the code counts a patch with itself", "our reading"),
            Choice("patches across depths", "all pairs of patches, a patch with itself included", "code"),
            Choice("patches: place", "the residual stream from position embeddings on, before the final norm", "code"),
            Choice("patches: depths", "every depth; the released training reads the first and the last", "our reading"),
            Choice("maps: vector", "the whole map of a head, flattened; all tokens, the class token included", "code"),
            Choice("maps: which", "the softmax, before dropout", "code"),
            Choice("maps: pairs", "absolute cosine of every two heads, a head with itself included", "code"),
            Choice("maps: blocks", "every block and every two blocks; the released training reads the first", "our reading"),
            Choice("weights: matrix", "q, k and v whole, not by head", "code"),
            Choice("weights: which", "proj, fc1 and fc2 as well; the released training reads q, k and v", "our reading"),
            Choice("weights: orthogonality", "(λmax − λmin)² of W Wᵀ, and ‖W Wᵀ − I‖_F²", "code"),
            Choice("weights: eigenvalues", "exact; the code takes one random power step, which is biased low", "our reading"),
            Choice("weights: separation", "duplicate rows count as distance 0; the code passes over them", "our reading"),
            Choice("weights: determinant", "−log det of exp(−‖r̂_i − r̂_j‖²) + 1e-6·I over rows at unit length", "code"),
            Choice("weights: rank", "effective rank of singular values, exp(−Σ p log p)", "our reading"),
            Choice("weights: principal components", "what 90 % of the components leave of the variance", "our reading"),
        ),
    ),
    Preset(
        name="entropy-collapse",
        version="1",
        summary="entropy of the softmax rows in nats; low is ill",
        paper="Zhai et al., arXiv 2303.06296",
        code="github.com/apple/ml-sigma-reparam; no commit is recorded",
        follows="code",
        metrics={"attention-entropy": {"point": "probs"}},
        choices=(
            Choice("formula", "−Σ_j A_ij log A_ij of each row, in nats", "code"),
            Choice("averaging", "over queries and images; heads stay apart, with their mean beside them", "code"),
            Choice("0 · log 0", "0, with nothing added inside the logarithm", "our reading"),
            Choice("which map", "the softmax, also where a model mixes its maps afterwards", "our reading"),
            Choice("tokens", "all queries and keys, prefix tokens included", "our reading"),
        ),
    ),
    Preset(
        name="massive-activations",
        version="1",
        summary="the three largest |activations| and the median one of an image, by block",
        paper="Sun et al., arXiv 2402.17762",
        code="github.com/locuslab/massive-activations at 6521c05, main_vit.py",
        follows="code",
        metrics={
            "massive-activations@top1": {"value": "top1", "prefix": True},
            "massive-activations@top2": {"value": "top2", "prefix": True},
            "massive-activations@top3": {"value": "top3", "prefix": True},
            "massive-activations@median": {"value": "median", "prefix": True},
            "massive-activations": {"value": "ratio", "prefix": True},
        },
        choices=(
            Choice("entries", "|x| over all tokens and channels of one image, class token and registers included", "code"),
            Choice("median", "of an even number of entries the lower one in the middle", "code"),
            Choice("images", "numbers of each image, then the mean over images", "code"),
            Choice("place", "what leaves each block, before the final norm", "code"),
            Choice("sequence before the first block", "measured too, as depth 0", "our reading"),
            Choice("ratio", "largest over median of each image, which no scale of the model changes", "our reading"),
        ),
    ),
    Preset(
        name="patch-diversification",
        version="1",
        summary="one minus P, the mean absolute cosine between different patches of an image",
        paper="Patch Diversification, arXiv 2104.12753",
        code="github.com/ChengyueGongR/PatchVisionTransformer at b70ee23, which holds no cosine term",
        follows="paper",
        metrics={"patch-diversity": {}},
        choices=(
            Choice("cosine", "its absolute value: opposite patches count as alike", "paper"),
            Choice("pairs", "all pairs of different patches; a patch with itself does not count", "paper"),
            Choice("sign", "1 − P is shown, so that low is ill", "our reading"),
            Choice("tokens", "patches alone, prefix tokens out", "our reading"),
            Choice(
                "place",
                "the residual stream at every depth, before the final norm (the released contrastive term reads the last "
                "layer after it)",
                "our reading",
            ),
        ),
    ),
    Preset(
        name="rank-collapse",
        version="1",
        summary="‖X − 1x̄ᵀ‖/‖X‖ in the composite norm √(‖·‖₁·‖·‖_∞), all tokens",
        paper="Dong et al., arXiv 2103.03404",
        code="the authors' notebook and paper-plotting/utils.py; no commit is recorded",
        follows="code",
        metrics={"rank-residual@composite@all": {"norm": "composite", "prefix": True}},
        choices=(
            Choice("residual", "the tokens less one vector repeated, over the tokens", "paper"),
            Choice("the vector", "the mean token (the paper's is the best one in the composite norm)", "code"),
            Choice(
                "norm",
                "√(largest absolute column sum · largest absolute row sum); a second script of the authors leaves the root out",
                "code",
            ),
            Choice("tokens", "all, prefix tokens included", "code"),
            Choice("place", "what leaves each block", "code"),
            Choice("sequence before the first block", "measured too, as depth 0", "our reading"),
            Choice("rank along random paths of attention", "left out", "our reading"),
        ),
    ),
    Preset(
        name="rank-collapse-in-width",
        version="1",
        summary="σ₁ − σ₂ of each map, and σ₂·√N",
        paper="Nait Saada et al., arXiv 2410.07799",
        code="github.com/thizirinait/Mind-the-Gap-a-Spectral-Analysis-of-Rank-Collapse-and-Signal-Propagation-in-Attention-"
        "Layers, which holds the fix and another stable rank",
        follows="paper",
        metrics={
            "spectral-gap": {"measure": "gap", "prefix": True, "point": "weights"},
            "spectral-gap@second": {"measure": "second", "prefix": True, "point": "weights"},
        },
        choices=(
            Choice("gap", "between the two largest singular values of the attention matrix", "paper"),
            Choice("second value", "times √N, which stays put for random maps of independent entries", "our reading"),
            Choice("tokens", "all, prefix tokens included", "our reading"),
            Choice("images", "at most 32, a random sample by name", "our reading"),
        ),
    ),
    Preset(
        name="rankme",
        version="1",
        summary="rank over images of the class token's and the mean patch's embedding, by depth",
        paper="RankMe, arXiv 2210.02885",
        code="github.com/rbalestr-lab/stable-pretraining at 9aa93f8, callbacks/rankme.py, not by its authors",
        follows="paper",
        metrics={
            "embedding-rank@cls": {"measure": "rankme", "token": "cls", **RANKME},
            "embedding-rank": {"measure": "rankme", "token": "patches", **RANKME},
        },
        choices=(
            Choice("formula", "exp(−Σ p log p), p = σ/Σσ + ε over all singular values of the embeddings", "paper"),
            Choice("ε", "1e-7; stable-pretraining has 1e-5", "our reading"),
            Choice("mean embedding", "not taken off", "code"),
            Choice("embedding", "class token and mean patch of every depth, before the final norm", "our reading"),
            Choice("images", "all, in place of a queue of them", "our reading"),
        ),
    ),
    Preset(
        name="raptor",
        version="1",
        summary="phases of depth by recursive max-cut of distances between class tokens and mean patches (up to 16 blocks)",
        paper="Block-Recurrent Dynamics in Vision Transformers, arXiv 2512.19941",
        code="github.com/KempnerInstitute/raptor at ba3b53f, raptor/max_cut_dinov2_base.ipynb",
        follows="code",
        metrics={"depth-phases@max-cut": {"rule": "max-cut"}, "depth-phases": {"rule": "drift"}},
        choices=(
            Choice("distance", "1 − cosine, the mean over class token and mean patch, over images", "code"),
            Choice(
                "threshold", "a cut must weigh more than 0.2 of all distances; the notebook tries 0.10 and 0.09 too", "code"
            ),
            Choice("shortest group that is cut", "four blocks", "code"),
            Choice("blocks", "what each block leaves, before any final norm", "code"),
            Choice("phases beyond a steady drift", "beside it: consecutive blocks, by dynamic programming", "our reading"),
        ),
    ),
    Preset(
        name="redundant-depth",
        version="1",
        summary="block influence, of the branches too, and angular distances: which blocks the field would drop first",
        paper="ShortGPT, arXiv 2403.03853; Gromov et al., arXiv 2403.17887; He et al., arXiv 2406.15786",
        code="sramshetty/ShortGPT 78d9615, arcee-ai/PruneMe faee6c9, CASE-Lab-UMD/LLM-Drop 28b5dd1",
        follows="code",
        metrics={
            "block-influence": {"branch": "block", "tokens": "all"},
            "block-influence@attention": {"branch": "attention", "tokens": "all"},
            "block-influence@mlp": {"branch": "mlp", "tokens": "all"},
            "angular-distance": {"tokens": "all"},
        },
        choices=(
            Choice("tokens", "all; the code of the angular distance takes the last one of a text", "our reading"),
            Choice("vectors without a direction", "left out; the code of ShortGPT counts a cosine of 0.5", "our reading"),
            Choice("branches", "cos(x, x + branch), with a LayerScale as part of the branch", "code"),
            Choice("averaging", "over the tokens of an image, then over images", "our reading"),
        ),
    ),
    Preset(
        name="registers",
        version="1",
        summary="share of patch tokens with a norm above 150; beside it a threshold of the image's own, and mean norms",
        paper="Darcet et al., arXiv 2309.16588",
        code="none was read",
        follows="paper",
        metrics={
            "token-norm@150": {"value": "share", "deviations": 6.0, "threshold": 150.0},
            "token-norm@outliers": {"value": "share", **ROBUST},
            "token-norm": {"value": "norm", **ROBUST},
        },
        choices=(
            Choice("norm", "ℓ2 norm of the patch tokens", "paper"),
            Choice("threshold", "150, chosen by hand for DINOv2: other models have other scales", "paper"),
            Choice("second threshold", "the image's own median + 6 median absolute deviations", "our reading"),
            Choice("tokens", "patches alone; class token and registers are left out", "our reading"),
            Choice("place", "the residual stream at every depth, before the final norm", "our reading"),
        ),
    ),
)
for paper in PAPERS:
    PRESETS.add(paper.name, paper)
