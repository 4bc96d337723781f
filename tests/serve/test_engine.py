"""The engine without HTTP: answers are those of `Model.generate`, whatever else is being answered."""

import pytest
import tiny
from asking import messages, question

from mllm_jax.inference.generate import Generation
from mllm_jax.inference.sampling import Sampling
from mllm_jax.serve.engine import Engine, Job
from mllm_jax.serve.media import Media
from mllm_jax.serve.messages import build_prompt

SAMPLING = Sampling(1.5, 0.9, seed=3)
ASKED = [("what?", ()), ("what is it?", (0,)), ("and the difference of these two?", (1, 2)), ("why?", (0,))]


def prompt(model, words, seeds):
    return build_prompt(model, messages(question(words, *seeds)), Media(), most_images=4)


def job(model, words, seeds, **settings):
    built = prompt(model, words, seeds)
    return Job(built.request, built.load_image, **{"max_new_tokens": 9} | settings)


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, slots=3)


def run(engine, rounds=None, found=None):
    """What has become of every job: the pieces of its text, and the answer or the error."""
    found = {} if found is None else found
    while not engine.idle and rounds != 0:
        rounds = None if rounds is None else rounds - 1
        for update in engine.work():
            pieces, end = found.get(update.job, ("", None))
            assert end is None, "something follows the end"
            found[update.job] = (pieces + update.text, update.error or update.answer)
    return found


@pytest.mark.parametrize(
    "sampling", [None, pytest.param(SAMPLING, marks=pytest.mark.slow)], ids=["greedy", "sampled"]
)
def test_answers_are_those_of_generate_whatever_the_load(model, engine, sampling):
    drawn = {} if sampling is None else {"temperature": 1.5, "top_p": 0.9, "seed": 3}
    images = [[tiny.png(seed, (30, 20)) for seed in seeds] or None for _, seeds in ASKED]
    alone = [
        model.generate(image, words, max_new_tokens=9, **drawn)
        for image, (words, _) in zip(images, ASKED, strict=True)
    ]
    assert len(set(alone)) == len(ASKED)
    stop = alone[1][3:5]
    cut = model.generate(images[1], ASKED[1][0], max_new_tokens=9, stop=stop, **drawn)
    jobs = [job(model, *each, sampling=sampling, streamed=i % 2 == 0) for i, each in enumerate(ASKED * 2)]
    stopped = job(model, *ASKED[1], sampling=sampling, stop_texts=(stop,), streamed=True)
    gone = job(model, *ASKED[2], sampling=SAMPLING, max_new_tokens=200)
    for each in [gone, *jobs[:4], stopped, *jobs[4:]]:
        engine.submit(each)
    found = run(engine, rounds=2)
    gone.cancelled = True
    run(engine, found=found)
    assert gone not in found
    for index, each in enumerate(jobs):
        pieces, answer = found[each]
        assert answer.text == alone[index % len(ASKED)]
        assert pieces == (answer.text if each.streamed else "")
    pieces, answer = found[stopped]
    assert pieces == answer.text == cut
    assert answer.stopped
    assert len(answer.tokens) < 9


def test_a_job_that_fails_takes_no_other_with_it(model, engine, monkeypatch):
    def broken(key, layout):
        raise OSError("gone")

    wrong = job(model, "what?", (7,))
    wrong.load_image = broken
    right = job(model, "what?", ())
    engine.submit(wrong)
    engine.submit(right)
    with pytest.raises(ValueError, match="more than 512"):
        engine.submit(job(model, "what?", (), max_new_tokens=600))
    found = run(engine)
    assert isinstance(found[wrong][1], OSError)
    assert found[right][1].text == model.generate(None, "what?", max_new_tokens=9)

    def failing(self):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(engine._slots), "step", failing)
        lost = job(model, "what?", ())
        engine.submit(lost)
        assert isinstance(run(engine)[lost][1], RuntimeError)

    def unreadable(self, token):
        raise OverflowError

    def placed(*_):  # when what the others have so far is given away already
        raise ValueError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("mllm_jax.serve.engine.TextStream.push", unreadable)
        streamed, whole = (job(model, "what?", (), streamed=streamed) for streamed in (True, False))
        whole.max_new_tokens = 12
        for each in (streamed, whole):
            engine.submit(each)
        found |= run(engine)
        assert isinstance(found[streamed][1], OverflowError)
        assert isinstance(found[whole][1], Generation)
    first, second = job(model, "what?", (), max_new_tokens=30), job(model, "what?", ())
    engine.submit(first)
    run(engine, rounds=1)
    with monkeypatch.context() as patch:
        patch.setattr("mllm_jax.inference.slots._place", placed)
        engine.submit(second)
        ends = run(engine)
        assert isinstance(ends[second][1], ValueError)
        assert isinstance(ends[first][1], RuntimeError)  # not a ValueError, which would be its own fault
    again = job(model, "what?", ())
    engine.submit(again)
    assert run(engine)[again][1].text == found[right][1].text
