"""`hptjax plan`: topologies and meshes in, tables and a status out."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from hptjax.build.mesh import check_mesh, training_rules
from hptjax.config import Config
from hptjax.config_batch import mesh_sizes, mesh_words
from hptjax.models.shape import DecoderConfig
from hptjax.plan.chips import Slices, parse_topology
from hptjax.plan.model import decoder_shape
from hptjax.plan.plan import Plan, make_plan
from hptjax.plan.report import print_plan, print_ranking, to_json
from hptjax.plan.search import candidates, largest_multiple
from hptjax.plan.topology import compile_only_devices, mesh_for
from hptjax.rundir import compile_cache_folder
from hptjax.sharding.rules import parts

COMPILED_CANDIDATES = 4  # of a search, that fit
MOST_COMPILED = 8  # with those that do not
TOKENS_OF_A_MICRO_BATCH = 2**24 - 1  # the train step refuses more, see `train.accumulate`
REMATS = ("full", "attention", "dots_no_batch", "none")  # that a search tries


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one topology is planned with.

    Args
      devices: compile-only ones. cache: folder of earlier results. say: told what is being compiled.
    """

    shape: DecoderConfig
    slices: Slices
    devices: list[Any]
    cache: pathlib.Path | None
    say: Callable[[str], None]

    def plan(self, config: Config, only: tuple[str, ...] | None = None) -> Plan:
        """The plan of a config whose mesh fits."""
        return make_plan(config, self.shape, self.slices, self.devices, cache=self.cache, only=only, say=self.say)


def plan_command(
    config: Config,
    topologies: Sequence[str],
    *,
    slices: int = 1,
    largest: bool = True,
    search: bool = False,
    cache: pathlib.Path | None = None,
    json_path: pathlib.Path | None = None,
) -> int:
    """Prints the plans of a config on some topologies; 0 where all fit, 1 where one does not.

    Args
      topologies: such as v5e:4x4. slices: of each, where the name does not say. largest: look for the largest batch.
      search: try other meshes, rows and remat policies. cache: folder of results; None: beside the compiled programs.
    """
    wanted = [parse_topology(text) for text in topologies]
    wanted = [dataclasses.replace(one, count=slices) if one.count == 1 else one for one in wanted]
    configs = [config if search else mesh_for(config, one) for one in wanted]
    shape = decoder_shape(config)
    for its_config in () if search else configs:
        check_mesh(its_config, shape)
    folder = made_folder(cache or compile_cache_folder() / "plan")
    plans: list[Plan] = []
    for one, its_config, devices in zip(wanted, configs, [compile_only_devices(one) for one in wanted], strict=True):
        with progress() as say:
            asked = Asked(shape, one, devices, folder, say)
            plan = best_plan(asked, its_config) if search else asked.plan(its_config)
            if largest and not search:
                most, too_many = largest_rows(asked, its_config, plan)
                plan = dataclasses.replace(plan, largest_rows=most, too_many_rows=too_many)
        plans.append(plan)
        print_plan(plan, sys.stdout)
        if json_path is not None:
            json_path.write_text(to_json(plans), encoding="utf-8")
    return 1 if any(plan.too_large() for plan in plans) else 0


def made_folder(folder: pathlib.Path) -> pathlib.Path:
    """The folder of earlier results, made where it was not. Raises one that cannot be written -> ValueError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(
            f"expected a folder for earlier results that can be written, got {error}; change --cache."
        ) from None


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Gives the function that is told what is being compiled: a spinner on a terminal, plain lines elsewhere."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda line: print(f"compiling {line}", file=sys.stderr, flush=True)
        return
    with console.status("compiling") as status:
        yield lambda line: status.update(f"compiling {line}")


def largest_rows(asked: Asked, config: Config, plan: Plan) -> tuple[int, int | None]:
    """The largest `batch.rows` with which the train step was found to fit (0: none), and the smallest found not to."""

    def peak(rows: int) -> float:
        if rows == plan.rows:
            found = plan
        else:
            asked.say(f"{rows} rows")
            changed = dataclasses.replace(config, batch=dataclasses.replace(config.batch, rows=rows))
            found = asked.plan(changed, only=("train step",))
        return float("inf") if found.too_large() and "train step" in found.too_large() else train_peak(found)

    return largest_multiple(
        peak,
        fixed=plan.programs["train step"].compiled.argument_bytes,
        unit=parts(mesh_sizes(config), "batch", training_rules(config)),
        start=plan.rows,
        room=float(plan.usable_bytes),
        most=TOKENS_OF_A_MICRO_BATCH // config.batch.row_tokens,
    )


def train_peak(plan: Plan) -> float:
    """Bytes of the train step of a plan."""
    return plan.programs["train step"].peak_bytes


def best_plan(asked: Asked, config: Config) -> Plan:
    """The full plan of the best of the compiled candidates; prints how they rank.

    Raises no candidate that may fit -> ValueError that says what the smallest would need.
    """
    found = candidates(config, asked.shape, asked.slices, REMATS)
    ranked: list[tuple[float, Plan, Config]] = []
    refused: dict[
        str, float
    ] = {}  # remat -> the analytic model's bytes of the smallest that the compiler found too large
    for candidate in found:
        chosen = candidate.config
        if sum(speed > 0 for speed, _, _ in ranked) >= COMPILED_CANDIDATES or len(ranked) >= MOST_COMPILED:
            break
        if candidate.bytes >= refused.get(chosen.model.remat, math.inf):
            continue
        words = f"{mesh_words(chosen)}, batch.rows {chosen.batch.rows}, remat {chosen.model.remat}"
        asked.say(f"candidate {len(ranked) + 1}: {words}")
        plan = asked.plan(chosen, only=("train step",))
        seconds = plan.programs["train step"].time.seconds or math.inf
        if plan.too_large():
            refused[chosen.model.remat] = candidate.bytes
        ranked.append((0.0 if plan.too_large() else plan.rows * plan.row_tokens / seconds, plan, chosen))
    ranked.sort(key=lambda entry: -entry[0])
    print_ranking([(speed, plan) for speed, plan, _ in ranked], len(found), sys.stdout)
    return asked.plan(ranked[0][2])
