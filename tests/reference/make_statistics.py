"""statistics.json: what scipy, scikit-learn and CPython say where `plugins/evaluate/src/stats` has its own code.

    python tests/reference/make_statistics.py

Needs scipy and scikit-learn beside requirements.txt.
"""

import math
import random

import numpy as np
from scipy import stats
from sklearn import metrics

from common import HERE, g, write_json


def generators():
    """CPython's generator: floats, `sample` on both of its ways, `choices`."""
    out = []
    for seed in (0, 1, 42, 1234, 4294967295):
        r = random.Random(seed)
        out.append({
            "seed": seed, "random": [r.random() for _ in range(3)],
            "samples": [{"n": n, "k": k, "drawn": r.sample(range(n), k)} for n, k in [(10, 3), (5, 5), (100, 4), (21, 5), (1000, 7), (3000, 30)]],
            "choices": r.choices(range(17), k=8),
        })
    return out


def normal():
    xs = [-38.0, -12.0, -6.0, -3.5, -2.0, -1.0, -0.3, 0.0, 1e-9, 0.5, 1.0, 1.96, 2.9, 4.0, 8.0]
    ps = [1e-300, 1e-12, 1e-4, 0.005, 0.025, 0.2, 0.5, 0.8, 0.95, 0.975, 0.999, 1 - 1e-12]
    return {"cdf": [[x, float(stats.norm.cdf(x))] for x in xs], "quantile": [[p, float(stats.norm.ppf(p))] for p in ps]}


def mcnemar():
    """One-sided and two-sided exact tests as binomial tests of ½."""
    cases = [(0, 0), (1, 0), (3, 0), (5, 1), (10, 2), (2, 10), (7, 7), (60, 40), (300, 200), (1, 700), (5000, 4800)]
    test = lambda g_, l, side: float(stats.binomtest(g_, g_ + l, 0.5, alternative=side).pvalue) if g_ + l else 1.0
    return [{"gained": a, "lost": b, "greater": test(a, b, "greater"), "two_sided": test(a, b, "two-sided")} for a, b in cases]


def classes():
    """F1, macro F1 and MCC of labels; also where a class is never predicted."""
    rnd = random.Random(5)
    cases = [
        ([0, 1, 1, 0, 1], [0, 1, 0, 0, 1]), ([0, 0, 1], [1, 1, 1]), ([1, 1], [1, 1]), ([0, 1, 2, 2, 1, 0], [0, 2, 2, 1, 1, 0]),
        ([0, 1, 2, 3], [0, 0, 0, 0]), *(([rnd.randrange(k) for _ in range(40)], [rnd.randrange(k) for _ in range(40)]) for k in (2, 3, 6)),
    ]
    out = []
    for truth, said in cases:
        f1 = float(metrics.f1_score(truth, said, zero_division=0)) if set(truth) | set(said) <= {0, 1} else None
        macro = float(metrics.f1_score(truth, said, average="macro", zero_division=0))
        out.append({"truth": truth, "said": said, "f1": f1, "f1_macro": macro, "mcc": float(metrics.matthews_corrcoef(truth, said))})
    return out


def bootstrap():
    """BCa bounds of paired differences with 100,000 replicates: of a mean, of shares, of a ratio of sums."""
    rng = np.random.default_rng(8)
    out = []
    n = 120
    base = rng.gamma(2.0, 3.0, n)
    pairs = {
        "mean": (base + rng.normal(0.3, 1.0, n), base),
        "shares": ((rng.random(n) < 0.62).astype(float), (rng.random(n) < 0.5).astype(float)),
    }
    for name, (a, b) in pairs.items():
        statistic = lambda x, y, axis=-1: np.mean(x, axis=axis) - np.mean(y, axis=axis)
        found = stats.bootstrap((a, b), statistic, paired=True, n_resamples=100_000, confidence_level=0.9, method="BCa", rng=np.random.default_rng(1), batch=10_000)
        ci = found.confidence_interval
        out.append({"statistic": "mean", "name": name, "candidate": [[g(x, 12)] for x in a], "baseline": [[g(x, 12)] for x in b], "low": float(ci.low), "high": float(ci.high), "stderr": float(found.standard_error)})
    weights = rng.integers(3, 60, n).astype(float)
    before = -weights * rng.gamma(9.0, 0.3, n)
    after = before + weights * rng.normal(0.1, 0.15, n)
    ratio = lambda a, b, w, axis=-1: np.sum(b, axis=axis) / np.sum(w, axis=axis) - np.sum(a, axis=axis) / np.sum(w, axis=axis)
    found = stats.bootstrap((after, before, weights), ratio, paired=True, n_resamples=100_000, confidence_level=0.9, method="BCa", rng=np.random.default_rng(2), batch=10_000)
    ci = found.confidence_interval
    both = lambda xs: [[g(x, 12), w] for x, w in zip(xs, weights)]
    out.append({"statistic": "weighted_loss", "name": "ratio", "candidate": both(after), "baseline": both(before), "low": float(ci.low), "high": float(ci.high), "stderr": float(found.standard_error)})
    return out


def main() -> None:
    assert math.isclose(float(stats.norm.cdf(1.96)), 0.9750021048517795)
    write_json(HERE / "statistics.json", {
        "random": generators(), "normal": [normal()], "mcnemar": mcnemar(), "classes": classes(), "bootstrap": bootstrap(),
    })


if __name__ == "__main__":
    main()
