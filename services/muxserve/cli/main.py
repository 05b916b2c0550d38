"""`muxserve`: the command line. Commands import what they need when they run, so that --help is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from muxserve.cli import operations, planning
from muxserve.cli.bench import bench
from muxserve.cli.defaults import DEFAULT_ADDRESS, DEFAULT_ADMIN, Admin, Json

app = typer.Typer(
    name="muxserve",
    help="Serve many LLMs of unequal popularity on few devices, behind one endpoint.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
quota_app = typer.Typer(help="Show and set block quotas.", no_args_is_help=True)
app.add_typer(quota_app, name="quota")
app.command()(bench)
planning.register(app)
operations.register(app)

BAD_USAGE = 2

Address = Annotated[str, typer.Option(envvar="MUXSERVE_ADDRESS", help="host:port of the gateway.")]
ModelName = Annotated[str, typer.Option("--model", "-m", help="Name of a served model.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens to generate. Default: what fits.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. Default: 1.")]
TopP = Annotated[float | None, typer.Option(help="Nucleus, in (0, 1]. Default: 1.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k most likely tokens. Default: all.")]
MinP = Annotated[float | None, typer.Option(help="Least probability, relative to the most likely token.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text. Default: drawn.")]
Stop = Annotated[list[str] | None, typer.Option(help="String that ends the generation; repeatable.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds that the call may take. Default: 600.")]


@app.command()
def up(
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH[,dtype=D]",
            help="Serve the checkpoint PATH (GGUF file or Hugging Face directory) as NAME; repeatable. "
            "Options after commas: dtype (auto, float32, bfloat16), rate, quota_blocks, max_context.",
        ),
    ] = None,
    arena: Annotated[str | None, typer.Option(help="Size of the KV arena. Default: 512MiB.")] = None,
    cores: Annotated[int | None, typer.Option(help="Cores to compute with. Default: all.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes. Default: 1.")] = None,
    block_bytes: Annotated[str | None, typer.Option(help="Size of a KV block. Default: 16KiB.")] = None,
    weight_budget: Annotated[str | None, typer.Option(help="Most memory for weights, per worker.")] = None,
    policy: Annotated[str | None, typer.Option(help="Scheduling policy. Default: mux.")] = None,
    port: Annotated[int | None, typer.Option(help="Gateway's port; 0: any free. Default: 8600.")] = None,
    admin_port: Annotated[
        int | None, typer.Option(help="Placement service's port; 0: any free. Default: 8601.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Where both listen. Default: 127.0.0.1.")] = None,
    log_level: Annotated[str | None, typer.Option(help="Least level in the logs. Default: info.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with these settings.")] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="Written with the addresses, as JSON, once everything serves.")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="For the logs. Default: .muxserve/run-TIME.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KIND.KEY=VALUE", help="Further setting of a service; repeatable."),
    ] = None,
) -> None:
    """Start everything on this machine: an embedded Valkey and all services. Ctrl-C stops it.

    Settings come from flags, then MUXSERVE_* environment variables, then the --config file.
    """
    from muxserve.cli import up as command
    from muxserve.common.config import parse_models, parse_service_settings, read_deployment
    from muxserve.common.settings import SettingsError

    given = {
        "arena": arena,
        "cores": cores,
        "workers": workers,
        "block_bytes": block_bytes,
        "weight_budget": weight_budget,
        "policy": policy,
        "port": port,
        "admin_port": admin_port,
        "host": host,
        "log_level": log_level,
    }
    flags: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    try:
        if model:
            flags["models"] = parse_models(model)
        if settings:
            flags["settings"] = parse_service_settings(settings)
        deployment = read_deployment(flags, config)
    except SettingsError as error:
        fail(str(error), BAD_USAGE)
    if ready_file is not None and not ready_file.absolute().parent.is_dir():
        fail(f"--ready-file: no directory {ready_file.absolute().parent}", BAD_USAGE)
    raise typer.Exit(command.run(deployment, run_dir, ready_file))


@app.command()
def serve(
    service: Annotated[
        Literal["gateway", "placement", "scheduler", "worker"], typer.Argument(help="Which one.")
    ],
    config: Annotated[Path | None, typer.Option(help="YAML file with its settings.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; repeatable.")
    ] = None,
) -> None:
    """Run one service in this process, for containers.

    Settings come from --set, then MUXSERVE_* environment variables, then the --config file.
    """
    import runpy

    flags = [part for assignment in settings or [] for part in ("--set", assignment)]
    sys.argv = [f"muxserve serve {service}", *(["--config", str(config)] if config else []), *flags]
    runpy.run_module(f"muxserve.{service}", run_name="__main__")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    model: ModelName,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of text.")] = False,
    priority: Annotated[int, typer.Option(help="Higher goes first, -100 to 100.")] = 0,
    tenant: Annotated[str, typer.Option(help="On whose behalf.")] = "",
    timeout: Timeout = None,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Continue a text. Standard output holds the completion and a newline, and nothing else."""
    from muxserve.cli import generate as command
    from muxserve.client import Arguments

    arguments: Arguments = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "stop": stop,
        "ignore_eos": ignore_eos,
        "priority": priority,
        "tenant": tenant,
        "timeout": timeout,
    }
    text = sys.stdin.read() if prompt == "-" else prompt
    raise typer.Exit(command.run(address, model, text, arguments))


@app.command()
def chat(
    model: ModelName,
    message: Annotated[
        str | None, typer.Argument(help="Ask this and print the answer. Default: a conversation.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    timeout: Timeout = None,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Talk to a model. In a conversation, /new starts over and /exit or Ctrl-D ends it."""
    from muxserve.cli import chat as command
    from muxserve.client import Arguments

    arguments: Arguments = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "timeout": timeout,
    }
    raise typer.Exit(command.run(address, model, message, system, arguments))


@app.command()
def models(json: Json = False, address: Address = DEFAULT_ADDRESS) -> None:
    """List the models and whether they are ready."""
    from muxserve.cli import models as command

    raise typer.Exit(command.run(address, as_json=json))


@app.command()
def status(json: Json = False, admin: Admin = DEFAULT_ADMIN) -> None:
    """Show models, block pools, executors and services. With --json: one object, described in docs/cli.md."""
    from muxserve.cli import status as command

    raise typer.Exit(command.run(admin, as_json=json))


@quota_app.command("show")
def quota_show(
    unit: Annotated[str, typer.Option(help="Unit. Default: the only one.")] = "",
    json: Json = False,
    admin: Admin = DEFAULT_ADMIN,
) -> None:
    """Show the block quotas of a unit."""
    from muxserve.cli import quota as command

    raise typer.Exit(command.show(admin, unit, as_json=json))


@quota_app.command("set")
def quota_set(
    model: Annotated[str, typer.Argument(help="Model.")],
    blocks: Annotated[int, typer.Argument(help="Blocks that it may hold without borrowing.", min=0)],
    unit: Annotated[str, typer.Option(help="Unit. Default: the only one.")] = "",
    if_revision: Annotated[
        int | None, typer.Option(help="Only if this is the quotas' revision.", min=1)
    ] = None,
    follow: Annotated[
        float, typer.Option(help="Seconds to wait until it is applied; 0: do not.", min=0, metavar="SECONDS")
    ] = 0.0,
    admin: Admin = DEFAULT_ADMIN,
) -> None:
    """Set the block quota of a model, until the policy adapts it again."""
    from muxserve.cli import quota as command

    raise typer.Exit(command.set_quota(admin, model, blocks, unit, if_revision, follow))


@app.command()
def healthcheck(
    address: Annotated[str, typer.Argument(help="host:port of any service.")],
    service: Annotated[str, typer.Option(help="Full name of a gRPC service; empty: the process.")] = "",
) -> None:
    """Exit with 0 if a service is healthy, else with 1."""
    from muxserve.cli import health as command

    raise typer.Exit(command.run(address, service))


def fail(message: str, code: int) -> NoReturn:
    """Say what is wrong on standard error, and exit."""
    for line in message.splitlines():
        typer.echo(f"error: {line}", err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
