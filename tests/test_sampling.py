"""Properties of densities, weights and draws that must hold for every input."""
from dataclasses import replace

import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.neighbors import NearestNeighbors

from densirl.density import neighbourhoods
from densirl.estimators import ESTIMATORS, Neighbourhoods, knn_density, log_density
from densirl.neighbours import nearest_neighbours
from densirl.sampler import Sampler, group_rows, rank_slice
from densirl.weights import capped, effective_share, sampling_weights, shuffled, solve_alpha

densities = arrays(np.float64, st.integers(2, 60), elements=st.floats(-300, 300))
WAYS = [(how, replacement) for how in ('systematic', 'independent') for replacement in (True, False)]


# -- weights

@given(densities, st.floats(-3, 3))
def test_weights_are_probabilities_ordered_by_density(log_rho, alpha):
    weights = sampling_weights(log_rho, alpha)
    assert np.isfinite(weights).all() and abs(weights.sum()-1) < 1e-9
    order = np.argsort(log_rho)
    steps = np.diff(weights[order])
    assert (steps <= 1e-12).all() if alpha >= 0 else (steps >= -1e-12).all()

@given(arrays(np.float32, st.integers(1, 40), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)), st.floats(-10, 10))
def test_weights_are_finite_for_any_float32(log_rho, alpha):
    weights = sampling_weights(log_rho, alpha)
    assert np.isfinite(weights).all() and abs(weights.sum()-1) < 1e-9

@given(densities)
def test_alpha_zero_is_exactly_uniform(log_rho):
    assert (sampling_weights(log_rho, 0.) == 1/len(log_rho)).all()

@given(densities, st.floats(-3, 3), st.integers(0, 2**31))
def test_weights_do_not_depend_on_the_order_of_prompts(log_rho, alpha, seed):
    order = np.random.default_rng(seed).permutation(len(log_rho))
    np.testing.assert_allclose(sampling_weights(log_rho[order], alpha), sampling_weights(log_rho, alpha)[order], rtol=1e-12)

@given(densities, st.floats(.05, 1))
def test_solved_alpha_reaches_the_share_or_its_bound(log_rho, share):
    alpha = solve_alpha(log_rho, share)
    got = effective_share(sampling_weights(log_rho, alpha))
    if alpha == 10.: assert got >= share-1e-6
    elif alpha == 0.: assert share >= 1-1e-8
    else: assert abs(got-share) < 1e-3

@given(densities, st.floats(1, 100))
def test_a_cap_holds_and_keeps_the_order(log_rho, cap):
    before = sampling_weights(log_rho, 1.)
    weights = capped(before, cap)
    assert abs(weights.sum()-1) < 1e-9 and weights.max() <= cap/len(weights)*(1+1e-9)
    assert (np.diff(weights[np.argsort(before, kind='stable')]) >= -1e-12).all()

@given(densities, st.integers(0, 2**31), st.data())
def test_a_placebo_keeps_weights_within_strata(log_rho, seed, data):
    weights = sampling_weights(log_rho, 1.)
    strata = data.draw(st.lists(st.sampled_from('abc'), min_size=len(weights), max_size=len(weights)))
    moved = shuffled(weights, seed, strata)
    for s in set(strata):
        inside = np.array(strata) == s
        assert sorted(moved[inside]) == sorted(weights[inside])


# -- draws

@given(densities, st.integers(1, 16), st.integers(0, 2**31), st.integers(0, 10**6))
def test_a_comb_is_never_a_whole_time_off(log_rho, n, seed, step):
    weights = sampling_weights(log_rho, 1.)
    drawn = Sampler(weights, n, seed).draw(step)
    assert (np.abs(np.bincount(drawn, minlength=len(weights))-n*weights) < 1+1e-6).all()
    assert (weights[drawn] > 0).all()

@pytest.mark.parametrize('how, replacement', WAYS)
@pytest.mark.parametrize('world', [1, 2, 4, 8])
@settings(max_examples=30, deadline=None)
@given(log_rho=arrays(np.float64, st.integers(16, 60), elements=st.floats(-5, 5)), step=st.integers(0, 10**6), each=st.integers(1, 2), size=st.integers(1, 8))
def test_groups_stay_whole_on_any_number_of_ranks(how, replacement, world, log_rho, step, each, size):
    probs = sampling_weights(log_rho, .3)
    drawn = Sampler(probs, world*each, 0, how, replacement).draw(step)
    assert len(drawn) == world*each and (replacement or len(set(drawn)) == len(drawn))
    assert (drawn == Sampler(probs, world*each, 0, how, replacement).draw(step)).all()
    slices = [rank_slice(drawn, r, world) for r in range(world)]
    assert (np.stack(slices, 1).ravel() == drawn).all()
    for part in slices:
        rows = group_rows(part, size).reshape(-1, size)
        assert (rows == rows[:, :1]).all() and (rows[:, 0] == part).all()

@pytest.mark.parametrize('how, replacement', WAYS)
def test_draws_follow_the_weights(how, replacement):
    probs = sampling_weights(np.random.default_rng(0).normal(size=5000), .5)
    sampler, expected = Sampler(probs, 64, 1, how, replacement), 64*1500*probs
    counts = np.bincount(np.concatenate([sampler.draw(s) for s in range(1500)]), minlength=5000)
    z = (counts-expected)/np.sqrt(expected)
    assert abs(z.mean()) < .05 and z.std() < 1.1

def test_blocks_do_not_bind_prompts_together():
    "With more prompts than blocks, two prompts still come together as often as chance would have it"
    sampler = Sampler(np.full(9000, 1/9000), 2250)
    together = np.mean([np.isin([0, 1], sampler.draw(s)).all() for s in range(2000)])
    assert abs(together-1/16) < .02

@given(densities, st.integers(0, 50))
def test_a_resumed_sampler_goes_on_and_other_weights_are_refused(log_rho, steps):
    probs = sampling_weights(log_rho, .1)
    unbroken, first = Sampler(probs, 3, 5), Sampler(probs, 3, 5)
    expected = [next(unbroken) for _ in range(steps+2)]
    for _ in range(steps): next(first)
    resumed = Sampler(probs, 3, 5)
    resumed.load_state_dict(first.state_dict())
    assert (next(resumed) == expected[steps]).all() and (next(resumed) == expected[steps+1]).all()
    with pytest.raises(ValueError, match='have changed'): Sampler(probs, 3, 6).load_state_dict(first.state_dict())


# -- densities

def exact_neighbours(points, k):
    found = NearestNeighbors(n_neighbors=k+1, algorithm='brute').fit(points).kneighbors(points)
    others = np.array([[j for j in row if j != i][:k] for i, row in enumerate(found[1])])
    distances = np.linalg.norm(points[:, None]-points[others], axis=-1)
    order = np.argsort(distances, axis=1)                              # rounding may have put near ties the wrong way round
    return np.take_along_axis(distances, order, 1), np.take_along_axis(others, order, 1)

def around(points, counts=None, k=10):
    k = min(k, len(points)-1)
    return Neighbourhoods(*exact_neighbours(points, k), np.ones(len(points), int) if counts is None else counts, np.zeros(len(points), int))

def crowd_and_loner(crowd, seed, normalised):
    rng = np.random.default_rng(seed)
    centre, far = np.zeros(16), np.zeros(16)
    centre[0] = far[1] = 3.
    points = np.concatenate([centre+.05*rng.normal(size=(crowd, 16)), far[None]]).astype(np.float32)
    return points/np.linalg.norm(points, axis=1, keepdims=True) if normalised else points

@pytest.mark.parametrize('estimator', list(ESTIMATORS))
@settings(deadline=None, max_examples=30)
@given(crowd=st.integers(4, 40), seed=st.integers(0, 10**6), normalised=st.booleans())
def test_a_loner_never_weighs_less_than_a_crowd(estimator, crowd, seed, normalised):
    near = around(crowd_and_loner(crowd, seed, normalised), k=3)
    near = replace(near, clusters=(np.arange(crowd+1) == crowd).astype(int))
    weights = sampling_weights(log_density(near, 3, estimator))
    assert weights[-1] == weights.max()

@pytest.mark.parametrize('estimator', list(ESTIMATORS))
@settings(deadline=None, max_examples=30)
@given(crowd=st.integers(4, 30), seed=st.integers(0, 10**6), copies=st.integers(1, 50), who=st.integers(0, 3))
def test_duplicating_a_prompt_never_lifts_it_above_a_loner(estimator, crowd, seed, copies, who):
    points, counts = crowd_and_loner(crowd, seed, True), np.ones(crowd+1, int)
    clusters = (np.arange(crowd+1) == crowd).astype(int)
    once = sampling_weights(log_density(replace(around(points, k=3), clusters=clusters), 3, estimator))
    counts[who] = copies
    often = sampling_weights(log_density(replace(around(points, counts, k=3), clusters=clusters), 3, estimator))
    assert often[who] <= often[-1]
    assert often[who]/often[-1] <= once[who]/once[-1]*(1+1e-9)

@settings(deadline=None, max_examples=20)
@given(st.integers(12, 60), st.integers(0, 10**6))
def test_density_does_not_depend_on_the_order_of_prompts(n, seed):
    rng = np.random.default_rng(seed)
    points, counts, order = rng.normal(size=(n, 6)), rng.integers(1, 9, n), rng.permutation(n)
    for estimator in ('knn', 'knn_two_nn', 'mean_distance'):
        np.testing.assert_allclose(log_density(around(points[order], counts[order]), 5, estimator), log_density(around(points, counts), 5, estimator)[order], rtol=1e-6)

@settings(deadline=None, max_examples=30)
@given(arrays(np.float32, st.tuples(st.integers(2, 30), st.integers(1, 5)), elements=st.floats(-1e6, 1e6, width=32)))
def test_densities_and_weights_are_finite_for_any_vectors(points):
    for estimator in ESTIMATORS:
        logs = log_density(around(points.astype(np.float64)), 10, estimator)
        assert np.isfinite(logs).all() and np.isfinite(sampling_weights(logs)).all()

def test_twenty_one_identical_prompts_neither_explode_nor_vanish():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(500, 8)), np.repeat(rng.normal(size=(1, 8)), 21, 0)])
    logs = knn_density(around(points))
    alpha = solve_alpha(logs, .5)
    share = sampling_weights(logs, alpha)[500:].sum()
    assert logs[500:].max() <= logs[:500].max()+1e-9                   # as dense as the densest others, not denser
    assert .001 < share < 21/521                                       # less than their even share, but still there

def test_multiplicity_is_density():
    points, often = np.random.default_rng(0).normal(size=(50, 8)), np.ones(50, int)
    often[7] = 21
    gain = knn_density(around(points, often, 5), 5)-knn_density(around(points, k=5), 5)
    assert gain[7] == gain.max() and np.isfinite(gain).all()

def test_density_k_needs_no_new_neighbours():
    points = np.random.default_rng(0).normal(size=(200, 8))
    for k in (3, 10, 64): np.testing.assert_allclose(log_density(around(points, k=64), k), log_density(around(points, k=k), k), rtol=1e-9)


# -- neighbours

def unit(points): return (points/np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)

@pytest.mark.parametrize('n, k', [(700, 12), (1500, 64), (40, 64), (2, 10)])
def test_neighbours_equal_scikit_learns(n, k):
    points = unit(np.random.default_rng(0).normal(size=(n, 32)))
    distances, indices, how = nearest_neighbours(points, k)
    expected, theirs = exact_neighbours(points, min(k, n-1))
    np.testing.assert_allclose(distances, expected, atol=1e-5)
    assert (indices == theirs).mean() > .999 and how['how'] == 'exact'
    assert distances.dtype == np.float32 and indices.dtype == np.int32

def test_copies_are_neighbours_at_distance_zero_and_nobody_is_its_own():
    points = unit(np.repeat(np.random.default_rng(0).normal(size=(60, 16)), 5, 0))
    distances, indices, _ = nearest_neighbours(points, 6)
    assert (distances[:, :4] < 1e-3).all() and (distances[:, 4:] > .1).all()
    assert (indices != np.arange(300)[:, None]).all()
    assert (np.sort(indices[:, :4]//5, 1) == (np.arange(300)//5)[:, None]).all()

def test_neighbourhoods_of_one_place_are_defined():
    near, _ = neighbourhoods(np.tile(np.eye(8, dtype=np.float32)[:1], (20, 1)), np.ones(20, int), 64)
    for estimator in ESTIMATORS: assert np.ptp(log_density(near, 10, estimator)) == 0
