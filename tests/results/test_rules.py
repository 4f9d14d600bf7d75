"""Each rule of the verdict answers yes, no, undecided and not applicable where it should, on findings made by hand."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from collapse_probe.results.findings import Description, Findings, MetricResult, Nulls
from collapse_probe.results.outcomes import READERS, outcome, verdict_table
from collapse_probe.results.readings import against_seeds
from collapse_probe.results.rules import BY_NAME, RULES
from collapse_probe.results.verdict import Verdict, judge, verdict_of, with_verdict

BLOCKS = 3


def findings(metrics, images=20, **model):
    return Findings(
        model={"weights": "made by hand", "mixes_maps": False, **model},
        data={"images": images},
        run={},
        metrics=metrics,
        summary={},
    )


def square(value):
    """A block × block matrix with `value` between each block and the block before; nan elsewhere, which no rule may read."""
    found = np.full((BLOCKS, BLOCKS), np.nan)
    for b in range(1, BLOCKS):
        found[b, b - 1] = value
    return found


def around(values, reach):
    return np.stack([values - reach, values + reach], axis=-1)


def reading(values, reach=0.0, dims=("depth",), nulls=None, **facts):
    values = np.asarray(values, dtype=np.float64)
    given = None if nulls is None else Nulls(values=nulls, images={}, kappa_ci95=facts.pop("kappa_ci95", None))
    return MetricResult(dims, "", values, stderr=values * 0, ci95=around(values, reach), nulls=given, **facts)


def similarity(
    raw=0.5, null=0.4, kappa=0.1, reach=0.0, row=0.5, head=0.4, key=0.3, queries=0.4, order=0.0, share=0.5, twin=None, **facts
):
    """Findings of maps: columns with their null and kappa, rows with their nulls and the best order of heads, entropies."""
    pair = ("block", "block")
    nulls = {"other_token": square(null), "kappa": square(kappa)}
    log = np.log(10)
    heads = np.full((BLOCKS, 2), share * log)
    mean = np.full(BLOCKS, share * log)
    entropy = MetricResult(
        ("block", "head"),
        "",
        heads,
        stderr=heads * 0,
        ci95=around(heads, 0),
        head_mean=(mean, mean * 0, around(mean, reach * log)),
        details={"tokens": [10] * BLOCKS},
    )
    columns = reading(square(raw), reach, pair, nulls, kappa_ci95=around(square(kappa), reach))
    columns = replace(columns, nulls=replace(columns.nulls, ci95={"other_token": around(square(null), reach)}))
    if twin is not None:
        columns = replace(columns, nulls=replace(columns.nulls, untrained_beyond={"other_token": square(twin)}))
    of_rows = {"other_head": square(head), "other_key": square(key), "other_token": np.eye(BLOCKS) * queries}
    rows = reading(square(row), reach, pair, of_rows, details={"head_order_share": [order] * (BLOCKS - 1)})
    ends = np.moveaxis(np.eye(BLOCKS)[None] * (queries + np.array([-1, 1])[:, None, None] * reach), 0, -1)
    rows = replace(rows, nulls=replace(rows.nulls, ci95={"other_token": ends}))
    metrics = {"attention-similarity": columns, "attention-similarity@row": rows, "attention-entropy": entropy}
    return findings(metrics, **facts)


def depths(metric, last, reach=0.0, fresh=None):
    nulls = None if fresh is None else {"untrained": np.array([9.0, 9.0, fresh])}
    return findings({metric: reading([9.0, 9.0, last], 0.0 if reach is None else reach, nulls=nulls)})


def weights(metric, value):
    fresh = np.full((BLOCKS, 2), 2.0)
    given = np.array([[2.0, np.nan], [value * 2, value * 2], [2.0, 2.0]])
    facts = {"description": Description(level="weights"), "nulls": Nulls({"untrained": fresh}, {})}
    return findings({metric: MetricResult(("block", "matrix"), "", given, **facts)}, images=0)


def sinks(metric, value, reach):
    """Each block's heads with a mean of `value` above that of the untrained copy."""
    heads, mean = np.full((BLOCKS, 2), value + 0.1), np.full(BLOCKS, value + 0.1)
    facts = {"head_mean": (mean, mean * 0, around(mean, reach)), "description": Description(level="attention")}
    nulls = Nulls({"untrained": np.full((BLOCKS, 2), 0.1)}, {})
    return findings({metric: MetricResult(("block", "head"), "", heads, nulls=nulls, **facts)})


CASES = {
    "shared": (lambda v, r: similarity(kappa=v, reach=r), 0.6, 0.4, 0.2),
    "shared-row": (lambda v, r: similarity(head=0.0, row=v, reach=r), 0.6, 0.4, 0.2),
    "same-row": (lambda v, r: similarity(queries=0.99, head=0.99, key=0.0, row=v, reach=r), 0.6, 0.4, 0.2),
    "other-order": (lambda v, r: similarity(order=v), 0.95, 0.85, None),
    "beyond-untrained": (lambda v, r: similarity(kappa=0.9, twin=1 - 0.1 / (1 - v)), 0.6, 0.4, None),
    "columns-alike": (lambda v, r: similarity(null=v, reach=r), 0.95, 0.85, 0.2),
    "query-independent": (lambda v, r: similarity(queries=v, reach=r), 0.99, 0.97, 0.2),
    "same-everywhere": (lambda v, r: similarity(head=v), 0.99, 0.97, None),
    "high-raw": (lambda v, r: similarity(raw=v, reach=r), 0.95, 0.85, 0.2),
    "near-uniform": (lambda v, r: similarity(share=v, reach=r), 0.95, 0.85, 0.2),
    "mostly-query-independent": (lambda v, r: similarity(queries=v, kappa=np.nan), 0.99, 0.97, None),
    "mostly-explained": (lambda v, r: similarity(raw=v), 0.95, 0.85, None),
    "entropy-collapse": (lambda v, r: similarity(share=v, reach=r), 0.05, 0.15, 0.2),
    "parallel-patches": (lambda v, r: depths("patch-diversity", 1 - v, r), 0.8, 0.6, 0.3),
    "less-diverse-than-untrained": (lambda v, r: depths("patch-diversity", v * 0.8, r, 0.8), 0.4, 0.6, 0.3),
    "constant-tokens": (lambda v, r: depths("rank-residual", v, r), 0.05, 0.15, 0.3),
    "constant-tokens-composite": (lambda v, r: depths("rank-residual@composite@all", v, r), 0.05, 0.15, 0.3),
    "less-high-frequency-than-untrained": (lambda v, r: depths("token-frequency@all", v * 2, r, 2.0), 0.4, 0.6, 0.5),
    "lower-rank-than-untrained": (lambda v, r: depths("token-rank", v * 50, r, 50.0), 0.4, 0.6, 30.0),
    "outlier-tokens": (lambda v, r: depths("token-norm@outliers", v + 0.05, r, 0.05), 0.02, 0.005, 0.1),
    "norm-above-150": (lambda v, r: depths("token-norm@150", v, r), 0.02, 0.005, 0.1),
    "massive-activations": (lambda v, r: depths("massive-activations", v + 5.0, r, 5.0), 2000.0, 300.0, 1500.0),
    "heads-switched-off": (lambda v, r: sinks("sink-kind@no-op", v, r), 0.6, 0.4, 0.2),
    "one-value-for-all": (lambda v, r: sinks("sink-kind@broadcast", v, r), 0.6, 0.4, 0.2),
    "weights-lost-rank": (lambda v, r: weights("weight-rank", v), 0.4, 0.6, None),
    "rows-more-alike": (lambda v, r: weights("weight-similarity", v), 2.5, 1.5, None),
    "untrained": (lambda v, r: findings({}, weights=v), "random parameters, seed 0", "published", None),
    "loaded-in-part": (lambda v, r: findings({}, blocks=3, blocks_not_loaded=v), [1], [], None),
    "mixed-maps": (lambda v, r: findings({}, mixes_maps=v), True, False, None),
}


def test_every_rule_has_a_number_and_a_case():
    assert list(BY_NAME) == list(CASES)
    assert set(READERS) < set(BY_NAME)
    assert len(BY_NAME) == len(RULES)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_answers_yes_on_its_side_of_the_threshold_and_no_on_the_other(name):
    make, ill, well, _ = CASES[name]
    assert outcome(BY_NAME[name], make(ill, 0.0)).answer == "yes"
    assert outcome(BY_NAME[name], make(well, 0.0)).answer == "no"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[3] is not None])
def test_a_rule_is_undecided_where_the_interval_holds_the_threshold(name):
    make, ill, well, reach = CASES[name]
    for value in (ill, well):
        found = outcome(BY_NAME[name], make(value, reach))
        assert found.answer == "undecided"
        assert "interval" in found.reason
        assert found.ci is not None
        assert found.ci[0] < BY_NAME[name].threshold < found.ci[1]


@pytest.mark.parametrize("name", [name for name, rule in BY_NAME.items() if rule.level != "run"])
def test_a_rule_does_not_apply_where_its_metric_was_not_run_is_refused_or_undefined(name):
    rule = BY_NAME[name]
    missing = outcome(rule, findings({}))
    assert (missing.answer, missing.value) == ("not applicable", None)
    assert f"{rule.metric} was not measured" in missing.reason
    refused = outcome(rule, findings({rule.metric: MetricResult(("block",), "", not_applicable="windows")}))
    assert refused.answer == "not applicable"
    assert "windows" in refused.reason


@pytest.mark.parametrize(("name", "metric"), [("parallel-patches", "patch-diversity"), ("norm-above-150", "token-norm@150")])
def test_an_undefined_number_decides_nothing(name, metric):
    found = outcome(BY_NAME[name], depths(metric, np.nan))
    assert found.answer == "not applicable"
    assert "defined nowhere" in found.reason


@pytest.mark.parametrize("name", ["less-diverse-than-untrained", "lower-rank-than-untrained", "weights-lost-rank"])
def test_a_comparison_without_a_twin_does_not_apply(name):
    metric = BY_NAME[name].metric
    nulls = Nulls({"untrained": None}, {}, {"untrained": "no null images were asked for"})
    found = outcome(BY_NAME[name], findings({metric: MetricResult(("depth",), "", np.ones((3, 3)), nulls=nulls)}))
    assert found.answer == "not applicable"
    assert "no null images were asked for" in found.reason


def test_one_image_leaves_every_number_undecided():
    numbers = similarity(kappa=0.9, raw=0.95, share=0.95)
    alone = findings(dict(numbers.metrics), images=1)
    answers = {o.rule.name: o.answer for o in verdict_table(alone) if o.rule.level == "attention"}
    assert answers["same-everywhere"] == answers["mostly-explained"] == "undecided"


def test_an_outcome_shows_the_place_that_goes_furthest_and_all_places():
    kappa = square(0.7)
    kappa[1, 0] = 0.2
    nulls = {"other_token": square(0.4), "kappa": kappa}
    metric = reading(square(0.8), 0, ("block", "block"), nulls, kappa_ci95=around(kappa, 0.1))
    found = outcome(BY_NAME["shared"], findings({"attention-similarity": metric}))
    assert (found.answer, found.value, found.at("yes"), found.at("no")) == ("yes", 0.7, [2], [1])
    assert found.ci == pytest.approx((0.6, 0.8))
    assert found.reason.startswith("1 of 2 pairs: above 0.5")


def test_rows_say_whose_their_threshold_is_and_what_they_do_not_say():
    for rule in RULES:
        assert all((rule.source, rule.says, rule.does_not_say, rule.quantity)), rule.name
        assert "our convention" in rule.source or rule.source == "a fact of the run", rule.name


def test_the_table_is_kept_with_the_findings_and_comes_back(tmp_path):
    found = with_verdict(similarity(kappa=0.6))
    found.save(tmp_path / "out")
    back = Findings.load(tmp_path / "out")
    kept = {row["rule"]: row for row in back.verdict}
    assert list(kept) == [rule.name for rule in RULES]
    assert kept["shared"]["answer"] == "yes"
    assert kept["shared"]["threshold"] == 0.5
    assert kept["shared"]["places"][0] == {"at": 1, "value": 0.6, "ci95": [0.6, 0.6], "answer": "yes"}
    assert back.to_json()["verdict"] == found.to_json()["verdict"]
    assert verdict_of(back) == verdict_of(found) == judge(found)
    assert back.answer["case"] == "shared"


def test_the_verdict_of_findings_stored_without_one_is_made_from_their_numbers(tmp_path):
    found = similarity(kappa=0.6)
    found.save(tmp_path / "old")
    old = json.loads((tmp_path / "old" / "findings.json").read_text())
    del old["answer"]
    (tmp_path / "old" / "findings.json").write_text(json.dumps(old))
    assert verdict_of(Findings.load(tmp_path / "old")) == judge(found)


def test_the_spread_over_seeds_is_read_as_json_holds_it():
    spread = {"seeds": [1, 2], "low": square(0.2).tolist(), "high": square(0.4).tolist()}
    found = similarity(raw=0.5)
    metric = found.metrics["attention-similarity"]
    seen = against_seeds(replace(metric, nulls=replace(metric.nulls, untrained_seeds=spread)))
    assert "0.500, above what 2 untrained copies of different seeds span (0.200 to 0.400" in seen


def test_the_stored_verdict_is_the_one_that_is_read():
    stored = Verdict("shared", ("Kept.",), rules=("shared",))
    assert verdict_of(replace(similarity(kappa=0.1), answer=asdict(stored))) == stored


@pytest.mark.parametrize("name", [rule.name for rule in RULES if rule.spoken])
def test_an_illness_that_is_found_is_said_and_one_that_is_not_is_left_out(name):
    make, ill, well, reach = CASES[name]
    assert name in judge(make(ill, 0.0)).rules
    assert name not in judge(make(well, 0.0)).rules
    answer = judge(make(ill, 0.0))
    assert BY_NAME[name].says in answer.sentences[answer.rules.index(name)]
    if reach is not None:
        assert name in judge(make(ill, reach)).caveat_rules
        assert name not in judge(make(ill, reach)).rules


@pytest.mark.parametrize(
    ("numbers", "case", "collapsed", "rule"),
    [
        ({"kappa": 0.6}, "shared", True, "shared"),
        ({"kappa": 0.6, "reach": 0.2}, "undecided", None, "shared"),
        ({"kappa": 0.4, "reach": 0.2}, "undecided", None, "shared"),
        ({"kappa": 0.4}, "distinct", False, "shared"),
        ({"raw": 0.95}, "explained", False, "mostly-explained"),
        ({"raw": 0.95, "share": 0.95}, "near-uniform", False, "mostly-explained"),
        ({"head": 0.0, "row": 0.9}, "shared", True, "shared-row"),
        ({"queries": 0.99, "kappa": np.nan, "head": 0.0, "row": 0.9}, "query-independent", True, "shared-row"),
        ({"queries": 0.99, "kappa": np.nan, "head": 0.0, "row": 0.2}, "query-independent", False, "mostly-query-independent"),
        ({"queries": 0.99, "head": 0.99, "row": 0.99, "key": 0.1}, "query-independent", True, "same-row"),
        ({"queries": 0.99, "head": 0.99, "row": 0.3}, "query-independent", None, "mostly-query-independent"),
        ({"order": 0.95}, "shared", True, "other-order"),
        ({"kappa": 0.9, "twin": 0.2}, "shared", True, "shared"),
        ({"kappa": 0.9, "twin": 0.9}, "as-untrained", None, "beyond-untrained"),
        ({"kappa": 0.9, "twin": 0.9, "shares_weights": [True] * (BLOCKS - 1)}, "shared", True, "shared"),
        ({"kappa": 0.9, "images": 15}, "undecided", None, "shared"),
    ],
)
def test_the_first_sentence_follows_from_its_rule(numbers, case, collapsed, rule):
    answer = judge(similarity(**numbers))
    assert (answer.case, answer.collapsed, answer.rules[0]) == (case, collapsed, rule)


def test_other_illnesses_are_said_where_maps_were_not_measured():
    answer = judge(depths("patch-diversity", 0.2))
    assert (answer.case, answer.collapsed) == ("not-judged", None)
    assert answer.rules == ("parallel-patches", "shared")
    assert answer.sentences[0].startswith("Collapse within the image: the patches of an image have become nearly parallel")
    assert "0.800, above 0.7" in answer.sentences[0]
    assert "not judged here: attention-similarity was not asked for" in answer.sentences[1]


def test_a_threshold_itself_is_not_beyond_it():
    assert not any(rule.holds(rule.threshold) or rule.holds(float("nan")) for rule in RULES)
