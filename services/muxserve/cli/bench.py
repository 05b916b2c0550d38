"""`muxserve bench`: its flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

BAD_USAGE = 2


def bench(
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MODEL=]ADDRESS",
            help="host:port of a MuxServe gateway, or http://… of an OpenAI-compatible server; repeatable. "
            "MODEL= sends that model's requests there. Default: --address.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Model, most popular first; repeatable. Default: all, by name."),
    ] = None,
    rate: Annotated[float, typer.Option(help="Requests per second in all; a search begins there.")] = 1.0,
    alpha: Annotated[float, typer.Option(help="Popularity of the i-th model: (i + 1)^-alpha.", min=0)] = 1.3,
    duration: Annotated[float, typer.Option(help="Seconds that are measured; per probe of a search.")] = 60.0,
    warmup: Annotated[float, typer.Option(help="Seconds before that, not counted.", min=0)] = 5.0,
    seed: Annotated[int, typer.Option(help="Same seed, same requests.", min=0)] = 0,
    scale_lengths: Annotated[
        float, typer.Option(help="Factor on ShareGPT's mean lengths (161 in, 338 out).")
    ] = 1.0,
    prompt_tokens: Annotated[
        float | None, typer.Option(help="Mean prompt in tokens, in place of that.")
    ] = None,
    output_tokens: Annotated[
        float | None, typer.Option(help="Mean output in tokens, in place of that.")
    ] = None,
    fixed_lengths: Annotated[
        bool, typer.Option("--fixed-lengths", help="All as long as the mean. Default: log-normal.")
    ] = False,
    context: Annotated[
        int, typer.Option(help="Most tokens of prompt and output; clipped to the model's.")
    ] = 2048,
    trace: Annotated[
        Path | None, typer.Option(help="JSON lines with the requests to send (docs/bench.md).")
    ] = None,
    time_scale: Annotated[float, typer.Option(help="Seconds of the run for one of the trace.")] = 1.0,
    tenant: Annotated[
        list[str] | None, typer.Option(metavar="NAME=WEIGHT", help="Part of a tenant; repeatable.")
    ] = None,
    priority: Annotated[int, typer.Option(help="Of every request.", min=-100, max=100)] = 0,
    text: Annotated[bool, typer.Option("--text", help="Send text in place of token ids.")] = False,
    vocabulary: Annotated[int, typer.Option(help="Token ids are below this.", min=2)] = 1000,
    slo_scale: Annotated[float, typer.Option(help="SLO: so many times the unloaded latency.")] = 8.0,
    calibrate: Annotated[
        bool, typer.Option(help="Measure unloaded latencies first. Without them there is no SLO.")
    ] = True,
    calibration: Annotated[
        Path | None, typer.Option(help="File of unloaded latencies: read if it is there, else written.")
    ] = None,
    deadlines: Annotated[
        bool,
        typer.Option("--deadlines", help="Send each request's SLO as its deadline; --search always does."),
    ] = False,
    drain: Annotated[float, typer.Option(help="Seconds to wait for answers after the last arrival.")] = 60.0,
    search: Annotated[
        bool, typer.Option("--search", help="Find the highest rate at which 99% meet their SLO.")
    ] = False,
    probes: Annotated[int, typer.Option(help="Most rates that a search tries.", min=1)] = 8,
    resolution: Annotated[
        float, typer.Option(help="A search ends when what passed and what failed are this ratio apart.")
    ] = 1.08,
    api_key: Annotated[
        str, typer.Option(envvar="OPENAI_API_KEY", help="Bearer token for HTTP targets.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Raw results, JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plots, PNG.")] = None,
    save_trace: Annotated[Path | None, typer.Option(help="The requests, as --trace reads them.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as one line of JSON.")] = False,
    address: Annotated[
        str, typer.Option(envvar="MUXSERVE_ADDRESS", help="host:port of the gateway.")
    ] = "127.0.0.1:8600",
) -> None:
    """Load a server with requests and report latency, throughput, SLO attainment and fairness per model.

    Arrivals wait for no answer, and every latency counts from the moment at which the request was due.
    """
    try:
        from muxserve.bench import command
        from muxserve.bench.workload import SHAREGPT_OUTPUT, SHAREGPT_PROMPT, Lengths
    except ImportError as error:
        _refuse(f"{error.name} is not installed: pip install 'muxserve[bench]'")

    positive = {
        "--rate": rate,
        "--duration": duration,
        "--scale-lengths": scale_lengths,
        "--prompt-tokens": 1 if prompt_tokens is None else prompt_tokens,
        "--output-tokens": 1 if output_tokens is None else output_tokens,
        "--time-scale": time_scale,
        "--slo-scale": slo_scale,
        "--resolution (above 1)": resolution - 1,
    }
    for flag, value in positive.items():
        if not 0 < value < float("inf"):
            _refuse(f"{flag}: must be more than 0")
    lengths = Lengths(
        prompt=SHAREGPT_PROMPT * scale_lengths if prompt_tokens is None else prompt_tokens,
        output=SHAREGPT_OUTPUT * scale_lengths if output_tokens is None else output_tokens,
        context=context,
    )
    if fixed_lengths:
        lengths = Lengths(lengths.prompt, lengths.output, 0.0, 0.0, context)
    options = command.BenchOptions(
        targets=tuple(target or [address]),
        models=tuple(model or ()),
        rate=rate,
        alpha=alpha,
        duration=duration,
        warmup=warmup,
        seed=seed,
        lengths=lengths,
        trace=trace,
        time_scale=time_scale,
        tenants=_tenants(tenant or []),
        priority=priority,
        text=text,
        vocabulary=vocabulary,
        slo_scale=slo_scale,
        calibrate=calibrate,
        calibration=calibration,
        deadlines=deadlines,
        drain=drain,
        search=search,
        probes=probes,
        resolution=resolution,
        api_key=api_key,
        out=out,
        plot=plot,
        save_trace=save_trace,
        as_json=json,
    )
    raise typer.Exit(command.run(options))


def _tenants(given: list[str]) -> dict[str, float]:
    """Parts by tenant; the default tenant alone if none is given."""
    found = {}
    for entry in given:
        name, equals, weight = entry.partition("=")
        try:
            found[name] = float(weight) if equals else 1.0
        except ValueError:
            _refuse(f"--tenant: {weight} is not a number")
        if not 0 < found[name] < float("inf"):
            _refuse(f"--tenant: the weight of {name} must be more than 0")
    return found or {"": 1.0}


def _refuse(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(BAD_USAGE)
