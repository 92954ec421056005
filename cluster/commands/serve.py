"""`gyre serve`: starts the server, says where it is, and stays."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.options import Json, Model, check_json, open_console, write_json


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback needs GYRE_SERVE_TOKEN.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Processes with the model each.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Requests that go through the model together, at most.")] = 64,
    wait_ms: Annotated[float, typer.Option(min=0, help="How long an idle model's first request waits for more.")] = 2.0,
    follow_s: Annotated[
        float, typer.Option(min=0, help="Seconds between two looks at where an alias points; 0: never.")
    ] = 5.0,
    max_texts: Annotated[int, typer.Option(min=1, help="Of one request.")] = 256,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of one request.")] = 4_000_000,
    json_file: Json = None,
) -> None:
    """Serve a model over HTTP in OpenAI's embeddings protocol; a promotion is followed while it runs."""
    check_json(json_file)
    from cluster.console import show_lines
    from cluster.models.reference import resolve
    from cluster.serving.deployment import ServeConfig, serving, wait_for_ever
    from cluster.serving.protocol import Limits

    config = ServeConfig(model, host, port, replicas, batch, wait_ms, follow_s, Limits(max_body_bytes, max_texts))
    resolve(model)  # before anything is said to start
    console = open_console()
    show_lines(console, f"starting {replicas} replica{'s' * (replicas > 1)} of {model}")
    with serving(config) as server:
        write_json(json_file, server.as_dict())
        auth = ' -H "Authorization: Bearer $GYRE_SERVE_TOKEN"' if server.token else ""
        show_lines(
            console,
            f"{server.model}, {server.dimensions} dimensions, at {server.url}; Ctrl-C ends it",
            f'  curl {server.url}/embeddings{auth} -d \'{{"input": "how to read a file", "input_type": "query"}}\'',
        )
        wait_for_ever()
