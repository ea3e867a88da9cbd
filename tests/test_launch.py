"""The notebook runs from top to bottom, as a script and from any folder."""

from __future__ import annotations

import os
import subprocess
import sys

SMALL = (
    "--train.steps 1 --train.eval_every 0 --train.probe_every 0 --data.train_questions 16 "
    "--data.validation_questions 4 --model.remat false "
    "--data.test_questions 4 --data.questions_per_step 4 --rollout.slots 16 --rollout.prefill_rows 4 --batch.rows 4 "
    "--batch.max_micro_batches 16 --eval.questions 4 --eval.train_questions 0 --train.panel_questions 2 "
    "--optimizer.warmup_steps 0 --telemetry.tensorboard false"
)


def test_launch_notebook_trains_and_names_its_plot(repository, tmp_path):
    environment = {**os.environ, "HPTJAX_OVERRIDES": f"{SMALL} --runs_dir {tmp_path / 'runs'}"}
    done = subprocess.run(
        [sys.executable, str(repository / "launch" / "notebook.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plot = tmp_path / "runs" / "notebook" / "plot.png"
    assert done.stdout.rstrip().endswith(str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "pass@1" in done.stdout
    assert done.stdout.count("=") >= 4  # completions of a question, one per line
