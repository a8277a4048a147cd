"""Dimensions: a normal form, arithmetic that agrees with integers, comparisons that are never wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from wasat.ir import (
    Dim,
    DimError,
    DimLike,
    DType,
    equal,
    evaluate_dim,
    less_equal,
    maximum,
    minimum,
    parse_dim,
    require_equal,
    solve,
    substitute,
    symbol,
    symbols_of,
)
from wasat.ir.checks import check_text, collect_checks, require_at_most
from wasat.ir.dims import TAKEN, span

NAMES = ("a", "b", "n")
Pair = tuple[DimLike, Callable[[dict[str, int]], int]]
"""A dimension and the same computation on integers."""


def _leaf() -> st.SearchStrategy[Pair]:
    numbers = st.integers(-4, 9).map(lambda k: (k, lambda env, k=k: k))
    names = st.sampled_from(NAMES).map(lambda s: (symbol(s), lambda env, s=s: env[s]))
    return st.one_of(names, numbers)


def _combine(x: Pair, y: Pair, how: str, k: int) -> Pair:
    (d, f), (e, g) = x, y
    match how:
        case "+":
            return d + e, lambda env: f(env) + g(env)
        case "-":
            return d - e, lambda env: f(env) - g(env)
        case "*":
            return d * e, lambda env: f(env) * g(env)
        case "//":
            return d // k, lambda env: f(env) // k
        case "%":
            return d % k, lambda env: f(env) % k
        case "max":
            return maximum(d, e), lambda env: max(f(env), g(env))
    return minimum(d, e), lambda env: min(f(env), g(env))


def _grow(inner: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    return st.builds(_combine, inner, inner, st.sampled_from(["+", "-", "*", "//", "%", "max", "min"]), st.integers(1, 5))


pairs = st.recursive(_leaf(), _grow, max_leaves=8)
bindings = st.fixed_dictionaries({n: st.integers(0, 12) for n in NAMES})


@given(pairs, bindings)
def test_agrees_with_integers(pair: Pair, env: dict[str, int]) -> None:
    d, f = pair
    assert evaluate_dim(d, env) == f(env)
    partly = substitute(d, {"a": env["a"]})  # in two steps
    assert "a" not in symbols_of([partly])
    assert evaluate_dim(partly, env) == f(env)


@given(pairs, pairs, pairs)
def test_normal_form(x: Pair, y: Pair, z: Pair) -> None:
    a, b, c = x[0], y[0], z[0]
    assert a + b == b + a
    assert a * b == b * a
    assert (a + b) + c == a + (b + c)
    assert (a + b) * c == a * c + b * c
    assert hash((a + b) * c) == hash(a * c + b * c)
    assert a - a == 0
    assert isinstance(a - a, int)
    assert str((a + b) * c) == str(c * b + c * a)


@given(pairs)
def test_a_constant_is_an_int(pair: Pair) -> None:
    d, _ = pair
    assert isinstance(d, int) or (d.symbols and isinstance(d, Dim))


@given(pairs)
def test_text_reads_back(pair: Pair) -> None:
    assert parse_dim(str(pair[0])) == pair[0]


@given(pairs, pairs, bindings)
def test_comparisons_are_never_wrong(x: Pair, y: Pair, env: dict[str, int]) -> None:
    (a, f), (b, g) = x, y
    assert equal(a, b) in (None, f(env) == g(env))
    assert less_equal(a, b) in (None, f(env) <= g(env))


@given(st.integers(0, 9), st.integers(0, 9), bindings)
def test_comparisons_decide_what_models_need(k: int, j: int, env: dict[str, int]) -> None:
    n, a = symbol("n"), symbol("a")
    assert equal(k, j) is (k == j)
    assert less_equal(n, n + k) is True
    assert less_equal(n + k + 1, n) is False
    assert equal(n + k + 1, n) is False
    assert less_equal(n // 2, n // 2 + a) is True
    assert less_equal(n % 3, maximum(n, a)) is None
    assert equal(n, a) is None
    assert less_equal(n, k) is None
    assert less_equal(0, n * a) is True


@given(st.integers(1, 6), pairs)
def test_division_cancels_factors(k: int, pair: Pair) -> None:
    n, d = symbol("n"), pair[0]
    assert (d * k) // k == d
    assert (d * k) % k == 0
    assert (n * 4 + 6) // 2 == 2 * n + 3
    assert (k * n + k) // (n + 1) == k
    assert (n * n + n) % (n + 1) == 0
    assert (d * (n + 1)) // (n + 1) == d


def test_text() -> None:
    a, b = symbol("a"), symbol("b")
    assert str(2 * (a + b)) == "2*a + 2*b"
    assert str(b * a - 1) == "a*b - 1"
    assert str((a + 1) // 2) == "(a + 1) // 2"
    assert str((a + 1) // 2 * 3) == "3*((a + 1) // 2)"
    assert str((a // 2) * (b // 2)) == "(a // 2)*(b // 2)"
    assert str(maximum(b, a + 1)) == "max(a + 1, b)"
    assert str(a - a * 2) == "-a"


@pytest.mark.parametrize("use", [bool, lambda d: d < 3, lambda d: d >= 3])
def test_silent_comparison_is_refused(use: Callable[[Any], object]) -> None:
    with pytest.raises(DimError, match="less_equal"):
        use(symbol("n"))


@pytest.mark.parametrize("make, match", [
    (lambda: symbol("n") // 0, "by zero"),
    (lambda: symbol("n") % 0, "modulus must be positive"),
    (lambda: symbol("max"), "cannot name a dimension"),
    (lambda: symbol("2n"), "cannot name a dimension"),
    (lambda: symbol("größe"), "cannot name a dimension"),
    (lambda: symbol("inf"), "cannot name a dimension"),
    (lambda: evaluate_dim(symbol("n") + symbol("m"), {"m": 2}), "needs a binding of n"),
    (lambda: parse_dim("n +"), "is not a dimension expression"),
    (lambda: parse_dim("f(n)"), "is not a dimension expression"),
    (lambda: parse_dim("n / 2"), "is not a dimension expression"),
    (lambda: parse_dim("1.5"), "is not a dimension expression"),
])  # fmt: skip
def test_what_cannot_be(make: Callable[[], object], match: str) -> None:
    with pytest.raises(DimError, match=match):
        make()


def test_no_element_type_names_a_dimension() -> None:
    assert all(TAKEN.fullmatch(d.value) for d in DType)
    assert symbol("f1").symbols == ("f1",)


def test_an_unknown_becomes_a_check() -> None:
    n, m = symbol("n"), symbol("m")
    with collect_checks() as checks:
        assert require_equal(n, n, "axis 0") == n
        assert require_equal(n + 1, m, "axis 0") == m  # the simpler side
        require_equal(n + 1, m, "axis 1")  # once is enough
        assert require_equal(n, 4, "axis 0") == 4
    assert checks == [(n + 1, m), (n, 4)]
    with pytest.raises(DimError, match=r"axis 2: n \+ 1 is not n"):
        require_equal(n + 1, n, "axis 2")


def test_what_is_known_of_bounds() -> None:
    """The smaller of two is at most what either is, the larger what both are; a quotient is no more than its dividend."""
    n, m, a = symbol("n"), symbol("m"), symbol("a")
    assert less_equal(minimum(n, m), n) is True
    assert less_equal(minimum(n, m), m + 3) is True
    assert less_equal(minimum(n, m), a) is None
    assert less_equal(n, minimum(n + a, n + 2)) is True
    assert less_equal(n, minimum(n + a, m)) is None
    assert less_equal(maximum(n, m), n + m) is True
    assert less_equal(maximum(n, m), n) is None
    assert less_equal(n, maximum(n, m)) is True
    assert less_equal(n, maximum(m, a)) is None
    assert less_equal(minimum(n, m) + 1, n) is None  # more than the atom alone
    assert less_equal(2 * minimum(n, m), n) is None
    assert less_equal(maximum(n + 1, m + n + 2), n) is False
    assert less_equal(maximum(n + 1, m), n) is False  # one is more
    assert less_equal(minimum(n + 1, m), n) is None
    assert less_equal(n + 1, minimum(n, m)) is False
    assert less_equal(n + 1, maximum(n, m)) is None
    assert less_equal(n // 2, n) is True
    assert less_equal((n + 3) // 4, n + 3) is True
    assert less_equal((n + 3) // 4, n) is True
    assert less_equal((n + 4) // 4, n) is None
    assert less_equal(n, 3 * ((n + 2) // 3)) is True
    assert less_equal(n, 3 * ((n + 1) // 3)) is None
    assert less_equal(n // 2, 2 * ((n + 2) // 4) + 1) is True
    assert less_equal(n // 2, 2 * ((n + 2) // 4) - 1) is None
    assert (m // n + maximum(n, m) + n // 2) // 2 == (2 * (m // n + maximum(n, m)) + n) // 4  # beside atoms of other kinds
    assert less_equal(n // (m + 1), n) is None  # of what may be more than it seems, nothing is said
    assert less_equal((n - m) // 2, n - m) is None
    assert less_equal(n, n // 2) is None
    assert less_equal(n // 2, m) is None
    assert less_equal(1, (n + 1) // 4) is None
    assert less_equal(1, (3 * n + 4) // 4) is True


def test_proofs_are_short() -> None:
    """Three sides in turn, of four atoms at most: a proof is to end soon."""
    n, m = symbol("n"), symbol("m")
    lesser = [minimum(symbol(f"x{i}"), symbol(f"y{i}")) for i in range(4)]
    xs = [symbol(f"x{i}") for i in range(4)]
    assert less_equal(sum(lesser[:3]), sum(xs[:3])) is True
    assert less_equal(sum(lesser), sum(xs)) is None
    beside = [x // 2 for x in xs]
    assert less_equal(n, maximum(n, m) + sum(beside[:3])) is True
    assert less_equal(n, maximum(n, m) + sum(beside)) is None


@pytest.mark.parametrize("k", [2, 4, 5, 16])
def test_what_is_padded_to_a_multiple_is_no_smaller(k: int) -> None:
    n, m = symbol("n"), symbol("m")
    padded = n + (k - n % k) % k
    assert less_equal(n, k * (padded // k)) is True
    assert less_equal(n, n + 2 * k * (padded // k)) is True
    assert less_equal(k * (padded // k) + 1, n) is False
    assert less_equal(k * (padded // k), n) is None
    assert less_equal(n, k * (n // k)) is None
    assert less_equal(n, k * ((padded - 1) // k)) is None  # of no multiple
    assert less_equal(n, m * (padded // k)) is None


def test_sizes_are_bounded() -> None:
    symbols = [symbol(f"s{i}") for i in range(1025)]
    whole = sum(symbols[:1024])
    assert len(whole.terms) == 1024
    with pytest.raises(DimError, match="a size would have about 1025 terms; at most 1024 are kept"):
        whole + symbols[1024]
    deep: DimLike = symbol("n")
    for _ in range(39):
        deep = (deep + 1) // symbol("m")
    with pytest.raises(DimError, match="a size would be nested 41 deep; at most 40 is kept"):
        (deep + 1) // symbol("m")


GROWTHS: list[tuple[Callable[[Any], Any], str]] = [  # of n, and what it is after 60 times
    (lambda d: d + minimum(1, d), "60*min(1, n) + n"),
    (lambda d: 2 * d + minimum(1, d), f"{2**60 - 1}*min(1, n) + {2**60}*n"),
    (lambda d: d + minimum(3, d), "min(2*n, 3) + 58*min(3, 3*n) + min(3, n) + n"),
    (lambda d: d + minimum(3, d + 1), "min(2*n + 2, 3) + min(3, n + 1) + n + 174"),
    (lambda d: maximum(0, d - 1), "max(0, n - 60)"),
    (lambda d: 9 - maximum(0, 5 - d), "9"),
    (lambda d: span(maximum(0, d - 4), d), "min(4, n)"),
    (lambda d: (d + 1) // 2, f"(n + {2**60 - 1}) // {2**60}"),
]


@pytest.mark.parametrize("at", range(len(GROWTHS)))
def test_sizes_that_follow_from_each_other_stay_short(at: int) -> None:
    step, text = GROWTHS[at]
    found: DimLike = symbol("n")
    numbers = list(range(12))
    for _ in range(60):
        found, numbers = step(found), [step(k) for k in numbers]
    assert [evaluate_dim(found, {"n": k}) for k in range(12)] == numbers
    assert str(found) == text


@pytest.mark.parametrize("k", [-2, -1, 1, 2, 3])
@pytest.mark.parametrize("outer, inner", itertools.product((minimum, maximum), repeat=2))
def test_bounds_within_bounds(outer: Callable[..., DimLike], inner: Callable[..., DimLike], k: int) -> None:
    """Every bound beside those where it begins to matter."""
    a, b = symbol("a"), symbol("b")
    for c, d, add in itertools.product(range(-3, 8), range(-1, 4), (0, 1, b, -b)):
        found = outer(c, k * inner(d, a) + add)
        for n, m in itertools.product(range(7), range(3)):
            env = {"a": n, "b": m}
            assert evaluate_dim(found, env) == outer(c, k * inner(d, n) + evaluate_dim(add, env)), (c, d, add, env)


@pytest.mark.parametrize("terms, exact", [(63, True), (64, False)])
def test_long_division_ends(terms: int, exact: bool) -> None:
    n, quotient = symbol("n"), sum(symbol(f"s{i}") for i in range(terms))
    assert ((quotient * (n + 1)) // (n + 1) == quotient) is exact
    assert ((quotient * n) % n == 0) is exact


def test_what_all_terms_share_cancels() -> None:
    """As exports write the number of chunks: elements over those of one chunk."""
    b, s = symbol("b"), symbol("s")
    padded = (3 * (s % 4)) % 4 + s
    assert (16 * padded * b) // (64 * b) == padded // 4
    assert (6 * s + 3) // 9 == (2 * s + 1) // 3
    assert (b * s + b) // (2 * b * b) == (s + 1) // (2 * b)
    assert ((-4 * s + 2) // 8, 3) == ((-2 * s + 1) // 4, 3)
    for n in range(20):
        assert evaluate_dim((16 * padded * b) // (64 * b), {"b": 3, "s": n}) == -(-n // 4)


def test_words_of_checks() -> None:
    n, m = symbol("n"), symbol("m")
    with collect_checks() as checks:
        require_at_most(n, m, "axis 0")
        require_at_most(m, n, "axis 0")
        require_at_most(n, 64, "axis 1")
        require_at_most(n, n + m, "axis 2")
        require_equal(n, 4, "axis 3")
        require_equal(2 * maximum(n, m), 4, "axis 3")
    assert [check_text(c) for c in checks] == ["n <= m", "m <= n", "n <= 64", "n == 4", "2*max(m, n) == 4"]
    with pytest.raises(DimError, match=r"axis 2: n \+ 1 is more than n"):
        require_at_most(n + 1, n, "axis 2")


@given(pairs, pairs, pairs, bindings)
def test_lengths_between_clamped_bounds(x: Pair, y: Pair, z: Pair, env: dict[str, int]) -> None:
    """Of what is clamped to the other bound, and never less than nothing: lo <= hi."""
    (a, f), (b, g), (c, h) = x, y, z
    for d, value in (
        (span(minimum(a, b), b), max(g(env) - f(env), 0)), (span(a, maximum(a, b)), max(g(env) - f(env), 0)),
        (span(maximum(a, c), b), g(env) - max(f(env), h(env))), (span(a, b), g(env) - f(env)), (span(a, a), 0),
    ):
        assert evaluate_dim(d, env) == value


def test_the_shorter_form_of_a_length() -> None:
    n, m = symbol("n"), symbol("m")
    assert span(maximum(0, n - 4), n) == minimum(4, n)
    assert span(0, minimum(4, n)) == minimum(4, n)
    assert span(m, maximum(m, n)) == maximum(0, n - m)
    assert span(minimum(n, m), minimum(n, m)) == 0
    assert str(span(minimum(n, m), n)) == "max(-m + n, 0)"


# -- solving ---------------------------------------------------------------------------------------------------------------
@given(bindings)
def test_solve_finds_the_binding(env: dict[str, int]) -> None:
    a, b, n = (symbol(s) for s in NAMES)
    dims = [a + b, 2 * b + 1, a * b + n, a]  # the first waits for the others
    found = solve([(d, evaluate_dim(d, env), "x") for d in dims])
    assert found == env


@given(pairs, bindings, st.integers(-3, 3))
def test_solve_refuses_what_contradicts(pair: Pair, env: dict[str, int], off: int) -> None:
    d, f = pair
    assume(off != 0)
    with pytest.raises(DimError, match=r"input x, axis 1: size is|input y: size is"):
        solve([*((symbol(s), k, "input y") for s, k in env.items()), (d, f(env) + off, "input x, axis 1")])


def test_solve_says_where_and_why() -> None:
    n = symbol("n")
    with pytest.raises(DimError, match=r"input y, axis 0: size is 5, expected n \+ 1 with n=3"):
        solve([(n, 3, "input x, axis 0"), (n + 1, 5, "input y, axis 0")])
    with pytest.raises(DimError, match=r"size is 5, and no n makes 2\*n that"):
        solve([(2 * n, 5, "input x, axis 0")])
    with pytest.raises(DimError, match=r"size is 1, and no n makes n \+ 2 that"):
        solve([(n + 2, 1, "input x, axis 0")])
    assert solve([(n * symbol("m"), 6, "x")]) == {}  # left open, not guessed
    assert solve([(n * symbol("m"), 6, "x")], {"m": 2}) == {"m": 2, "n": 3}


def test_signs_of_what_is_larger_and_smaller() -> None:
    """One operand that is not negative decides for the larger of two, and not for the smaller or a quotient."""
    n, m = symbol("n"), symbol("m")
    assert less_equal(0, maximum(n, m - 3)) is True
    assert less_equal(0, minimum(n, m - 3)) is None
    assert less_equal(0, minimum(m - 3, n)) is None
    assert less_equal(0, (m - 3) // (n + 1)) is None
    assert less_equal(0, n % (m + 1)) is True
    assert less_equal(0, n % (m - 3)) is None  # of the divisor's sign
    assert (3 * n + 8) // 3 == n + 2
    assert parse_dim("-n + 5") == 5 - n


def test_nothing_divided_is_nothing() -> None:
    n = symbol("n")
    assert 0 // n == 0
    assert (n - n) // (n + 1) == 0
