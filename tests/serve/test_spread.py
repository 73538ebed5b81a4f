"""Windows of one clip in several places: the same bytes, also when a place differs or is lost."""

from __future__ import annotations

import itertools

import pytest
from support.testing import write_random_model

from pylumiere.engine import Engine
from pylumiere.errors import InvalidRequest
from pylumiere.serve.spread import PlaceLost, answer, fingerprint, spread

REQUEST = {"seed": 7, "num_frames": 8, "window_frames": 2, "window_overlap": 1}


@pytest.fixture
def coordinator(model):
    with Engine.load(model, precision="fp32", max_batch=4) as engine:
        yield engine


@pytest.fixture
def elsewhere(model):
    with Engine.load(model, precision="fp32") as engine:
        yield engine


def place_of(engine, mark=None, lost=lambda number: False):
    numbers = itertools.count()

    def place(stage, arrays, threads):
        if lost(next(numbers)):
            raise PlaceLost("gone")
        assert stage == "ssr" and arrays[0].shape[0] == 1
        return mark or fingerprint(engine), answer(engine, stage, arrays, threads)

    return place


def test_the_result_is_unchanged(coordinator, elsewhere, engine):
    backend = spread(coordinator, place_of(elsewhere), 2)
    assert coordinator.generate("a", **REQUEST).frames.tobytes() == engine.generate("a", **REQUEST).frames.tobytes()
    assert backend.computed["away"] > 0 and backend.computed["here"] > 0 and backend.computed["again"] == 0


def test_another_fingerprint_is_computed_here(coordinator, elsewhere, engine):
    backend = spread(coordinator, place_of(elsewhere, mark="another"), 2)
    assert coordinator.generate("a", **REQUEST).frames.tobytes() == engine.generate("a", **REQUEST).frames.tobytes()
    assert backend.computed["away"] == 0 and backend.computed["again"] > 0


def test_a_lost_place_is_made_up_for(coordinator, elsewhere, engine):
    backend = spread(coordinator, place_of(elsewhere, lost=lambda number: number >= 2), 2)
    assert coordinator.generate("a", **REQUEST).frames.tobytes() == engine.generate("a", **REQUEST).frames.tobytes()
    assert backend.computed["away"] == 2 and backend.computed["again"] > 0


def test_fingerprints_tell_weights_apart(elsewhere, engine, tmp_path):
    assert fingerprint(elsewhere) == fingerprint(engine)
    with Engine.load(write_random_model(tmp_path / "other", seed=1), precision="fp32") as other:
        assert fingerprint(other) != fingerprint(engine)


def test_engines_that_batch_freely_do_not_spread(model):
    with Engine.load(model, precision="fp32", reproducible=False) as engine, pytest.raises(InvalidRequest):
        spread(engine, None, 1)
