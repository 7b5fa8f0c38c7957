"""The predictor that learns: what was cut is no length, what is old fades, what is rare is shrunk
to what is common, prompts alike vote, and none of it takes more and more memory."""

from __future__ import annotations

import math
import random
from statistics import median

import pytest

from tests.unit.predict_box import MEDIANS, ask, middle, serve, traffic
from tinfer.core.lengths import Lengths, certain
from tinfer.predict.asked import Asked, End, Features, LearningPredictor
from tinfer.predict.online import OnlinePredictor, OnlineSettings
from tinfer.predict.predictors import PREDICTORS, MaxTokens, Prior


def plain(number: int = 0, most: int = 4096) -> Asked:
    """A request of whose prompt nothing is known."""
    return Asked(f"r{number}", 30, most)


def test_it_goes_by_its_name_and_the_others_do_not_learn() -> None:
    assert isinstance(PREDICTORS["online"](), OnlinePredictor)
    assert isinstance(PREDICTORS["online"](), LearningPredictor)
    assert not isinstance(MaxTokens(), LearningPredictor)


def test_before_anything_was_served_it_says_what_the_prior_says() -> None:
    told, prior = OnlinePredictor().predict(plain()), Prior().predict(plain())
    assert [a / b for a, b in zip(told.points, prior.points, strict=True)] == pytest.approx(
        [1.0] * 16, rel=0.08
    )


def test_an_answer_that_runs_to_its_bound_is_certain_and_teaches_nothing() -> None:
    predictor = OnlinePredictor()
    bound = Asked("r", 30, 70, runs_to_bound=True)
    assert predictor.predict(bound) == certain(70)
    predictor.observe(bound, 70, End.LENGTH)
    predictor.observe(plain(), 0, End.ABORT)
    assert predictor.num_observed == 0
    assert not predictor.counts.any()


@pytest.mark.parametrize("cut", [End.LENGTH, End.ABORT, End.ERROR])
def test_cut_answers_do_not_make_predictions_short(cut: End) -> None:
    """Half of the answers are cut at 100 tokens; of the others all is seen."""
    rng = random.Random(1)
    truths = [max(1, round(rng.lognormvariate(math.log(90), 0.8))) for _ in range(3000)]
    fair, unfair = OnlinePredictor(), OnlinePredictor(OnlineSettings(censors=False))
    for number, tokens in enumerate(truths):
        most = 100 if number % 2 else 4096
        end = cut if tokens > most else End.STOP
        for predictor in (fair, unfair):
            # The bound is no key here, which would keep the two halves apart.
            predictor.observe(plain(number), min(tokens, most), end)
    in_order = sorted(truths)
    for place in (1, 4, 8, 12):
        true = in_order[(2 * place + 1) * len(truths) // 32]
        told = fair.predict(plain()).points[place]
        assert told == pytest.approx(true, rel=0.15), place
    above = in_order[25 * len(truths) // 32]
    assert unfair.predict(plain()).points[12] < 0.75 * above


def test_lengths_under_a_bound_that_cuts_all_go_on_as_the_prior_does() -> None:
    predictor = OnlinePredictor()
    for number in range(1000):
        predictor.observe(plain(number, most=64), 64, End.LENGTH)
    assert predictor.predict(plain(most=64)) == Lengths((64,) * 16)
    longer = predictor.predict(plain(most=4096))
    assert longer.points[0] > 64
    assert longer.points[-1] < 4096


def test_old_traffic_fades() -> None:
    predictor = OnlinePredictor(OnlineSettings(forget_after=200, num_recent=200))
    for number in range(900):
        serve(predictor, ask(number), 50)
    assert middle(predictor.predict(ask(0, 0))) == pytest.approx(50, rel=0.1)
    for number in range(900):
        serve(predictor, ask(number, seed=2), 500)
    now = predictor.predict(ask(0, 0))
    assert middle(now) == pytest.approx(500, rel=0.1)
    assert now.points[1] > 400


def test_a_rare_tenant_is_shrunk_to_all_and_a_common_one_is_itself() -> None:
    """The model's answers have 100 tokens, one tenant's have 1000."""
    predictor = OnlinePredictor(OnlineSettings(votes=False))
    for number in range(1000):
        serve(predictor, ask(number, head=1), 100)
    told = [middle(predictor.predict(ask(0, head=2)))]
    for number in range(40):
        serve(predictor, ask(number, head=2, seed=3), 1000)
        told.append(middle(predictor.predict(ask(0, head=2))))
    assert told[0] == told[1] == pytest.approx(100, rel=0.1)  # a head that came once has no rung
    assert told[3] < 200
    assert told[40] == pytest.approx(1000, rel=0.1)
    assert middle(predictor.predict(ask(0, head=1))) == pytest.approx(100, rel=0.1)


def test_prompts_alike_vote() -> None:
    """Two questions under one system prompt, told apart by their words alone."""
    predictor = OnlinePredictor()
    for _ in range(30):
        serve(predictor, ask(1, prompt=60), 20)
        serve(predictor, ask(2, prompt=60), 800)
    assert middle(predictor.predict(ask(1, prompt=60))) == pytest.approx(20, rel=0.2)
    assert middle(predictor.predict(ask(2, prompt=60))) == pytest.approx(800, rel=0.2)
    deaf = OnlinePredictor(OnlineSettings(votes=False))
    for _ in range(30):
        serve(deaf, ask(1, prompt=60), 20)
        serve(deaf, ask(2, prompt=60), 800)
    assert deaf.predict(ask(1, prompt=60)) == deaf.predict(ask(2, prompt=60))


def test_another_models_answers_say_little_of_this_ones() -> None:
    predictor = OnlinePredictor()
    for number in range(300):
        for model, tokens in ((1, 30), (2, 600)):
            asked = Asked(f"r{number}", 30, 4096, features=Features(model))
            serve(predictor, asked, tokens)
    for model, tokens in ((1, 30), (2, 600)):
        told = predictor.predict(Asked("r", 30, 4096, features=Features(model)))
        assert middle(told) == pytest.approx(tokens, rel=0.15)


def error_of(predictor: OnlinePredictor, answers: list[tuple[Asked, int]]) -> float:
    """Median relative error of the last half, each predicted and then observed."""
    errors = []
    for asked, tokens in answers:
        told = middle(predictor.predict(asked))
        errors.append(abs(math.log(told / tokens)))
        serve(predictor, asked, tokens)
    return median(errors[len(errors) // 2 :])


def test_it_learns_who_asks_and_learns_nothing_from_shuffled_answers() -> None:
    answers = traffic(1000)
    truths = [tokens for _, tokens in answers]
    random.Random(7).shuffle(truths)
    shuffled = [(asked, tokens) for (asked, _), tokens in zip(answers, truths, strict=True)]
    assert error_of(OnlinePredictor(), answers) < 0.3
    assert error_of(OnlinePredictor(), shuffled) > 0.9
    learnt = _learnt(shuffled)
    everyone = middle(learnt.predict(ask(0, head=9)))
    for tenant in range(len(MEDIANS)):
        told = middle(learnt.predict(ask(0, tenant, seed=5)))
        assert told == pytest.approx(everyone, rel=0.6)


def _learnt(answers: list[tuple[Asked, int]]) -> OnlinePredictor:
    predictor = OnlinePredictor()
    for asked, tokens in answers:
        serve(predictor, asked, tokens)
    return predictor


def test_memory_is_constant() -> None:
    """Every other request has a head that is new; benchmarks/predictor_cost.py has a million of
    them."""
    predictor = OnlinePredictor(OnlineSettings(num_rungs=64, num_recent=64))
    before = predictor.num_bytes
    for number in range(6000):
        # Twice each, so that every one of them gets its rungs.
        head = number // 2 + 1
        asked = Asked(
            f"r{number}", 1 + number % 4000, 1 + number * 7 % 9000, features=Features(1, head)
        )
        serve(predictor, asked, 1 + number % 3000)
    assert predictor.num_bytes == before
    assert len(predictor.places) == 64
    assert sorted(predictor.places.values()) == list(range(64))
    assert len(predictor.heads) <= 128


def test_the_default_takes_less_than_three_megabytes() -> None:
    assert OnlinePredictor().num_bytes < 3_000_000


def test_what_is_used_stays_when_others_come_and_go() -> None:
    predictor = OnlinePredictor(OnlineSettings(num_rungs=32, votes=False))
    for number in range(600):
        serve(predictor, ask(number, head=1), 700)
        serve(predictor, ask(number, head=2 + number // 2), 20)
    assert middle(predictor.predict(ask(0, head=1))) == pytest.approx(700, rel=0.1)


def test_equal_observations_give_equal_predictions() -> None:
    one, other = _learnt(traffic(300)), _learnt(traffic(300))
    for tenant in range(4):
        assert one.predict(ask(9, tenant)) == other.predict(ask(9, tenant))
        assert one.predict(ask(9, tenant)) == one.predict(ask(9, tenant))
