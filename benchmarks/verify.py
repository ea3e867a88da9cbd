"""Verdicts per second through the pool: `python benchmarks/verify.py [--rounds 9] [--workers 2]`.

Completions of a thousand characters that end in a boxed answer, judged by `math_strict`, whose verdicts carry the
lenient grade too. "ordinary": answers of the kinds that mathematics data sets have, half of them right, half of them
another value of the same kind; also by HPT's rules. "last route": pairs that our own reader leaves to math-verify.
"hanging": ordinary ones with one in a hundred that never comes back, at a deadline of one second; its seconds are
compared with the deadlines alone. Medians with quartiles over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

from hptjax.records import RewardFunction
from hptjax.rewards.pool import RewardPool
from hptjax.verify.rewards import math_hpt, math_strict

ORDINARY = r"""
5 | 6 || 17 | -17 || 204 | 240 || 1000 | 1,001 || 0.5 | \frac{1}{3} || \frac{1}{2} | \frac{2}{3}
-\frac{3}{4} | \frac{3}{4} || \frac{7}{12} | \frac{5}{12} || 2\sqrt{3} | 3\sqrt{2}
\frac{\sqrt{3}}{2} | \frac{\sqrt{3}}{3} || 3+\sqrt{2} | 3-\sqrt{2} || \frac{\pi}{4} | \frac{\pi}{3}
12\pi | 12 || x^2-1 | (x-1)^2 || 2x+3 | 2x-3 || (x-1)(x+2) | x^2+x+2 || y=2x+1 | y=2x-1
\frac{x+2}{7} | \frac{x}{7} || (1,2) | (2,1) || (3,\frac{\pi}{2}) | (3,\pi) || [0,\infty) | (0,\infty)
[1,2] | [1,3] || (-\infty,2)\cup(3,\infty) | (-\infty,2)\cup(4,\infty) || \{1,2,3\} | \{1,2,4\} || 1,2 | 1,3
x>5 | x>6 || 10\text{ cm} | 12\text{ cm} || 60^\circ | 30^\circ || 25\% | 20\% || \text{north} | \text{south}
B | C || 2516_8 | 2515_8 || \begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 1 \\ 3 \end{pmatrix}
6-5i | 6+5i || 2^{10} | 2^{11} || e^2 | e^3 || \ln 2 | \ln 3 || n(n+1) | n(n-1) || \sin x | \cos x
\binom{n}{2} | \binom{n}{3}
"""
LAST = [
    (r"\mathbb{R}", r"(-\infty,\infty)"),
    (r"(0,1)\cup(1,2)", r"(0,2)\setminus\{1\}"),
    (r"\triangle ABC", r"\triangle ABD"),
]
HANGS = (r"(10^9)!", "x+1")
FILLER = "We add the two sides and find that this holds. " * 20


def main() -> None:
    """Measures the three mixtures in turn, `rounds` times, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--hanging", type=int, default=1000, help="answers of the hanging mixture; 0 leaves it out")
    arguments = parser.parse_args()
    rows = [row.split("|") for line in ORDINARY.strip().splitlines() for row in line.split("||")]
    ordinary = [(answer.strip(), gold.strip()) for gold, wrong in rows for answer in (gold, wrong)]
    with RewardPool(workers=arguments.workers, deadline_s=5.0) as pool:
        for name, pairs, function in (
            ("ordinary", ordinary * 30, math_strict),
            ("ordinary, hpt's rules", ordinary * 3, math_hpt),
            ("last route", LAST * 20, math_strict),
        ):
            report(name, [measure(pool, function, pairs) for _ in range(arguments.rounds + 1)][1:])
    if arguments.hanging:
        pairs = [HANGS if place % 100 == 50 else ordinary[place % len(ordinary)] for place in range(arguments.hanging)]
        with RewardPool(workers=arguments.workers, deadline_s=1.0) as pool:
            pool.load([math_strict])
            seconds = len(pairs) / measure(pool, math_strict, pairs)
        alone = arguments.hanging / 100 / arguments.workers
        print(f"{'hanging':24s} {len(pairs)} answers in {seconds:.1f} s; the deadlines alone are {alone:.1f} s")


def measure(pool: RewardPool, function: RewardFunction, pairs: list[tuple[str, str]]) -> float:
    """Verdicts per second for (answer, gold) pairs."""
    completions = [f"{FILLER}So it is \\boxed{{{answer}}}." for answer, _ in pairs]
    answers = [{"answer": gold} for _, gold in pairs]
    began = time.perf_counter()
    pool.judge(function, completions, answers)
    return len(pairs) / (time.perf_counter() - began)


def report(name: str, rates: list[float]) -> None:
    """Prints the median and quartiles."""
    low, middle, high = statistics.quantiles(rates, n=4)
    print(f"{name:24s} {middle:7.0f} verdicts/s  [{low:.0f}, {high:.0f}]", flush=True)


if __name__ == "__main__":
    main()
