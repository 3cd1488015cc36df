"""Random states of the global generators, and the random streams of a simulation."""

import io
import random

import numpy as np
import pytest
import torch

from stable_plugin.runtime.random_state import RandomStreams, random_state, restore_random_state

CPU = torch.device("cpu")


def through_a_file(state):
    """Save and load without pickled objects, as a checkpoint does."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def global_draws():
    # gauss() and normal() hold a second number back, which is part of the state.
    return random.random(), random.gauss(0, 1), np.random.random(), np.random.normal(), torch.rand(3).tolist()


def test_random_state_restores_all_generators():
    random.gauss(0, 1)
    np.random.normal()
    saved = through_a_file(random_state())
    expected = global_draws()
    assert global_draws() != expected
    restore_random_state(saved)
    assert global_draws() == expected


def test_random_state_does_not_draw():
    before = torch.get_rng_state()
    first, second = random_state(), random_state()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first["torch"], second["torch"])
    assert first["python"][0] == second["python"][0]
    assert torch.equal(first["numpy"][1], second["numpy"][1])


def draws(streams):
    return torch.rand(3, generator=streams.noise).tolist(), torch.rand(3, generator=streams.choices).tolist()


def test_streams_depend_on_the_seed_only():
    torch.manual_seed(1)
    expected = draws(RandomStreams(4, CPU))
    torch.manual_seed(2)
    assert draws(RandomStreams(4, CPU)) == expected
    assert draws(RandomStreams(6, CPU)) != expected


def test_streams_are_independent_of_each_other():
    noise, choices = draws(RandomStreams(4, CPU))
    assert noise != choices
    streams = RandomStreams(4, CPU)
    torch.rand(100, generator=streams.noise)
    assert torch.rand(3, generator=streams.choices).tolist() == choices


def test_streams_do_not_draw_from_the_global_stream():
    before = torch.get_rng_state()
    draws(RandomStreams(4, CPU))
    assert torch.equal(torch.get_rng_state(), before)


def test_state_dict_returns_to_the_mark():
    streams = RandomStreams(4, CPU)
    torch.rand(5, generator=streams.noise)
    streams.mark()
    saved = through_a_file(streams.state_dict())
    marked = torch.rand(3, generator=streams.noise).tolist()
    resumed = RandomStreams(9, CPU)
    for state in (saved, streams.state_dict()):
        resumed.load_state_dict(state)
        assert torch.rand(3, generator=resumed.noise).tolist() == marked


def test_state_dict_restores_choices_and_window():
    streams = RandomStreams(4, CPU)
    streams.window = 7
    torch.rand(5, generator=streams.choices)
    saved = streams.state_dict()
    expected = torch.rand(3, generator=streams.choices).tolist()
    resumed = RandomStreams(9, CPU)
    resumed.load_state_dict(saved)
    assert resumed.window == 7
    assert torch.rand(3, generator=resumed.choices).tolist() == expected


def test_load_state_dict_marks_the_loaded_state():
    streams = RandomStreams(4, CPU)
    resumed = RandomStreams(9, CPU)
    resumed.load_state_dict(streams.state_dict())
    torch.rand(3, generator=resumed.noise)
    assert torch.equal(resumed.state_dict()["noise"], streams.state_dict()["noise"])


def isolated_draw(streams):
    with streams.isolated():
        return torch.rand(3).tolist()


def test_isolated_draws_depend_on_seed_and_window():
    streams = RandomStreams(4, CPU)
    first = isolated_draw(streams)
    torch.manual_seed(99)
    assert isolated_draw(streams) == first
    streams.window = 1
    assert isolated_draw(streams) != first
    assert isolated_draw(RandomStreams(4, CPU)) == first


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_isolated_restores_the_global_stream(error):
    streams = RandomStreams(4, CPU)
    before = torch.get_rng_state()
    try:
        with streams.isolated():
            torch.rand(3)
            if error is not None:
                raise error
    except KeyboardInterrupt:
        pass
    assert torch.equal(torch.get_rng_state(), before)
