"""`benchmarks/gpu.py`: its account of operations and bytes by hand, its table, and all of it at the smallest shapes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hptjax.bench.account import decode_bytes, multiplied, training_flops
from hptjax.models.shape import DecoderConfig


def test_bench_account_by_hand():
    """V 10, D 4, L 3, H 2, K 1, E 2, F 8: a layer has q 4x4, k and v 4x2, o 4x4, three 4x8, two norms of 4."""
    shape = DecoderConfig(10, 4, 3, 2, 1, 2, 8, tie_embeddings=True)
    layer = 16 + 8 + 8 + 16 + 3 * 32 + 8  # 152
    assert multiplied(shape) == 3 * layer + 4 + 40 == 500
    untied = DecoderConfig(10, 4, 3, 2, 1, 2, 8)
    assert multiplied(untied) == 500  # a second matrix of 40, which is looked up and not multiplied
    # samples of 3 and 5 tokens: 6 x 500 x 8; a pair (query, key) costs 2 E to score and 2 E to mix, 2 heads, 3 layers
    pairs = (1 + 2 + 3) + (1 + 2 + 3 + 4 + 5)
    assert training_flops(shape, [3, 5]) == pytest.approx(6 * 500 * 8 + 3 * pairs * (2 + 2) * 2 * 2 * 3)
    adapters = 4 * 500 * 8 + 6 * 7 * 8 + 3 * pairs * (2 + 2) * 2 * 2 * 3
    assert training_flops(shape, [3, 5], adapters=7) == pytest.approx(adapters)
    # 500 weights, and keys and values of 6 rows of 9 tokens in 3 layers of one head of 2; two bytes each
    assert decode_bytes(shape, rows=6, cached=9.0) == 2 * (500 + 2 * 3 * 2 * 6 * 9)


@pytest.fixture
def gpu(repository, monkeypatch):
    """benchmarks/gpu.py as a module."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import gpu

    return gpu


def test_bench_gpu_table_by_hand(gpu):
    around = {"versions": {"jax": "1"}, "commit": "abcdef123", "code": "c"}
    ceiling = {"case": {"kind": "ceiling"}, "device": "X", "tflops": 100.0, "gb_per_s": 1000.0, "date": "d"}
    cases = {case["kind"]: case for case in gpu.cases(tiny=True, kinds=gpu.KINDS)}
    two = {"median": 2.0, "min": 1.0, "max": 3.0}
    records = [
        {**ceiling, "around": around},
        {"case": cases["training"], "variant": {"remat": "full"}, "seconds": two, "tokens": 64, "flops": 80e12},
        {"case": cases["decoding"], "variant": {}, "seconds": two, "tokens": 50, "bytes": 1.2e12},
        {"case": cases["decoding"], "variant": {}, "seconds": {**two, "median": -1.0}, "tokens": 50, "bytes": 1.2e12},
        {"case": cases["step"], "failed": ["{}: out of memory"]},
    ]
    text = gpu.table(records)
    # 80e12 operations in 2 s are 40 TFLOP/s of 100; 1.2e12 bytes in 2 s are 600 GB/s of 1,000
    assert (
        "| training | tiny, 2 x 2 rows of 32 tokens | remat full | 2 [1, 3] | 32 | 40% of the matmul ceiling | 50% |"
        in text
    )
    assert "| 25 | 60% of the bandwidth | 60% |" in text
    assert "| -1 [1, 3] | - | too little to tell | - |" in text
    assert "out of memory | - | - | - | - |" in text
    assert "commit abcdef1" in text


def test_bench_gpu_cases_are_those_of_the_goals(gpu):
    cases = gpu.cases(tiny=False, kinds=gpu.KINDS)
    training = [(one["shape"], one["row_tokens"]) for one in cases if one["kind"] == "training"]
    assert training == [(shape, tokens) for shape in ("0.6B", "1.5B", "7B") for tokens in (4096, 8192)]
    assert [one["slots"] for one in cases if one["kind"] == "decoding"] == [64, 256]
    assert [one["shape"] for one in cases if one["kind"] == "step"] == ["1.5B"]


@pytest.mark.slow
def test_bench_gpu_tiny_runs_everywhere(repository, tmp_path):
    docs, figures = tmp_path / "page.md", tmp_path / "gpu.json"
    docs.write_text("<!-- gpu: benchmarks/gpu.py -->\n<!-- end of gpu -->\n")
    words = [sys.executable, str(repository / "benchmarks" / "gpu.py"), "--tiny", "--repeats", "1"]
    words += ["--only", "training", "decoding", "step", "--json", str(figures), "--docs", str(docs)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    records = json.loads(figures.read_text())
    assert [one["case"]["kind"] for one in records] == ["ceiling", "training", "decoding", "step"]
    assert all("seconds" in one for one in records[1:]), records
    assert "of the matmul ceiling" in docs.read_text()
    again = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)  # all are known
    assert again.returncode == 0, again.stderr
