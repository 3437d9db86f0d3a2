"""Properties of densities, weights and draws that must hold for every input."""
import numpy as np
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.neighbors import NearestNeighbors

from densirl.density import log_density, nearest_neighbours
from densirl.sampler import draw, effective_share, rank_slice, sampling_weights, solve_alpha

densities = arrays(np.float64, st.integers(2, 60), elements=st.floats(-300, 300))

@given(densities, st.floats(-3, 3))
def test_weights_are_probabilities_ordered_by_density(log_rho, alpha):
    weights = sampling_weights(log_rho, alpha)
    assert np.isfinite(weights).all() and abs(weights.sum()-1) < 1e-9
    order = np.argsort(log_rho)
    steps = np.diff(weights[order])
    assert (steps <= 1e-12).all() if alpha >= 0 else (steps >= -1e-12).all()

@given(densities, st.floats(.05, 1))
def test_solved_alpha_reaches_the_share_or_its_bound(log_rho, share):
    alpha = solve_alpha(log_rho, share)
    got = effective_share(sampling_weights(log_rho, alpha))
    if alpha == 10.: assert got >= share-1e-6
    elif alpha == 0.: assert share >= 1-1e-9
    else: assert abs(got-share) < 1e-3

@given(densities, st.integers(1, 16), st.integers(0, 2**31), st.integers(0, 10**6))
def test_draws_keep_their_promise(log_rho, n, seed, step):
    weights = sampling_weights(log_rho, 1.)
    drawn = draw(weights, n, seed, step)
    counts = np.bincount(drawn, minlength=len(weights))
    assert (np.abs(counts-n*weights) < 1+1e-6).all()
    assert (drawn == draw(weights, n, seed, step)).all()

@given(st.integers(1, 8), st.integers(1, 8))
def test_ranks_share_a_draw(world, each):
    whole = np.arange(world*each)
    assert sorted(np.concatenate([rank_slice(whole, r, world) for r in range(world)])) == whole.tolist()

@settings(deadline=None, max_examples=30)
@given(st.integers(4, 40), st.integers(0, 10**6), st.booleans())
def test_a_loner_never_weighs_less_than_a_crowd(crowd, seed, normalised):
    rng = np.random.default_rng(seed)
    centre, far = np.zeros(16), np.zeros(16)
    centre[0] = far[1] = 3.
    points = np.concatenate([centre+.05*rng.normal(size=(crowd, 16)), far[None]]).astype(np.float32)
    if normalised: points /= np.linalg.norm(points, axis=1, keepdims=True)
    distances, indices = exact_neighbours(points, 3)
    weights = sampling_weights(log_density(distances, indices, np.ones(crowd+1, int), 3))
    assert weights[-1] == weights.max()

def exact_neighbours(points, k):
    found = NearestNeighbors(n_neighbors=k+1, algorithm='brute').fit(points).kneighbors(points)
    return found[0][:, 1:].astype(np.float32), found[1][:, 1:]

def test_neighbours_equal_scikit_learns():
    points = np.random.default_rng(0).normal(size=(700, 32)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    distances, indices = nearest_neighbours(points, k=12, block=256)
    expected, theirs = exact_neighbours(points, 12)
    np.testing.assert_allclose(distances, expected, atol=1e-5)
    assert (indices == theirs).mean() > .999

def test_multiplicity_is_density():
    points = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    distances, indices = nearest_neighbours(points/np.linalg.norm(points, axis=1, keepdims=True), k=5)
    once, often = np.ones(50, int), np.ones(50, int)
    often[7] = 21
    gain = log_density(distances, indices, often, 5)-log_density(distances, indices, once, 5)
    assert gain[7] == gain.max() and np.isfinite(gain).all()
