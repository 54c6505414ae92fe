"""The command `plan`, and the choice of settings for `train` if --device_memory or --host_memory is set."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from lowmem.config.sizes import parse_bytes
from lowmem.config.train_config import FIELDS, TrainConfig
from lowmem.distributed.launcher import launched_processes
from lowmem.distributed.setup import check_launch
from lowmem.errors import UsageError
from lowmem.plan.alternatives import NOTHING_MEANS, Alternative, alternatives, price, variants
from lowmem.plan.choose import Choice, choose
from lowmem.plan.parts import Cluster, Kind
from lowmem.plan.predict import (
    CONTEXT,
    Predict,
    Prediction,
    gigabytes,
    planners,
    predicted_or_refused,
    predicting,
    visible_gpus,
)

_OFFLOADS = ("offload_activations", "cpu_offload", "offload_weights")
_NOT_ADVISED = {"optimizer", "num_processes", *_OFFLOADS}
_PLANNING_SECONDS = 900.0  # how long other ranks wait for rank 0 to plan; even large models take far less


def plan(config: TrainConfig, fixed: Iterable[str], *, is_own_loop: bool = False) -> None:
    """Fit `config` to its limits, print its memory and that of `variants` or `alternatives`, and draw plan.png.

    Set `is_own_loop` if the command `train` calls another function than lowmem's, which is the one that is predicted.
    Raises UsageError after this if nothing fits.
    """
    config = _plain(config)
    output = Path(config.output_dir)
    if find_spec("matplotlib"):
        _check_folder(output)
    with planners(config.host_memory) as pool:
        cluster = _cluster(config, pool, is_own_loop)
        predict = predicting(pool, cluster)
        if config.device_memory or config.host_memory:
            choice = _chosen(config, cluster, fixed, predict)
        else:
            choice = Choice("no change", config, next(predict([config])))
        print("\n".join(["", *table_of_parts(choice.predicted)]), flush=True)
        rows = [("as above", "", choice.predicted)]
        if not choice.missing:
            names, costs, configs = zip(*variants(choice.config, cluster), strict=True)
            found = predicted_or_refused(choice.config, configs, predict)
            named = zip(names, costs, found, strict=True)
            rows += [(name, cost, each) for name, cost, (_, each) in named if not isinstance(each, UsageError)]
            print("\n".join(["", *table_of_variants(rows)]), flush=True)
        if choice.missing or _offloads(config, choice):
            found = _print_alternatives(config, cluster, fixed, choice, predict)
    print(_draw([(name, prediction) for name, _, prediction in rows], config.device_memory, output))
    if choice.missing:
        raise _nothing_fits(config, choice, found)


def _check_folder(folder: Path) -> None:
    """Make `folder`, or raise UsageError now and not after predictions, which take minutes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir={folder} cannot be made: {error.strerror}; set another folder") from error


def fitted(config: TrainConfig, fixed: Iterable[str], *, is_own_loop: bool = False) -> TrainConfig:
    """Return `config` with the fastest settings that fit its limits. Raises UsageError if none fit.

    Under a launcher, call this on every rank before `init_distributed`: rank 0 plans and sends its choice to all ranks.
    """
    check_launch(config.num_processes)
    plain = _plain(config)

    def find() -> dict[str, object]:
        with planners(config.host_memory) as pool:
            cluster = _cluster(plain, pool, is_own_loop)
            predict = predicting(pool, cluster)
            choice = _chosen(plain, cluster, fixed, predict)
            if choice.missing:
                raise _nothing_fits(plain, choice, _print_alternatives(plain, cluster, fixed, choice, predict))
        if _offloads(plain, choice):
            print("`plan` with the same flags lists what fits without this offload, and at what price", flush=True)
        return _changes(plain, choice.config)

    if (launched_processes() or 1) == 1:
        return dataclasses.replace(config, **find())
    from lowmem.distributed.before_init import call_on_rank_0

    waits = {"limit_seconds": _PLANNING_SECONDS, "start_seconds": config.heartbeat_timeout}
    return dataclasses.replace(config, **call_on_rank_0(find, **waits))


def _plain(config: TrainConfig) -> TrainConfig:
    """Return the fields of TrainConfig, without those of a derived class: a planning process may not know the class."""
    return TrainConfig(**{name: getattr(config, name) for name in FIELDS})


def _cluster(config: TrainConfig, pool: Executor, is_own_loop: bool) -> Cluster:
    """Return (and print) the processes of the run. They use GPUs if any is visible or --device_memory is set."""
    launched = launched_processes()
    world_size = launched or config.num_processes
    gpus = visible_gpus(pool) if config.device_memory is None or world_size is None else 0
    world_size = world_size or max(1, gpus)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if launched else world_size
    on_gpu = config.device_memory is not None or gpus > 0
    where = "GPU" if on_gpu else "this CPU (for a GPU, set --device_memory)"
    model, rows = config.model_name_or_path or config.model_config, config.batch_size
    about = f"predicted for {world_size} x {where}: {model}, micro-batches of {rows} x {config.max_seq_len} tokens"
    print(f"{about}, for lowmem's own train(), which yours replaces" if is_own_loop else about, flush=True)
    return Cluster(world_size, local, on_gpu)


def _chosen(config: TrainConfig, cluster: Cluster, fixed: Iterable[str], predict: Predict) -> Choice:
    """Run `choose`, and print what it tries and what it chooses."""
    choice = choose(config, cluster, fixed, predict, partial(print, flush=True))
    flags = ", ".join(flags_between(config, choice.config)) or "no change"
    if choice.missing:
        print(f"nothing fits; the closest setting: {flags}", flush=True)
    else:
        print(f"chosen: {flags}; costs: {_price(config, cluster, choice)}", flush=True)
    return choice


def _price(config: TrainConfig, cluster: Cluster, found: Choice | Alternative) -> str:
    return price(config, found.config, cluster, found.predicted.step_seconds)


def _offloads(config: TrainConfig, choice: Choice) -> bool:
    """Whether `choice` offloads what `config` does not."""
    return any(name in _changes(config, choice.config) for name in _OFFLOADS)


def _print_alternatives(
    config: TrainConfig, cluster: Cluster, fixed: Iterable[str], choice: Choice, predict: Predict
) -> list[Alternative]:
    """Print and return `alternatives`, each with its flags, bytes and price. Advise to use lean if it is among them."""
    what = "what would fit" if choice.missing else "what also fits"
    print(f"\n{what}, if you add these flags to yours:", flush=True)
    found = []
    for each in alternatives(config, cluster, fixed, choice, predict):
        found.append(each)
        sizes = {"device": each.predicted.device_bytes, "host": each.predicted.host_bytes}
        sizes["disk"] = sum(each.predicted.disk.values())
        needs = ", ".join(f"{name} {gigabytes(size)}" for name, size in sizes.items())
        print(f"  {' '.join(flags_between(config, each.config))}")
        print(f"      {needs}; costs: {_price(config, cluster, each)}", flush=True)
    if not found:
        print("  nothing that this program knows of")
    for each in found:
        changed = _changes(config, each.config)
        if changed.get("memory") == "lean" and not choice.missing and not changed.keys() & _NOT_ADVISED:
            flags = " ".join(flags_between(config, each.config))
            why = "nothing is offloaded; it is not chosen because it changes the loss, within the spread of seeds"
            print(f"advice: prefer {flags}: {why}")
            break
    return found


def _nothing_fits(config: TrainConfig, choice: Choice, found: Sequence[Alternative]) -> UsageError:
    advice = "raise the limit, or use a smaller model"
    if found:
        advice = f"add the flags of one line above, such as {' '.join(flags_between(config, found[0].config))}"
    return UsageError(f"nothing fits: the closest setting, {choice.rung}, needs {choice.missing}: {advice}")


def flags_between(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Return the flags that change `before` into `after`."""
    return [f"--{name}={value}" for name, value in _changes(before, after).items()]


def _changes(before: TrainConfig, after: TrainConfig) -> dict[str, object]:
    return {name: value for name, value in vars(after).items() if value != getattr(before, name)}


def table_of_parts(prediction: Prediction) -> list[str]:
    """List the bytes of each part (weights, gradients, ...) on a device, on the host and on disk."""
    lines = []
    resources = {"device, peak per process": prediction.device, "host, this machine": prediction.host}
    if prediction.stages:
        number = prediction.stages.index(max(prediction.stages)) + 1
        where = f"device, peak per process of stage {number} of {len(prediction.stages)}, which needs most"
        resources = {where: prediction.device, "host, this machine": prediction.host}
    for resource, parts in (resources | {"disk": prediction.disk}).items():
        lines.append(f"{resource}: {gigabytes(sum(parts.values()))}")
        lines += [f"  {name:<28}{gigabytes(size):>12}" for name, size in parts.items() if size]
    if prediction.stages:
        lines.append(f"device, each stage: {', '.join(map(gigabytes, prediction.stages))}")
    elif prediction.sent_bytes:
        lines.append(f"in each step, a process sends {gigabytes(prediction.sent_bytes)} to others")
    return [*lines, *filter(None, [prediction.streaming, prediction.pipeline])]


def table_of_variants(rows: Sequence[tuple[str, str, Prediction]]) -> list[str]:
    """List the memory and the cost of each setting. Column "x" is device memory relative to the first row."""
    first = rows[0][2].device_bytes
    lines = [f"{'':<34}{'device':>12}{'x':>7}{'host':>12}{'disk':>12}  costs"]
    for name, costs, prediction in rows:
        sizes = [prediction.device_bytes, prediction.host_bytes, sum(prediction.disk.values())]
        device, host, disk = map(gigabytes, sizes)
        lines.append(f"{name:<34}{device:>12}{sizes[0] / first:>7.2f}{host:>12}{disk:>12}  {costs}".rstrip())
    return [*lines, *[NOTHING_MEANS] * any(costs == "nothing" for _, costs, _ in rows)]


def _draw(bars: Sequence[tuple[str, Prediction]], device_memory: str | None, output: Path) -> str:
    """Draw each prediction's device bytes and the limit into plan.png. Return a message with the file's path."""
    if find_spec("matplotlib") is None:
        return "no chart: matplotlib is not installed (pip install 'lowmem[plot]')"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.5 + 0.4 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(bars)
    for color, part in enumerate([kind for kind in Kind if kind != Kind.OFFLOADED] + [CONTEXT]):
        widths = [prediction.device.get(part, 0) / 10**9 for _, prediction in bars]
        if any(widths):
            axes.barh(range(len(bars)), widths, left=left, label=part, color=f"C{color}")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    if device_memory is not None:
        limit = f"--device_memory={device_memory}"
        axes.axvline(parse_bytes(device_memory) / 10**9, color="black", linestyle="--", label=limit)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("peak GB on the device of each process")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    path = output / "plan.png"
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        return f"{path}: not written ({error.strerror})"
    return f"{path}: chart of this table"
