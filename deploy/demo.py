"""`midspan demo`: the main job in a minute, with a kill -9 in the middle of it."""

from __future__ import annotations

import click

PROMPT = "Once upon a time, there was a brave mouse named Lily."
KILL_AFTER_TOKENS = 40


@click.command()
@click.option("--prompt", default=PROMPT, show_default=True)
@click.option("--seed", default=7, show_default=True)
@click.option("-n", "--max-new-tokens", default=200, show_default=True)
def demo(prompt: str, seed: int, max_new_tokens: int) -> None:
    """Start a pool, stream a story through it, kill the serving worker on the way."""
    from common.processes import set_up_torch

    set_up_torch(threads=1)
    from common.demo_model import find_model
    from common.errors import MidspanError
    from deploy.pool import LocalPool, PoolSettings
    from edge_agent.cli import format_stats
    from edge_agent.ends import load_ends
    from edge_agent.generation import Generation, start_generation
    from edge_agent.sampler import SamplingSettings
    from edge_agent.session import Session
    from edge_agent.tokenizer import TextTokenizer

    click.echo("Starting an embedded Redis, a broker and two workers …")
    with LocalPool(PoolSettings(workers=2)) as pool:
        directory = find_model(None)
        ends, tokenizer = load_ends(directory), TextTokenizer(directory)
        click.echo(
            f"Ready. Layers 0-{ends.cut.begin} and {ends.cut.end}-{ends.tail.span.last} of "
            f"{ends.name} run here, layers {ends.cut.middle} in the pool.\n"
        )

        def begin() -> Generation:
            client = pool.connect()
            sampling = SamplingSettings(temperature=0.7, top_p=0.95, seed=seed)
            session = Session(ends, client)
            return start_generation(session, tokenizer, prompt, max_new_tokens, sampling)

        disturbed = begin()
        click.echo(click.style(prompt, bold=True), nl=False)
        killed = ""
        for piece in disturbed.stream():
            click.echo(piece, nl=False)
            if not killed and len(disturbed.token_ids) >= KILL_AFTER_TOKENS:
                killed = disturbed.session.last_worker_id
                pool.kill_worker(killed)
                click.echo(click.style(f" [kill -9 {killed}]", fg="red"), nl=False)
        click.echo(f"\n\n{format_stats(disturbed.stats.to_json())}\n")

        undisturbed = begin()
        for _ in undisturbed.stream():
            pass
        if undisturbed.token_ids != disturbed.token_ids:
            raise MidspanError("the story differs from that of a run in which nobody was killed")
        click.echo(
            f"Worker {killed or '(none)'} was killed with -9 and the text went on: its "
            f"{len(disturbed.token_ids)} tokens equal those of an undisturbed run."
        )
