"""One of two processes of a run whose rollouts come from a server: it fails once, and is taken up again.

`test_outside.py` starts it twice: python -m tests.outside_pair FOLDER PORT PROCESS URL
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from hptjax.config import Config
from hptjax.config_server import ServerCall, ServerConfig
from hptjax.sharding import distributed
from tests.multihost_pair import compiled_once, outcome, pair_config
from tests.test_config import changed


def served_pair(folder: Path, url: str, **explicit) -> Config:
    """One step of GRPO over two devices, sampled by the server at an address."""
    call = ServerCall("/take", '{"model_path": "{folder}", "names": ["{version}"]}')
    server = ServerConfig(
        url=url, model="tiny", weights_folder=str(folder / "weights"), updates=(call,), attempts=1, concurrency=4
    )
    return changed(
        dataclasses.replace(pair_config(folder, "tiny", **explicit), method="dr_grpo"),
        rollout__engine="server",
        rollout__server=server,
        hpt__sampler_correction="token_tis",
        train__steps=1,
        eval__questions=1,
        train__panel_questions=1,
    )


if __name__ == "__main__":
    folder, port, process, url = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    explicit = {"mode": "explicit", "coordinator": f"localhost:{port}", "processes": 2, "process": process}
    config = served_pair(folder, url, **explicit)
    distributed.initialize(**explicit)
    with compiled_once():
        outcomes = [outcome(config, "") for _ in range(2)]
    (folder / f"outcome_{process}.json").write_text(json.dumps(outcomes))
