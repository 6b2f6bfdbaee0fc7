"""What the page shows, as HTML. Everything that came from a user or a file is escaped, also for Gradio's templates."""

from __future__ import annotations

import html
import math
import shlex

from PIL import Image

from ditkit.core.errors import DitkitError
from ditkit.output import Output

from .compare import Shown, State, Wish
from .pictures import PREVIEW, jpeg_uri, png_uri


def safe(text: object) -> str:
    """Escaped for HTML and for the two template languages through which Gradio passes it."""
    return html.escape(str(text)).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;")


def status(doing: str, part: float = 0.0) -> str:
    """A line that says what happens, with a bar; ``part`` 0 to 1."""
    if not doing:
        return ""
    bar = f'<div class="dk-bar"><i style="width:{100 * part:.0f}%"></i></div>'
    return f'<div class="dk-status" role="status"><span>{safe(doing)}</span>{bar}</div>'


def failure(error: BaseException) -> str:
    """One message: what was wrong, what is allowed, the next step."""
    if isinstance(error, DitkitError):
        rows = [("", error.what), ("Allowed", error.allowed), ("Next", error.hint)]
    else:
        rows = [("", f"{type(error).__name__}: {error}"), ("Next", "this is not one of ditkit's own messages; the terminal shows more")]
    lines = "".join(f"<p>{f'<b>{name}</b> ' if name else ''}{safe(text)}</p>" for name, text in rows if text)
    return f'<div class="dk-error" role="alert">{lines}</div>'


def message(text: str) -> str:
    """A plain line."""
    return f'<div class="dk-message" role="status">{safe(text)}</div>'


def stage(state: State) -> str:
    """Pictures, times and the difference, as far as they are there."""
    figures = [_side("base", "Base", state.base)]
    if state.wish.methods:
        figures += [_side("fast", state.wish.methods, state.fast), _heat(state)]
    notes = "".join(f"<li>{safe(note)}</li>" for note in state.notes)
    below = (f'<ul class="dk-notes">{notes}</ul>' if notes else "") + (_more(state) if state.base and state.base.output else "")
    return f'{_tiles(state)}<div class="dk-cards dk-{len(figures)}">{"".join(figures)}</div>{below}'


def _tiles(state: State) -> str:
    """The figures that answer what one came for."""
    d, tiles = state.drift, []
    if state.wish.methods:
        ratio = state.speedup
        tiles.append(("speedup", f"{ratio:.2f}×" if ratio else "–", "as fast as the base" if state.wish.timed or not d else "not timed"))
        tiles.append(("psnr", ("identical" if d.psnr == math.inf else f"{d.psnr:.1f} dB") if d else "–", "PSNR to the base"))
        tiles.append(("maxabs", f"{d.max_abs:.3g}" if d else "–", "largest difference, of a range of 2"))
    return f'<div class="dk-tiles">{"".join(_tile(*tile) for tile in tiles)}</div>' if tiles else ""


def _tile(name: str, value: str, says: str) -> str:
    return f'<div class="dk-tile" data-figure="{name}"><b>{value}</b><span>{says}</span></div>'


def _side(side: str, name: str, shown: Shown | None) -> str:
    """A card with a picture; its time below."""
    if shown is None:
        return _card(side, name, '<div class="dk-empty"></div>', "")
    if shown.output is None:
        return _card(side, name, _image(jpeg_uri(shown.image), f"{name}, foreseen", shown.image), "what it foresees")
    uri = png_uri(shown.image, _record(shown.output))
    below = f'<a href="{uri}" download="{side}.png">Save PNG</a>'
    if shown.seconds:
        below = f"<b>{duration(shown.median)}</b> <span>{_spread(shown.seconds)}</span>{below}"
    return _card(side, name, _image(uri, f"{name}: pictures", shown.image), below)


def _heat(state: State) -> str:
    if state.heat is None:
        return _card("heat", "Difference", '<div class="dk-empty"></div>', "")
    image, top = state.heat
    return _card("heat", "Difference", _image(png_uri(image), "where they differ", image), f"black 0, pale {top:.3g}")


def _card(side: str, name: str, image: str, below: str) -> str:
    inside = f'<figcaption>{safe(name)}</figcaption>{image}<div class="dk-below">{below}</div>'
    return f'<figure class="dk-card" data-side="{side}">{inside}</figure>'


def _image(uri: str, alt: str, image: Image.Image) -> str:
    pixels = ' class="dk-pixels"' if max(image.size) < PREVIEW else ""
    return f'<img src="{uri}" alt="{safe(alt)}" width="{image.width}" height="{image.height}"{pixels}>'


def _record(output: Output) -> dict[str, object]:
    return output.record if len(output.images) > 1 else output.picture_record(0)


def _spread(seconds: tuple[float, ...]) -> str:
    if len(seconds) == 1:
        return "one pass"
    return f"median of {len(seconds)}: {duration(min(seconds))} to {duration(max(seconds))}"


def duration(seconds: float) -> str:
    """With three digits: 0.0213 s is 21.3 ms."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"


def _more(state: State) -> str:
    """How it was timed, and the same from a terminal."""
    w = state.wish
    lines = [f"ditkit sample {' '.join(_words(w))}"]
    if w.methods:
        lines.append(f"ditkit bench {shlex.quote(w.bundle)} --methods {shlex.quote(w.methods)}")
    how = (
        "Times are of whole calls, from the prompt or label to the picture. The first pass of each, the one with the preview, is not "
        "counted; then both run in turn, one at a time. For figures to publish, with quality and the base at fewer steps beside "
        "them: <code>ditkit bench</code>."
    )
    code = "\n".join(map(safe, lines))
    return f'<details class="dk-more"><summary>How it was timed; the same from a terminal</summary><p>{how}</p><pre>{code}</pre></details>'


def _words(w: Wish) -> list[str]:
    """Arguments of ``ditkit sample`` that make the base's pictures."""
    words: list[object] = [w.bundle]
    if w.class_label is not None:
        words += ["--class-labels", w.class_label]
    if w.prompt:
        words += ["--prompt", w.prompt]
    if w.negative_prompt:
        words += ["--negative-prompt", w.negative_prompt]
    words += ["--num-images", w.num_images, "--num-inference-steps", w.num_inference_steps, "--guidance-scale", f"{w.guidance_scale:g}"]
    words += ["--solver", w.solver, "--seed", w.seed]
    return [shlex.quote(str(word)) for word in words]
