"""Properties of densities, weights and draws that must hold for every input."""
from dataclasses import replace

import numpy as np, pytest, torch
from hypothesis import example, given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.neighbors import NearestNeighbors

from densirl.density import neighbourhoods
from densirl.estimators import ESTIMATORS, Neighbourhoods, knn_density, levina_bickel, log_density
from densirl.logps import pack_groups
from densirl.neighbours import approximate_neighbours, exact_neighbours as blocked, nearest_neighbours, share_found
from densirl.sampler import Sampler, rank_slice
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

@given(densities, st.floats(.05, 1), st.sampled_from([0., 3., 10.]))
def test_a_solved_exponent_leaves_the_share_or_says_that_none_does(log_rho, share, cap):
    leaves = lambda alpha: effective_share(capped(sampling_weights(log_rho, alpha), cap))
    try: alpha = solve_alpha(log_rho, share, cap)
    except ValueError as error:
        assert 'leaves less than' in str(error) and min(map(leaves, np.geomspace(1e-4, 10, 40))) > share
        return
    if alpha == 0: assert share > 1-1e-9 or np.ptp(log_rho) == 0
    else: assert abs(leaves(alpha)-share) < 1e-3 and 0 < alpha <= 10

def test_a_share_below_a_cap_is_found_though_weights_underflow():
    logs = np.random.default_rng(0).standard_t(2, 300)*20
    alpha = solve_alpha(logs, .5, 3.)
    assert alpha < 1 and abs(effective_share(capped(sampling_weights(logs, alpha), 3.))-.5) < 1e-3
    with pytest.raises(ValueError, match='effective is 0.1, but no exponent'): solve_alpha(logs, .1, 2.)

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
@given(log_rho=arrays(np.float64, st.integers(16, 60), elements=st.floats(-5, 5)), step=st.integers(0, 10**6), each=st.integers(1, 2))
def test_a_draw_is_shared_whole_by_any_number_of_ranks(how, replacement, world, log_rho, step, each):
    probs = sampling_weights(log_rho, .3)
    drawn = Sampler(probs, world*each, 0, how, replacement).draw(step)
    assert len(drawn) == world*each and (replacement or len(set(drawn)) == len(drawn))
    assert (drawn == Sampler(probs, world*each, 0, how, replacement).draw(step)).all()
    slices = [rank_slice(drawn, r, world) for r in range(world)]
    assert (np.stack(slices, 1).ravel() == drawn).all()
    assert [len(part) for part in slices] == [each]*world

@pytest.mark.parametrize('world', [1, 2, 4, 8])
def test_a_group_is_one_prompt_on_one_rank(world):
    "What GRPO packs: every row holds one drawn prompt and all of its completions"
    drawn, size = Sampler(np.full(100, .01), 8).draw(3), 5
    rows = []
    for rank in range(world):
        mine = rank_slice(drawn, rank, world)
        packed = pack_groups([[1, 10+i] for i in mine], [[[200+i, 2]]*size for i in mine])
        assert packed.mask.shape[:2] == (len(mine), size)
        for row, i in zip(packed.ids.tolist(), mine):
            assert {t for t in row if 10 <= t < 110} == {10+i} and row.count(200+i) == size
        rows += [mine]
    assert sorted(np.concatenate(rows)) == sorted(drawn)

@pytest.mark.parametrize('how, replacement', WAYS)
def test_draws_follow_the_weights(how, replacement):
    probs = sampling_weights(np.random.default_rng(0).normal(size=5000), .5)
    sampler, expected = Sampler(probs, 64, 1, how, replacement), 64*1500*probs
    counts = np.bincount(np.concatenate([sampler.draw(s) for s in range(1500)]), minlength=5000)
    z = (counts-expected)/np.sqrt(expected)
    assert abs(z.mean()) < .05 and z.std() < 1.1

def test_blocks_do_not_bind_prompts_together():
    "With more prompts than blocks, two prompts of different blocks come together as often as chance would have it, two of one block hardly ever"
    sampler = Sampler(np.full(9000, 1/9000), 2250)
    together = lambda pair: np.mean([np.isin(pair, sampler.draw(s)).all() for s in range(2000)])
    assert abs(together(sampler.order[[0, 4000]])-1/16) < .02 and together(sampler.order[[0, 1]]) < .02

@given(densities, st.integers(0, 50))
def test_a_resumed_sampler_goes_on_and_other_weights_are_refused(log_rho, steps):
    probs = sampling_weights(log_rho, .1)
    unbroken, first = Sampler(probs, 3, 5), Sampler(probs, 3, 5)
    expected = [next(unbroken) for _ in range(steps+2)]
    for _ in range(steps): next(first)
    resumed = Sampler(probs, 3, 5)
    resumed.load_state_dict(first.state_dict())
    assert (next(resumed) == expected[steps]).all() and (next(resumed) == expected[steps+1]).all()
    for other in (Sampler(probs, 3, 6), Sampler(probs, 3, 5, ids=range(len(probs)))):
        with pytest.raises(ValueError, match='have changed'): other.load_state_dict(first.state_dict())


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
@example(crowd=25, seed=366, copies=5, who=1)
def test_duplicating_a_prompt_never_lifts_it_above_a_loner(estimator, crowd, seed, copies, who):
    points, counts = crowd_and_loner(crowd, seed, True), np.ones(crowd+1, int)
    clusters = (np.arange(crowd+1) == crowd).astype(int)
    near = replace(around(points, k=3), clusters=clusters)
    once = sampling_weights(log_density(near, 3, estimator))
    counts[who] = copies
    often = sampling_weights(log_density(replace(around(points, counts, k=3), clusters=clusters), 3, estimator))
    assert often[who] <= often[-1]
    slack = .1 if estimator == 'mean_distance' else 1e-9  # its floor is a quantile of all mean distances, some of which the copies change
    if who not in near.indices[-1]: assert often[who]/often[-1] <= once[who]/once[-1]*(1+slack)

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

@pytest.mark.parametrize('noise', [0, 1e-5, 1e-3])
@pytest.mark.parametrize('crowd', [21, 60])
def test_copies_neither_explode_nor_vanish(noise, crowd):
    "Exactly, or up to rounding: dense, but within what others may be, and still drawn"
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(500, 8)), np.repeat(rng.normal(size=(1, 8)), crowd, 0)+noise*rng.normal(size=(crowd, 8))])
    near = around(points)
    logs = knn_density(near)
    share = sampling_weights(logs, solve_alpha(logs, .5))[500:].sum()
    assert np.median(logs[:500]) < logs[500:].max() < np.median(logs[:500])+8
    assert crowd/560*.05 < share < crowd/560
    assert abs(levina_bickel(near.distances)-levina_bickel(around(points[:500]).distances)) < .7

def test_two_neighbours_do_not_flatten_the_dimension():
    near = around(np.random.default_rng(0).normal(size=(500, 8)), k=64)
    assert np.std(log_density(near, 2)) > .8*np.std(log_density(near, 10))

def test_multiplicity_is_density():
    points, often = np.random.default_rng(0).normal(size=(50, 8)), np.ones(50, int)
    often[7] = 21
    gain = knn_density(around(points, often, 5), 5)-knn_density(around(points, k=5), 5)
    assert gain[7] == gain.max() and np.isfinite(gain).all()

def test_density_k_needs_no_new_neighbours():
    points = np.random.default_rng(0).normal(size=(200, 8))
    for k in (3, 10, 64): np.testing.assert_allclose(log_density(around(points, k=64), k), log_density(around(points, k=max(k, 10)), k), rtol=1e-9)


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

def tight(groups, each, spread, seed=0):
    rng = np.random.default_rng(seed)
    return unit(np.repeat(rng.normal(size=(groups, 32)), each, 0)+spread*rng.normal(size=(groups*each, 32)))

def test_rough_products_are_not_called_exact(monkeypatch):
    "Where bf16 misses neighbours among near-copies, the search is made again in fp32"
    points = tight(2, 4096, .01)
    assert share_found(points, np.arange(200), blocked(points, 10, torch.bfloat16)[0][:200]) < .99
    monkeypatch.setattr('densirl.neighbours.compute_dtype', lambda device: torch.bfloat16)
    assert nearest_neighbours(points, 10)[2] == dict(how='exact', products='float32', recall=1.)

@pytest.mark.parametrize('points', [tight(10, 100, 0.), tight(20, 150, .05), tight(3000, 1, 1.)], ids=['copies', 'crowds', 'spread'])
def test_the_graph_finds_nearly_all_and_copies_do_not_count_as_missed(points):
    distances, indices, recall = approximate_neighbours(points, 10)
    exact = blocked(points, 10)[0]
    assert recall >= .97 and (distances <= exact[:, -1:]+1e-4).mean() >= .97
    assert (indices != np.arange(len(points))[:, None]).all() and (np.diff(distances) >= 0).all()
