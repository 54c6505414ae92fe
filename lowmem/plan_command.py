"""What `plan` prints and draws, and what `train` does about --device_memory and --host_memory."""

import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from lowmem.config import TrainConfig
from lowmem.parallel.launch import check_launch, processes_to_start
from lowmem.parallel.launched import launched_processes
from lowmem.plan import Place, Prediction, choose, gigabytes, predicting, variants


def plan(config: TrainConfig, fixed: Iterable[str]) -> None:
    """Print what `config`, or what is chosen to fit, takes; each tier, saver and strategy beside it; draw plan.png."""
    place = _place(config)
    print(_told(config, place), flush=True)
    with predicting(place) as predict:
        if config.device_memory or config.host_memory:
            before = config
            config, asked = choose(config, place, fixed, predict, print)
            print(f"chosen: {', '.join(flags_between(before, config)) or 'as asked'}")
        else:
            (asked,) = predict([config])
        print("\n".join(["", *table_of_parts(asked)]), flush=True)
        others = variants(config, place)
        predicted = predict(config for _, _, config in others)
    rows = [("as above", "", asked), *((name, costs, p) for (name, costs, _), p in zip(others, predicted, strict=True))]
    print("\n".join(["", *table_of_variants(rows)]))
    print(_draw([(name, prediction) for name, _, prediction in rows], Path(config.output_dir)))


def fitted(config: TrainConfig, fixed: Iterable[str]) -> TrainConfig:
    """The config of the fastest settings that fit, told by the first process. Raises UsageError if none does."""
    is_first = os.environ.get("RANK", "0") == "0"

    def tell(line: str) -> None:
        if is_first:
            print(line, flush=True)

    check_launch(config.num_processes)
    place = _place(config)
    tell(_told(config, place))
    with predicting(place) as predict:
        fitting, _ = choose(config, place, fixed, predict, tell)
    tell(f"chosen: {', '.join(flags_between(config, fitting)) or 'as asked'}")
    return fitting


def _place(config: TrainConfig) -> Place:
    """Under a launcher its processes, else those that `train` would start. A limit of device memory means a GPU."""
    launched = launched_processes()
    world_size = launched or config.num_processes or processes_to_start(None)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if launched else world_size
    if config.device_memory is None:
        import torch

        return Place(world_size, local, torch.cuda.is_available())
    return Place(world_size, local, True)


def _told(config: TrainConfig, place: Place) -> str:
    where = "a GPU each" if place.on_gpu else "this CPU (for a GPU, set --device_memory)"
    model, rows = config.model_name_or_path or config.model_config, config.batch_size
    return f"predicted for {place.world_size} x {where}: {model}, micro-batches of {rows} x {config.max_seq_len} tokens"


def flags_between(before: TrainConfig, after: TrainConfig) -> list[str]:
    """The flags that make one config of the other."""
    return [f"--{name}={value}" for name, value in vars(after).items() if value != getattr(before, name)]


def table_of_parts(prediction: Prediction) -> list[str]:
    """Where bytes go: on a device, on the host and on disk."""
    lines = []
    places = {"device, of each process, at its peak": prediction.device, "host, of this machine": prediction.host}
    for place, parts in (places | {"disk": prediction.disk}).items():
        lines.append(f"{place}: {gigabytes(sum(parts.values()))}")
        lines += [f"  {name:<28}{gigabytes(size):>12}" for name, size in parts.items() if size]
    return lines


def table_of_variants(rows: Sequence[tuple[str, str, Prediction]]) -> list[str]:
    """What each setting buys: bytes, and x those of the first row; and what it costs."""
    first = rows[0][2].device_bytes
    lines = [f"{'':<34}{'device':>12}{'x':>7}{'host':>12}{'disk':>12}  costs"]
    for name, costs, prediction in rows:
        sizes = [prediction.device_bytes, prediction.host_bytes, sum(prediction.disk.values())]
        device, host, disk = map(gigabytes, sizes)
        lines.append(f"{name:<34}{device:>12}{sizes[0] / first:>7.2f}{host:>12}{disk:>12}  {costs}".rstrip())
    return lines


def _draw(bars: Sequence[tuple[str, Prediction]], output: Path) -> str:
    """Draw the devices' parts into the output folder, or this one if there is none yet. Returns a line that tells."""
    if find_spec("matplotlib") is None:
        return "no picture: matplotlib is not installed (pip install 'lowmem[plot]')"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.5 + 0.4 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(part for _, prediction in bars for part in prediction.device))
    left = [0.0] * len(bars)
    for name in names:
        widths = [prediction.device.get(name, 0) / 10**9 for _, prediction in bars]
        axes.barh(range(len(bars)), widths, left=left, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("GB on the device of each process, at its peak")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    path = (output if output.is_dir() else Path()) / "plan.png"
    figure.savefig(path, dpi=120)
    return f"{path} is a picture of it"
