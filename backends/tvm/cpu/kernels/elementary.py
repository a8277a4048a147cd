"""Elementary functions of f32 as C defines them, infinities and NaN included, in arithmetic that LLVM turns into vectors."""

from __future__ import annotations

from tvm import tirx

from .emit import Expr, Kernel, bits, exp, splat, splat_int


def _c(x: float) -> Expr:
    return splat(x, 1)


def _polynomial(x: Expr, *coefficients: float) -> Expr:
    """Highest power first."""
    p = _c(coefficients[0])
    for c in coefficients[1:]:
        p = p * x + _c(c)
    return p


def _nan_stays(x: Expr, y: Expr) -> Expr:
    """By the bits: a simplifier may take x for equal to itself."""
    magnitude = bits("int32", x) & splat_int(0x7FFFFFFF, 1)
    return tirx.Select(magnitude > splat_int(0x7F800000, 1), x, y)


def exact_exp(k: Kernel, x: Expr) -> Expr:
    """Relative error about 4e-7: the square of the root, which overflows and vanishes where exp does."""
    root = exp(k, x * _c(0.5))
    return k.let(_nan_stays(x, root * root))


def exact_sigmoid(k: Kernel, x: Expr) -> Expr:
    return k.let(_c(1.0) / (_c(1.0) + exact_exp(k, _c(0.0) - x)))


def exact_tanh(k: Kernel, x: Expr) -> Expr:
    """Relative error about 3e-7: the quotient of polynomials of Eigen's ptanh."""
    v = k.let(tirx.min(tirx.max(x, _c(-7.90531110763549805)), _c(7.90531110763549805)))
    z = k.let(v * v)
    p = _polynomial(
        z, -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08, 1.48572235717979e-05,
        6.37261928875436e-04, 4.89352455891786e-03,
    )  # fmt: skip
    q = _polynomial(z, 1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
    return k.let(_nan_stays(x, v * p / q))


def exact_erf(k: Kernel, x: Expr) -> Expr:
    """Relative error about 5e-7: the quotient of polynomials of Eigen's perf."""
    v = k.let(tirx.min(tirx.max(x, _c(-4.0)), _c(4.0)))
    z = k.let(v * v)
    p = _polynomial(
        z, -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05, -7.34990630306855e-04,
        -2.95459980854025e-03, -1.60960333262415e-02,
    )  # fmt: skip
    q = _polynomial(
        z, -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02
    )
    return k.let(_nan_stays(x, v * p / q))
