"""How much do neighbouring patches differ? The Dirichlet energy of the tokens on a graph."""

from __future__ import annotations

import torch
from torch import Tensor

from collapse_probe.metrics.metric import CURVE, Variant
from collapse_probe.metrics.token_metric import DepthMetric
from collapse_probe.registry import METRICS


def grid_differences(patches_BPD: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Σ ‖x_i − x_j‖² over neighbours above or beside each other, and Σ_i deg_i ‖x_i‖², [B, P, D] -> two [B]."""
    rows, columns = grid
    x = patches_BPD.view(-1, rows, columns, patches_BPD.shape[-1])
    down, across = (x[:, 1:] - x[:, :-1]).square(), (x[:, :, 1:] - x[:, :, :-1]).square()
    degree = torch.zeros(rows, columns, dtype=x.dtype, device=x.device)
    for one, other in ((degree[1:], degree[:-1]), (degree[:, 1:], degree[:, :-1])):
        one += 1
        other += 1
    return down.sum((1, 2, 3)) + across.sum((1, 2, 3)), (x.square().sum(-1) * degree).sum((1, 2))


def complete_differences(tokens_BND: Tensor) -> tuple[Tensor, Tensor]:
    """As `grid_differences` on the graph in which every two tokens are neighbours; Σ_{i<j} ‖x_i − x_j‖² = N ‖X − 1x̄ᵀ‖²."""
    n = tokens_BND.shape[1]
    spread = (tokens_BND - tokens_BND.mean(1, keepdim=True)).square().sum((1, 2))
    return n * spread, (n - 1) * tokens_BND.square().sum((1, 2))


def dirichlet_energy(tokens_BND: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Σ_edges ‖x_i − x_j‖² / Σ_i deg_i ‖x_i‖², [B, N, D] -> [B], 0 … 2, on the 4-neighbour grid or the complete graph.

    The Rayleigh quotient of the graph's Laplacian: 0 where neighbours are equal, 1 where they have nothing in common, 2
    where they are opposite. NaN where all tokens are zero or no two are neighbours. `grid` is (rows, columns) with
    rows·columns = N; None is the complete graph.

    >>> dirichlet_energy(torch.tensor([[[1.0], [1.0], [-1.0], [-1.0]]]), (2, 2)).item()
    1.0
    """
    edges, size = complete_differences(tokens_BND) if grid is None else grid_differences(tokens_BND, grid)
    return torch.where(size > 0, edges / torch.where(size > 0, size, 1.0), torch.nan)


class DirichletEnergy(DepthMetric):
    """Differences between neighbouring patches: 0 where smoothing has made them equal."""

    name = "dirichlet-energy"
    summary = "squared differences of neighbouring patches over their squared norms"
    collapsed = "low"
    title = "How much neighbouring patches differ"
    seen = (
        "Squared differences of patches beside one another over their squared norms: 0 where neighbours are equal, 1 where "
        f"they have nothing in common. {CURVE}"
    )
    limits = "Neighbours in a photograph are alike to begin with: compare with depth 0, not with 1."
    failure_types = ("tokens",)
    formula = r"\frac{\sum_{(i,j)} \|x_i - x_j\|^2}{\sum_i \deg_i \|x_i\|^2}"
    value_range = "0 (neighbours equal) to 2 (neighbours opposite); 1 where they have nothing in common"
    source = "Rusch, Bronstein & Mishra, arXiv 2303.10993, relative to the norms by this project"
    traps = "Undivided by norms (@raw) it follows the norms of the residual stream, which grow with depth in most networks."
    panel = "neighbours on the grid, relative"
    unit = "energy"
    top = 1.0
    quantity_from = "scale"
    quantities = ("relative", "raw")
    defaults = {"graph": "grid", "scale": "relative", "prefix": False}
    variants = {
        "complete": Variant({"graph": "complete"}, "every two patches, relative"),
        "raw": Variant({"scale": "raw"}, "neighbours, not divided by norms", unit="squared units of the tokens"),
        "all": Variant({"graph": "complete", "prefix": True}, "every two tokens"),
    }

    def inapplicable(self) -> str:
        """The grid graph needs patches in rows and columns."""
        missing = super().inapplicable()
        if missing or self.settings["graph"] != "grid":
            return missing
        if self.plan.grid is None:
            return "the patches form no rectangle; dirichlet-energy@complete needs none"
        return "" if max(self.plan.grid) > 1 else "one patch has no neighbour"

    @property
    def definition(self) -> str:
        edges = {"grid": "patches above or beside one another", "complete": "every two tokens"}[self.settings["graph"]]
        formula = {
            "relative": "Σ_edges ‖x_i − x_j‖² / Σ_i deg_i ‖x_i‖² (0 … 2; 1 where neighbours have nothing in common)",
            "raw": "1/N Σ_i Σ_{j neighbour of i} ‖x_i − x_j‖², not divided by any norm (Rusch, Bronstein & Mishra, A Survey on "
            "Oversmoothing in Graph Neural Networks, arXiv 2303.10993, whose measure is the root of it)",
        }[self.quantity]
        return f"{formula}; the edges join {edges}; over {self.which_tokens()}. 0: neighbours are equal."

    def numbers(self, tokens_BND: Tensor) -> dict[str, Tensor]:
        """The energy, relative and raw; undefined at a depth whose patches are not those of the grid."""
        n, grid = tokens_BND.shape[1], self.plan.grid if self.settings["graph"] == "grid" else None
        if n < 2 or (grid is not None and n != grid[0] * grid[1]):
            return dict.fromkeys(self.quantities, tokens_BND.new_full((len(tokens_BND),), torch.nan))
        edges, _ = complete_differences(tokens_BND) if grid is None else grid_differences(tokens_BND, grid)
        return {"relative": dirichlet_energy(tokens_BND, grid), "raw": 2 * edges / n}


METRICS.add(DirichletEnergy.name, DirichletEnergy)
