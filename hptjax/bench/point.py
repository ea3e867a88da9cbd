"""One point of a series, in a process of its own: `python -m hptjax.bench.point` reads a task and writes its figures.

A process for each, because peak memory is a figure of a process, and nothing that one point has compiled or kept may
help or hinder another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hptjax.bench.memory import forget_peak, peak_mib
from hptjax.bench.reward import DEMONSTRATED, reward
from hptjax.bench.sizes import SPECIALS
from hptjax.config import Config
from hptjax.config_check import check
from hptjax.config_text import build

WARM = 1  # steps before those that count: the first one compiles
LIMIT_S = 1200.0  # of one point
TOLD = 1500  # characters of the last words of a process that failed
MARK = "figures: "  # before the line that holds them


def in_a_process(task: Mapping[str, Any]) -> dict[str, Any]:
    """What `measured` finds, in a process of its own, without programs compiled before.

    Raises one that ends with an error, or takes too long -> RuntimeError with its last words.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    words = [sys.executable, "-P", "-m", "hptjax.bench.point"]
    try:
        done = subprocess.run(
            words, input=json.dumps(task), env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"expected the point {_name(task)} within {LIMIT_S:.0f} s, got no figures") from None
    found = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        raise RuntimeError(
            f"expected figures of the point {_name(task)}, got a process that ended with status {done.returncode}: "
            f"{done.stderr.strip()[-TOLD:]}"
        )
    return json.loads(found[-1])


def _name(task: Mapping[str, Any]) -> str:
    return f"{task['series']} {task['point']}"


def measured(task: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a task, measured in this process.

    Args
      task: series, point, settings (values of a config), vocabulary and repeats.

    Returns figures: name -> one number per repeat; counts; memory in MiB: `peak_mib` of the whole process, with
      compilation, `timed_peak_mib` while the repeats ran, None where the system cannot tell; the devices' own peak.
    """
    import jax  # not for those who only ask for points

    from hptjax.bench import work

    can_tell: list[bool] = []
    before: list[float] = []

    def on_warm() -> None:
        before.append(peak_mib())
        can_tell.append(forget_peak())

    values = dict(task["settings"])
    requests, stops = values.pop("requests", None), values.pop("stops", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = point_config(folder, values, vocabulary=task["vocabulary"], steps=WARM + task["repeats"])
        if requests is None:
            figures, counts = work.time_steps(config, folder, warm=WARM, on_warm=on_warm)
        else:
            figures, counts = work.time_mixed(
                config, requests=requests, stops=stops, repeats=task["repeats"], on_warm=on_warm
            )
    timed = peak_mib()
    device = jax.devices()[0]
    return {
        "figures": figures,
        "counts": counts,
        "peak_mib": round(max(*before, timed), 1),
        "timed_peak_mib": round(timed, 1) if can_tell[-1] else None,
        "device": device.device_kind,
        "device_peak_mib": _device_peak_mib(device),
    }


def _device_peak_mib(device: Any) -> float | None:
    """Of an accelerator; a CPU does not say."""
    stats = device.memory_stats() or {}
    return round(stats["peak_bytes_in_use"] / 2**20, 1) if "peak_bytes_in_use" in stats else None


def point_config(folder: Path, values: Mapping[str, Any], *, vocabulary: int, steps: int) -> Config:
    """The config of a point: its settings, with a tokenizer and questions that are made for it in `folder`.

    Half of the questions are solved by every completion, half by none.
    """
    from hptjax.data.tokenizer import make_character_tokenizer

    symbols = "".join(chr(ord(DEMONSTRATED) + number) for number in range(vocabulary - SPECIALS))
    make_character_tokenizer(symbols, folder / "tokenizer")
    data, rollout = values["data"], values["rollout"]
    questions = data["questions_per_step"]
    prompts = np.random.default_rng(0).integers(0, len(symbols), (questions + 2, data["max_prompt_tokens"]))
    rows = [
        {
            "prompt": "".join(symbols[symbol] for symbol in prompt),
            "demo": DEMONSTRATED * (rollout["max_completion_tokens"] - 1),  # and the end of the text
            "answer": {"solvable": number % 2 == 1},
        }
        for number, prompt in enumerate(prompts)
    ]
    files = {}
    for split, chosen in (("files", rows[2:]), ("validation_files", rows[:1]), ("test_files", rows[1:2])):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        files[split] = [str(path)]
    shared: dict[str, Any] = {
        "name": "bench",
        "runs_dir": str(folder / "runs"),
        "model": {"tokenizer": str(folder / "tokenizer")},
        "data": {**files, "format": "native"},
        "prompt": {"template": "plain"},
        "reward": {"functions": [{"name": f"{reward.__module__}:{reward.__name__}"}]},
        "train": {"steps": steps, "eval_every": 0, "probe_every": 0, "rollouts_every": 0, "panel_questions": 0},
        "eval": {"questions": 1, "samples_per_question": 1, "train_questions": 0, "ks": [1]},
        "telemetry": {"tensorboard": False, "progress": False, "plot": False},
    }
    merged = {
        name: {**shared.get(name, {}), **value} if isinstance(value, Mapping) else value
        for name, value in (shared | dict(values)).items()
    }
    config = build(Config, merged, source="hptjax bench")
    check(config)
    return config


def main() -> None:
    """Reads a task from standard input, writes its figures as the last line."""
    print(MARK + json.dumps(measured(json.loads(sys.stdin.read()))))


if __name__ == "__main__":
    main()
