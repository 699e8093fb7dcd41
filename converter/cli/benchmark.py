"""`convert benchmark OUT`: how fast it answers, beside the merged model in 16 bits and the base with the adapter."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from converter.cli.options import (
    PRINTING,
    REPORT,
    REVISIONS,
    adapters_from,
    base_and_adapter,
    one_output,
    printing_from,
    take,
    with_device,
    with_help,
    with_offline,
    with_out_again,
    with_pickle,
)
from converter.cli.report import write_page
from converter.cli.values import Place
from converter.cli.watch import watch_run

if TYPE_CHECKING:
    from converter.latency.benchmark import Opening, Setting
    from converter.latency.measure import Server

EXAMPLES = """\b
Examples:
  convert benchmark OUT \\
    --base X --adapter Y
  convert benchmark OUT --rounds 10 \\
    --through vllm --report R.html
Exit code:
  0 measured
  1 nothing could be measured
  2 refused: the message says why
  3 base or adapter is missing
"""

_MANY: dict[str, Any] = {"type": click.IntRange(min=1), "metavar": "N", "show_default": True}


@cloup.command(short_help="Measure how fast an output answers, merged and unmerged.", epilog=EXAMPLES)
@click.argument("out", type=Place(), required=False)
@cloup.option_group(
    "Input",
    with_out_again,
    *base_and_adapter(
        base="Its base.  [default: as the receipt says]",
        adapter="Its adapter. If several were combined, repeat it in the same order.  [default: as the receipt says]",
    ),
    *REVISIONS.values(),
    with_offline,
    with_pickle,
)
@cloup.option_group(
    "Behaviour",
    cloup.option("--prompt-tokens", **_MANY, default=128, help="Tokens of each prompt."),
    cloup.option(
        "--new-tokens",
        type=click.IntRange(min=2),
        metavar="N",
        default=32,
        show_default=True,
        help="Tokens of each answer.",
    ),
    cloup.option("--rounds", **_MANY, default=3, help="How often each model is loaded and measured, in turns."),
    cloup.option("--requests", **_MANY, default=3, help="Answers that are measured in a round."),
    cloup.option(
        "--through",
        type=click.Choice(["transformers", "vllm"]),
        multiple=True,
        help="Measure through this server; may be repeated.  [default: transformers, and vLLM if it is found]",
    ),
    cloup.option(
        "--vllm",
        type=Place("file"),
        metavar="PATH",
        help="Path of vLLM's command.  [default: vllm, as found on PATH]",
    ),
    cloup.option(
        "--vllm-arguments", metavar="TEXT", default="", help="More arguments of vllm serve, as a shell takes them."
    ),
    cloup.option(
        "--scratch",
        type=Place(),
        metavar="PATH",
        help="Folder for the merged model, which is removed.  [default: the system's]",
    ),
    with_device,
    REPORT,
    *PRINTING,
    with_help,
)
def benchmark(out: str | None, also_out: str | None, **options: Any) -> None:
    """Measure the first token, the time per token and tokens a second of base and adapter unmerged, of the merged model
    in 16 bits, and of OUT.

    One model is loaded at a time, in turns.
    """
    place = Path(one_output(out, also_out, "convert benchmark OUT"))
    from converter.cli.printing import print_text
    from converter.cli.show.benchmark import benchmark_json, benchmark_text
    from converter.cli.show.progress import display
    from converter.cli.show.words import json_text
    from converter.cli.surroundings import refuse_without_memory
    from converter.compare import Sources
    from converter.job import RunOptions
    from converter.latency.benchmark import benchmark_output
    from converter.latency.measure import Workload
    from converter.observer import Observer
    from converter.page import benchmark_page

    refuse_without_memory()
    printing, adapter, scratch = printing_from(options), adapters_from(options), options.pop("scratch")
    workload = Workload(**take(options, "prompt_tokens", "new_tokens", "rounds", "requests"))
    servers = _servers(**take(options, "through", "vllm", "vllm_arguments"))
    against = Sources(options["base"], adapter, options["base_revision"], options["adapter_revision"])
    how = RunOptions(**take(options, "device", "offline", "allow_pickle"))
    below = None if scratch is None else Path(scratch).expanduser()
    stop = click.get_current_context().obj
    watch = watch_run(printing, place)
    with display(printing.progress) as shown:
        observer = Observer(watch.beside(shown).progress, stop)
        found = benchmark_output(place, against, workload, servers, how, observer, scratch=below)
    told = benchmark_json(found)
    watch.result({one["through"]: one["latencies"] for one in told["servers"]})
    if printing.report is not None:
        write_page(printing.report, benchmark_page(told, place.expanduser().resolve().name))
    if printing.as_json:
        print_text(json_text(told))
    elif not printing.quiet:
        print_text(benchmark_text(place, found))


def _servers(through: tuple[str, ...], vllm: str | None, vllm_arguments: str) -> list[Opening]:
    """The servers to measure through. `ConversionRefused` if vLLM is asked for and is not installed."""
    import shlex
    import shutil

    from converter.errors import BadRecipe, ConversionRefused

    program = shutil.which(str(Path(vllm).expanduser()) if vllm is not None else "vllm")
    names = through or ("transformers", *(["vllm"] if program is not None or vllm is not None else []))
    if "vllm" in names and program is None:
        raise ConversionRefused(
            f"{vllm}: no program" if vllm is not None else "vllm: no such command here; give its path with `vllm`"
        )
    try:
        arguments = shlex.split(vllm_arguments)
    except ValueError as exc:
        raise BadRecipe(f"`vllm_arguments` {vllm_arguments!r:.60}: {exc}") from exc
    openings: dict[str, Opening] = {
        "transformers": _in_transformers,
        "vllm": partial(_in_vllm, program or "", arguments),
    }
    return [openings[name] for name in dict.fromkeys(names)]


def _in_transformers(setting: Setting) -> Server:
    from converter.latency.in_transformers import InTransformers

    return InTransformers(setting.dtype, setting.device, setting.tick)


def _in_vllm(program: str, arguments: list[str], setting: Setting) -> Server:
    from converter.latency.in_vllm import InVllm

    return InVllm(program, setting.dtype, setting.room, setting.tick, arguments)
