"""``mergekit-lite preview``: hear what an alpha would answer, before it is written."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.commands import values

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.previewing.preview import Kept, OnTokens, Preview, Previewed
    from mergekit_lite.previewing.request import Prepared, Request
    from mergekit_lite.previewing.search import Beam

FILE = click.Path(dir_okay=False, path_type=Path)
COLUMN = 30  # characters: narrower answers stand one under another
FRAMES = 8  # a second, while answers grow


def _beam(_context: object, _option: object, text: str | None) -> Beam | None:
    """Parse ``W,K,L``; L may be ``inf``."""
    from mergekit_lite.previewing.search import Beam

    if text is None:
        return None
    try:
        width, successors, length = text.split(",")
        return Beam(int(width), int(successors), math.inf if length == "inf" else int(length))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} should be W,K,L, for instance 4,4,10, or 1,16,inf.") from error


@click.command(
    name="preview",
    epilog="""\b
Examples:
  mergekit-lite preview ./sft ./dpo --alpha 0,0.3,0.6 --prompt "Why is the sky blue?"
  mergekit-lite preview ./sft ./dpo --alpha=-1,0,0.5 --prompts dev.jsonl --limit 3 --temperature 0.7
  mergekit-lite preview ./small-sft ./small-dpo --on ./large --alpha 0 --prompt "Why is the sky blue?"
  mergekit-lite preview ./sft ./dpo --alpha=-1 --search 4,4,10 --prompt "Why is the sky blue?"
""",
)
@click.argument("sft")
@click.argument("aligned")
@click.option("--alpha", "alphas", metavar="A,B…", callback=values.numbers, default="0,0.3,0.6", show_default=True)
@click.option("--prompt", "texts", metavar="TEXT", multiple=True, help="A question; repeat it for several.")
@click.option("--prompts", type=FILE, multiple=True, help="JSONL or Parquet with prompts to answer.")
@click.option("--limit", type=click.IntRange(min=1), help="Most prompts that are used.")
@click.option("--system", metavar="TEXT", help="A system prompt before conversations without one.")
@click.option("--on", metavar="MODEL", help="Add the pair's change to this model, larger perhaps, of the same tokens.")
@click.option(
    "--search", "beam", metavar="W,K,L", callback=_beam, help="Every L tokens the W best of W × K drafts go on."
)
@click.option("--temperature", type=float, help="0, greedy, by default; with --search 0.7.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Share of the likeliest tokens.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="1 is none.")
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Of an answer.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws, which all alphas share.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 … or auto.")
@click.option("--dtype", help="float32, bfloat16, float16; on the CPU float32 by default, else the models' own.")
@click.option("--threads", type=click.IntRange(min=1), help="That read the weights; one for each core by default.")
@click.option("--dry-run", is_flag=True, help="Check everything and print what would be loaded.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print answers and warnings only.")
@click.pass_obj
def command(
    kept: Kept | None,
    /,
    texts: tuple[str, ...],
    prompts: tuple[Path, ...],
    limit: int | None,
    temperature: float | None,
    top_p: float,
    repetition_penalty: float,
    max_tokens: int,
    beam: Beam | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Answer as ALIGNED + alpha·(ALIGNED − SFT) might, from the logits of both, without writing a model.

    At alpha 0 that is ALIGNED to the token, at -1 SFT. At others it is near to what extrapolate makes, and not the
    same: choose an alpha by boost, on the real models.
    """
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.previewing.preview import Kept, previews
    from mergekit_lite.previewing.request import Request, asked_prompts, prepare, sampling_of

    screen = Screen(quiet=quiet or as_json, verbose=False)
    sampling = sampling_of(temperature, top_p, repetition_penalty, max_tokens, searching=beam is not None)
    asked = asked_prompts(texts, prompts)
    kept = kept or Kept()  # a process that runs several commands has one
    request = Request(prompts=tuple(asked.prompts[:limit]), sampling=sampling, beam=beam, **given)
    prepared = prepare(request, kept.make_room)
    for note in (*(f"left out: {problem}" for problem in asked.problems), *prepared.notes):
        screen.warn(note)
    if dry_run or not screen.quiet:
        _tell(screen, prepared, to_output=dry_run and not as_json)
    if dry_run:
        if as_json:
            click.echo(json.dumps(_described(prepared), indent=1))
        return
    done = []
    with kept.loaded(prepared) as readers, _streaming(screen, prepared) as watch:
        for each in previews(prepared, readers, watch):
            done.append(each)
            if not as_json:
                _show(screen, prepared, each, last=len(done) == len(prepared.prompts))
    if as_json:
        answers = [_as_json(each) for each in done]
        click.echo(json.dumps({**_described(prepared), "prompts": answers}, indent=1, ensure_ascii=False))


def _tell(screen: Screen, prepared: Prepared, to_output: bool) -> None:
    """Print what is loaded, and what it takes."""
    from mergekit_lite.commands.screen import size, table
    from mergekit_lite.errors import counted

    loaded = {model.role for model in prepared.models}
    rows = [(model.role, model.reference, size(model.weights)) for model in prepared.models]
    out = screen.out if to_output else screen.err
    out.print(table(("", "model", ">weights"), rows))
    if "ALIGNED" not in loaded or "SFT" not in loaded:
        out.print("The other model is not needed for these alphas.")
    out.print(
        f"takes about {size(prepared.memory)} of memory on {prepared.device}; at most "
        f"{counted(prepared.most, 'token')} to {counted(len(prepared.prompts), 'prompt')}, "
        f"{counted(prepared.drafts, 'answer')} at once"
    )


@contextmanager
def _streaming(screen: Screen, prepared: Prepared) -> Iterator[OnTokens | None]:
    """Show growing answers, where there is a terminal."""
    from rich.live import Live

    from mergekit_lite.errors import counted
    from mergekit_lite.previewing.preview import text_of

    if screen.quiet or not screen.out.is_terminal:
        yield None
        return
    alphas, drawn = prepared.request.alphas, -math.inf
    with Live(console=screen.out, transient=True, auto_refresh=False) as live:

        def watch(answers: list[list[int]]) -> None:
            nonlocal drawn
            if time.monotonic() - drawn < 1 / FRAMES:
                return
            drawn = time.monotonic()
            bodies = [text_of(prepared, tokens) for tokens in answers]
            counts = [counted(len(tokens), "token") for tokens in answers]
            heads = [f"alpha {alpha:g}  {count}" for alpha, count in zip(alphas, counts, strict=True)]
            live.update(_laid_out(screen, heads, bodies, lines=screen.out.height - 4), refresh=True)

        yield watch
        live.update("", refresh=True)


def _laid_out(screen: Screen, heads: Sequence[str], bodies: Sequence[str], lines: int | None = None) -> RenderableType:
    """Lay answers side by side on a terminal that is wide enough, else one under another.

    Of growing answers only the last ``lines`` are shown, as what scrolls away can't be drawn again.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    beside = screen.out.is_terminal and screen.out.width >= COLUMN * len(heads)
    width = screen.out.width // len(heads) - 2 if beside else screen.out.width
    each = None if lines is None else max(1, lines if beside else lines // len(heads) - 1)

    def end_of(body: str) -> Text:
        text = Text(body)
        return text if each is None else Text("\n").join(text.wrap(screen.out, width)[-each:])

    if not beside:
        parts = [part for head, body in zip(heads, bodies, strict=True) for part in (Text(head, "bold"), end_of(body))]
        return Group(*parts)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head in heads:
        table.add_column(Text(head), width=width, overflow="fold")
    table.add_row(*map(end_of, bodies))
    return table


def _show(screen: Screen, prepared: Prepared, preview: Preview, last: bool) -> None:
    """Print the answers to one prompt."""
    from rich.text import Text

    if len(prepared.prompts) > 1:
        screen.out.print(Text(f"> {preview.question}", "dim"))
    heads = [f"alpha {each.alpha:g}  {_figures(each)}" for each in preview.answers]
    screen.out.print(_laid_out(screen, heads, [each.text for each in preview.answers]))
    if not screen.quiet:
        tokens = sum(each.tokens for each in preview.answers)
        screen.err.print(f"{preview.seconds:.1f} s, {tokens / max(preview.seconds, 1e-9):.1f} tokens/s")
    if not last:
        screen.out.print()


def _figures(answer: Previewed) -> str:
    from mergekit_lite.errors import counted

    cut = "" if answer.finish == "stop" else ", cut"
    likely = answer.log_probs.get("ALIGNED")
    under = "" if likely is None else f", log-probability a token {likely:.2f} under ALIGNED"
    return f"{counted(answer.tokens, 'token')}{cut}{under}"


def _described(prepared: Prepared) -> dict[str, Any]:
    request: Request = prepared.request
    beam = request.beam
    return {
        "models": [
            {"role": model.role, "reference": model.reference, "bytes": model.weights} for model in prepared.models
        ],
        "alphas": list(request.alphas),
        "on": request.on,
        "sampling": request.sampling.model_dump(),
        "search": beam
        and {
            "width": beam.width,
            "successors": beam.successors,
            "length": beam.length if math.isfinite(beam.length) else None,
        },
        "seed": request.seed,
        "device": prepared.device,
        "memory": prepared.memory,
        "notes": list(prepared.notes),
    }


def _as_json(preview: Preview) -> dict[str, Any]:
    return {
        "id": preview.prompt.id,
        "messages": list(preview.prompt.messages),
        "seconds": round(preview.seconds, 3),
        "answers": [
            {
                "alpha": each.alpha,
                "text": each.text,
                "tokens": each.tokens,
                "finish": each.finish,
                "log_probs": dict(each.log_probs),
            }
            for each in preview.answers
        ],
    }
