"""What the page runs, without a page: the order of the work, what it says of it, how it stops, what is shown and how it is escaped."""

import base64
import io
import math
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image

from ditkit.app import cards, compare, pictures
from ditkit.app.compare import State, Wish
from ditkit.app.jobs import Job, Stopped, Worker
from ditkit.app.studio import Studio, shipped
from ditkit.codecs import codec_from
from ditkit.core.errors import DitkitError
from ditkit.methods.specs import parse_spec
from ditkit.output import read_record
from ditkit.pipeline import Pipeline


@pytest.fixture(scope="module")
def studio(labelled, captioned):
    return Studio([labelled, captioned])


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def wish(labelled):
    return Wish(labelled, class_label=2, num_images=2, seed=7, num_inference_steps=4, guidance_scale=2.0, solver="euler")


def states(worker, studio, wish):
    return list(worker.follow(lambda job: compare.compare(studio, wish, job)))


@pytest.fixture(scope="module")
def told(worker, studio, wish):
    return states(worker, studio, replace(wish, methods="fora:interval=2"))


# the comparison


def test_pictures_are_those_of_the_pipelines(told, studio, wish):
    """Previews and timing change nothing: each side is what a plain call gives."""
    options = {"num_images": 2, "seed": 7, "guidance_scale": 2.0, "progress": False}
    end, base = told[-1], Pipeline.from_pretrained(wish.bundle)
    fast = base.with_methods(*parse_spec("fora:interval=2").build())
    assert torch.equal(end.base.output.x, base(2, **options).x)
    assert torch.equal(end.fast.output.x, fast(2, **options).x)
    difference = (end.fast.output.x - end.base.output.x).double()
    assert end.drift.max_abs == pytest.approx(float(difference.abs().max()), rel=1e-6)
    assert end.drift.psnr == pytest.approx(10 * math.log10(4 / float(difference.square().mean())), rel=1e-6)
    assert end.speedup == pytest.approx(end.base.median / end.fast.median)


def test_the_order_of_the_work(told):
    """Loading, live base, live accelerated, comparison; only then timing, in turn, and as often on either side."""
    doing = list(dict.fromkeys(s.doing.split(":")[0].split(",")[0].split(" ")[0] for s in told))
    assert doing == ["Loading", "Attaching", "Base", "fora", "Comparing", "Timing", ""]
    passes = [s.doing for s in told if s.doing.startswith("Timing, pass")]
    sides = [text.endswith("base") for text in dict.fromkeys(passes)]
    assert sides[:4] == [True, False, False, True][: len(sides)]
    assert len(told[-1].base.seconds) == len(told[-1].fast.seconds) == sides.count(True)


def test_previews_come_before_pictures(told):
    base = [s.base for s in told if s.base]
    assert base[0].output is None
    assert base[-1].output is not None


def test_exact_and_alone(worker, studio, wish):
    """An interval of 1 computes every step: identical. Without methods there is nothing to compare, and it can go untimed."""
    end = states(worker, studio, replace(wish, methods="fora:interval=1", timed=False))[-1]
    assert end.drift.max_abs == 0
    assert "identical" in cards.stage(end)
    assert end.speedup is None
    alone = states(worker, studio, replace(wish, timed=False))[-1]
    assert alone.fast is alone.drift is alone.heat is None
    assert "data-side" in cards.stage(alone)
    assert "Difference" not in cards.stage(alone)


def test_a_prompt(worker, studio, captioned, wish):
    asked = replace(wish, bundle=captioned, class_label=None, prompt="a red heart", negative_prompt="a square", timed=False)
    assert states(worker, studio, asked)[-1].base.output.record["prompts"] == ["a red heart"] * 2
    with pytest.raises(DitkitError, match="the prompt is empty"):
        states(worker, studio, replace(asked, prompt=" "))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"methods": "fora:interval=0"}, "interval"),
        ({"methods": "faro"}, "there is no method 'faro'"),
        ({"methods": "fora+taylorseer"}, "reuse"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"class_label": 5}, "class label is 5"),
        ({"seed": -1}, "seed is -1"),
        ({"solver": "eulr"}, "did you mean 'euler'"),
        ({"bundle": "/etc"}, "is not on this page"),
    ],
)
def test_errors_of_the_library_reach_the_page(worker, studio, wish, changed, words):
    with pytest.raises(DitkitError, match=words) as error:
        states(worker, studio, replace(wish, **changed))
    assert cards.failure(error.value).count('role="alert"') == 1


def test_warnings_are_shown(worker, studio, wish):
    """A cache that has no step to reuse warns; the page says so instead of the terminal."""
    end = states(worker, studio, replace(wish, methods="fora:interval=2", num_inference_steps=1, timed=False))[-1]
    assert any("reused nothing" in note for note in end.notes)
    assert "reused nothing" in cards.stage(end)


# what there is to choose


def test_choices(studio, labelled, captioned):
    c = studio.choices(labelled)
    assert c.labels == ("ant", "bee", "cat", "dog", "eel")
    assert (c.text, c.captions, c.guidance_scale) == (False, (), 2.0)
    assert "fora:interval=2" in c.presets
    assert "euler" in c.solvers
    c = studio.choices(captioned)
    assert (c.text, c.labels, c.captions) == (True, (), ("a red circle", "a blue heart"))


def test_the_shipped_bundles_are_the_default():
    assert Studio().bundles == shipped()
    assert "digits" in shipped()


# one after the other, and an end at any time


def test_jobs_never_overlap(worker):
    inside, most = [], []

    def work(job):
        inside.append(job)
        most.append(len(inside))
        job.say("now")
        inside.pop()

    threads = [threading.Thread(target=lambda: list(worker.follow(work))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1] * 8


def test_a_stopped_comparison_ends_at_a_step(worker, studio, wish):
    job, seen = Job(), []
    long = replace(wish, num_inference_steps=1000)

    def follow():
        for state in worker.follow(lambda job: compare.compare(studio, long, job), job):
            seen.append(state)
            if state.base:
                job.stop.set()

    with pytest.raises(Stopped):
        follow()
    assert seen[-1].base.output is None


def test_stopped_before_its_turn(worker):
    job = Job()
    job.stop.set()
    with pytest.raises(Stopped):
        list(worker.follow(lambda job: pytest.fail("ran"), job))


def test_closing_stops_the_work_and_waits(worker):
    ended = []

    def work(job):
        job.say("begun")
        try:
            job.stop.wait(30)
            job.check()
        finally:
            ended.append(job)

    following = worker.follow(work)
    assert next(following) == "begun"
    following.close()
    assert len(ended) == 1


def test_settling_waits_until_all_is_taken(worker):
    taken, at_rest = [], []

    def work(job):
        for k in range(3):
            job.say(k)
        job.settle()
        at_rest.extend(taken)

    for event in worker.follow(work):
        taken.append(event)
    assert at_rest == [0, 1, 2]


# pictures


def test_heat_is_pale_where_the_difference_is_largest():
    a, b = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    b[0, 1, 0, 1] = 0.5
    image, top = pictures.heat(a, b)
    assert top == 0.5
    side = image.width // 2
    assert image.getpixel((image.width - 1, 0)) == pictures.HEAT[-1]
    assert image.getpixel((0, image.height - 1)) == image.getpixel((side - 1, 0)) == pictures.HEAT[0]
    assert pictures.heat(a, a)[1] == 0


def test_previews_show_what_is_not_finite_as_grey():
    x = torch.tensor([[math.nan, 1.0], [-1.0, math.inf]]).expand(1, 3, 2, 2)
    image = pictures.preview(codec_from("identity", {"channels": 3}), x)
    size = image.width
    corners = [image.getpixel(xy)[0] for xy in ((0, 0), (size - 1, 0), (0, size - 1), (size - 1, size - 1))]
    assert corners == [128, 255, 0, 255]


def test_a_saved_picture_can_be_made_again(told, wish, tmp_path):
    uri = pictures.png_uri(told[-1].base.image, told[-1].base.output.picture_record(1))
    path = tmp_path / "p.png"
    path.write_bytes(base64.b64decode(uri.partition(",")[2]))
    again = Pipeline.from_pretrained(wish.bundle).remake(read_record(path)).x[0]
    torch.testing.assert_close(again, told[-1].base.output.x[1], atol=1e-5, rtol=0)  # alone, not in a batch of two


def test_small_pictures_are_enlarged_pixel_by_pixel():
    sheet = pictures.sheet([Image.new("L", (8, 8), 255)])
    assert sheet.size == (384, 384)
    assert Image.open(io.BytesIO(base64.b64decode(pictures.jpeg_uri(sheet).partition(",")[2]))).size == (384, 384)


# words


def test_nothing_of_a_user_reaches_the_page_as_markup():
    bad = "<img src=x onerror=alert(1)> ${alert(1)} {{value}} `"
    state = State(Wish("b", prompt=bad, methods=bad), notes=(bad,))
    for text in (cards.stage(state), cards.status(bad), cards.failure(DitkitError(bad, hint=bad)), cards.message(bad)):
        assert "<img" not in text
        assert not {"$", "{", "}", "`"} & set(text)


def test_durations_have_three_digits():
    assert [cards.duration(s) for s in (0.02134, 0.5, 1.234, 123.4, 1234.0)] == ["21.3 ms", "500 ms", "1.23 s", "123 s", "1234 s"]
